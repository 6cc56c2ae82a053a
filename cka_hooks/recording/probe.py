"""Confirm the dimension with the samples: run the first batch smaller and in another order before anything counts.

A size that happens to match decides nothing. First a few samples of the batch run, then one fewer of them, in another
order. A dimension holds the samples if its size follows and its slices are those of the same samples. If this cannot
be done, if two dimensions follow, or if the model draws random numbers (with which it may shuffle its samples), the
whole batch runs as it is and in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cka_hooks.recording.batches import cut
from cka_hooks.recording.snapshot import Snapshot

# Samples in the smaller pass. With one or two, dimensions of that size may be squeezed away, or exist anyway.
FEW = 3
# How many slices of the whole batch to look at, and how many numbers of all of them together.
_SLICES = 256
_NUMBERS = 8192
# Two slices are of the same sample if they differ by at most this share of the difference between samples.
_ALIKE = 0.1

# Not decided by the smaller passes.
OPEN = "open"

Take = Callable[[str, Tensor, bool], None]
# Runs the model on a batch and hands every layer's activation to a function, together with whether the kind of its
# module puts the samples into dimension 1.
Run = Callable[[Any, Take], None]


class Glance(NamedTuple):
    """What one pass showed of one layer.

    Attributes:
        shape: shape of its activation.
        slices: for each dimension with as many entries as the pass had samples, (positions, numbers).
        second: whether the kind of its module puts the samples into dimension 1.
        eps: eps of its dtype.
    """

    shape: tuple[int, ...]
    slices: dict[int, Tensor]
    second: bool
    eps: float


class Look:
    """One pass over some samples of the batch.

    Attributes:
        samples: number of samples.
        positions: which samples to look at.
        seen: what each layer showed in the first call of its label.
        drew: whether the model drew random numbers.
        problem: the error that ended the pass early, None if it ran through.
    """

    def __init__(self, run: Run, snapshot: Snapshot, batch: Any, samples: int, positions: Sequence[int]) -> None:
        self.samples = samples
        self.seen: dict[str, Glance] = {}
        self.problem: str | None = None
        self.positions = list(positions)
        try:
            run(batch, self._take)
        except Exception as error:
            self.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            self.drew = snapshot.drew()
            snapshot.restore()

    def _take(self, label: str, activation: Tensor, second: bool) -> None:
        if label in self.seen:
            return
        slices = {
            dim: _numbers(activation, dim, self.positions)
            for dim, size in enumerate(activation.shape)
            if size == self.samples
        }
        self.seen[label] = Glance(tuple(activation.shape), slices, second, torch.finfo(activation.dtype).eps)


def _numbers(activation: Tensor, dim: int, positions: Sequence[int]) -> Tensor:
    """Some numbers of some slices, the same in each slice, as (positions, numbers) in float64 on the CPU."""
    index = torch.tensor(positions, device=activation.device)
    rows = activation.detach().index_select(dim, index).movedim(dim, 0).reshape(len(positions), -1)
    step = max(1, rows.numel() // _NUMBERS)
    return rows[:, ::step].cpu().double()


class Probe:
    """Passes over parts of a batch. After each, the model and all random states are as before.

    Args:
        run: runs the model on a batch.
        snapshot: snapshot of the model.
        batch: the first batch.
        samples: number of samples in it.

    Attributes:
        few: a few samples of the batch.
        chosen: their numbers in the batch.
        first: the pass over them.
    """

    def __init__(self, run: Run, snapshot: Snapshot, batch: Any, samples: int) -> None:
        self._run, self._snapshot, self._batch, self._samples = run, snapshot, batch, samples
        count = min(samples, FEW)
        self.chosen = [samples * i // count for i in range(count)]
        self.few = cut(batch, samples, self.chosen)
        self.first = self.look(self.few, count)

    def look(self, batch: Any, samples: int, positions: Sequence[int] | None = None) -> Look:
        """Make a pass over a batch of that many samples, and look at those at `positions`, or at all."""
        return Look(self._run, self._snapshot, batch, samples, range(samples) if positions is None else positions)

    def sample_dimensions(self, *, always: bool = False) -> Findings:
        """Find the dimension with the samples of every layer that runs.

        Args:
            always: make every pass, even if it is not needed. Ranks that make each pass together must do so.
        """
        first, samples = self.first, self._samples
        # Not the last and the first: these are in place where a model flips its samples.
        order = {1: [0, 0], 2: [1, 0, 0]}.get(first.samples, [1, 0])
        second = self.look(cut(self._batch, samples, [self.chosen[i] for i in order]), len(order))
        labels = {**first.seen, **second.seen}
        found = {label: _by_size(label, first, second, order) for label in labels}
        problem = first.problem or second.problem
        drew = first.drew or second.drew
        if samples == 1 or not (always or drew or problem or OPEN in found.values()):
            return Findings({label: _unknown(problem) if dim == OPEN else dim for label, dim in found.items()})
        several = min(samples, _SLICES)
        looked_at = [(samples - 1) * i // (several - 1) for i in range(several)]
        whole = self.look(cut(self._batch, samples, range(samples)), samples, looked_at)
        turned_round = _turned(samples)
        now_at = {sample: place for place, sample in enumerate(turned_round)}
        turned = self.look(cut(self._batch, samples, turned_round), samples, [now_at[i] for i in looked_at])
        for label in {**labels, **whole.seen}:
            if found.get(label, OPEN) == OPEN:
                found[label] = _by_order(label, whole, turned, problem or whole.problem or turned.problem)
            elif drew and _shuffled(label, whole, turned, found[label]):
                found[label] = "its samples are in another order than those of the batch: the model shuffles them"
        return Findings(found, whole.problem)


def _turned(samples: int) -> list[int]:
    """An order in which shuffles show: all samples but the last moved round in a ring.

    A shuffle shows unless it and this order may change places: n - 1 of all n! do, and neither flipping nor rolling.
    """
    ring = max(2, samples - 1)
    step = next(step for step in range(ring // 2, 0, -1) if math.gcd(step, ring) == 1)
    return [*((i + step) % ring for i in range(ring)), *range(ring, samples)]


class Findings(NamedTuple):
    """What a probe found.

    Attributes:
        dimensions: for each label, the dimension with the samples, None if there is none, or why it is not known.
        problem: why the model cannot run on the batch at all, None if it can.
    """

    dimensions: dict[str, int | str | None]
    problem: str | None = None


def is_same(before: Glance, after: Glance) -> bool:
    """Whether two passes showed the same numbers."""
    for dim, numbers in before.slices.items() if before.shape == after.shape else ():
        largest = float(numbers.nan_to_num().abs().max()) if numbers.numel() else 0.0
        if not torch.allclose(numbers, after.slices[dim], rtol=0, atol=8 * before.eps * largest, equal_nan=True):
            return False
    return before.shape == after.shape


def _by_size(label: str, first: Look, second: Look, order: list[int]) -> int | str | None:
    """The dimension whose size and slices follow the samples; None if none does, OPEN if this does not decide it."""
    before, after = first.seen.get(label), second.seen.get(label)
    if before is None or after is None:
        return OPEN if first.problem or second.problem else "ran for some samples and not for others"
    fitting = [dim for dim in before.slices if dim in after.slices]
    alike = {dim: _alike(before, after, dim, order) for dim in fitting}
    sure = [dim for dim in fitting if alike[dim]]
    if len(sure) == 1:
        return sure[0]
    # If its samples are all the same, or get other random numbers in each pass, only the size can decide.
    silent = first.drew or second.drew or (len(fitting) == 1 and alike[fitting[0]] is None)
    if silent and len(fitting) == 1 and fitting[0] in (0, int(before.second)):
        return fitting[0]
    return OPEN if fitting or _may_be_fixed(before.shape, after.shape, first.samples, second.samples) else None


def _alike(before: Glance, after: Glance, dim: int, order: Sequence[int]) -> bool | None:
    """Whether the slices of two passes are those of the same samples; None if the numbers cannot show it."""
    a, b = before.slices[dim], after.slices[dim]
    if a.shape[1] != b.shape[1]:
        return None
    finite = a.isfinite().all(0) & b.isfinite().all(0)
    a, b = a[:, finite], b[:, finite]
    spread = torch.cdist(a, a).max()
    if not a.shape[1] or spread <= 8 * before.eps * a.norm(dim=1).max():
        return None
    return bool((b - a[list(order)]).norm(dim=1).max() <= _ALIKE * spread)


def _may_be_fixed(before: tuple[int, ...], after: tuple[int, ...], samples: int, fewer: int) -> bool:
    """Whether samples may have a dimension of their own only in the whole batch, as in ``x.view(8, -1, d)``.

    Windows, heads or beams that are folded into dimension 0 do not have one there either.
    """
    folded = before[1:] == after[1:] and before != after and before[0] * fewer == after[0] * samples
    return before != after and not folded and math.prod(before) * fewer == math.prod(after) * samples


def _by_order(label: str, whole: Look, turned: Look, problem: str | None) -> int | str | None:
    """The dimension whose slices change places along with the samples; None if none is, or why it is not known."""
    before, after = whole.seen.get(label), turned.seen.get(label)
    if before is None or after is None:
        return _unknown(problem)
    fitting = [dim for dim in before.slices if dim in after.slices]
    sure = [dim for dim in fitting if _alike(before, after, dim, range(len(before.slices[dim])))]
    if len(sure) == 1:
        return sure[0]
    if problem and fitting:
        return _unknown(problem)
    which = f"dimensions {sure} all" if sure else f"none of the dimensions {fitting} with the batch's size"
    return f"{which} followed the samples when their order changed" if fitting else None


def _shuffled(label: str, whole: Look, turned: Look, dim: int | str | None) -> bool:
    """Whether several slices are those of other samples, to the last digits.

    Slices that look like others of the same pass, such as zeros, do not count. Neither do slices at the same
    position: random numbers are the same there, and where a sample is black they are all there is.
    """
    before, after = whole.seen.get(label), turned.seen.get(label)
    if before is None or after is None or not isinstance(dim, int):
        return False
    if dim not in before.slices or dim not in after.slices:
        return False
    a, b = before.slices[dim].nan_to_num(), after.slices[dim].nan_to_num()
    if a.shape != b.shape:
        return False
    nearly = 8 * before.eps * a.norm(dim=1).max()
    at, was_at = (torch.tensor(look.positions, device="cpu") for look in (turned, whole))
    others = (torch.cdist(b, a) <= nearly) & (at[:, None] != was_at)
    others.fill_diagonal_(False)
    others &= (torch.cdist(a, a) <= nearly).sum(0) == 1
    # Of a shuffled batch, so many of what is looked at are found again. A few numbers may be alike by chance.
    expected = len(a) ** 2 / whole.samples
    return int(others.any(1).sum()) >= max(min(4, len(a) // 2), expected / 4)


def _unknown(problem: str | None) -> str:
    reason = f"the model raised {problem}" if problem else "it was not reached"
    return f"could not be confirmed by a probe of the first batch: {reason}"
