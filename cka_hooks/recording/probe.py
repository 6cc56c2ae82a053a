"""Confirm the dimension with the samples: run the first batch smaller and in another order before anything counts.

A size that happens to match decides nothing. First a few samples of the batch run, then one fewer of them, in another
order. A dimension holds the samples if its size follows and its slices are those of the same samples. If this cannot
be done, if two dimensions follow, or if the model draws random numbers (with which it may shuffle its samples), the
whole batch runs as it is and in another order. Otherwise the few must be in their places when the batch is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cka_hooks.precision import exactly
from cka_hooks.recording.batches import cut, is_plain, with_tensors
from cka_hooks.recording.guest import Snapshot, draw_anew, is_sharded
from cka_hooks.recording.outputs import tensors_in

# Samples in the smaller pass. With one or two, dimensions of that size may be squeezed away, or exist anyway.
FEW = 3
# How many slices of the whole batch to look at, and how many sums of each slice and of all of them together.
_SLICES = 256
_OF_EACH, _OF_ALL = 512, 8192
# With more samples, hardly any of an order drawn at random is that of a roll or a flip.
_FEW_ORDERS = 12
# So many numbers are not alike by chance.
_MANY = 8
# Two slices are of the same sample if they differ by at most this share of the difference between samples.
_ALIKE = 0.1

# Not decided by the smaller passes.
OPEN = "open"
MOVED = "its samples are in another order than those of the batch: the model shuffles them"

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


@dataclass
class Look:
    """One pass over some samples of the batch.

    Attributes:
        samples: number of samples.
        positions: which samples to look at.
        seen: what each layer showed in the first call of its label.
        drew: whether the model drew random numbers.
        problem: the error that ended the pass early, None if it ran through.
    """

    samples: int
    positions: Sequence[int]
    seen: dict[str, Glance] = field(default_factory=dict)
    drew: bool = False
    problem: str | None = None

    def take(self, label: str, activation: Tensor, second: bool) -> None:
        """Look at a layer's activation: at sums of the numbers of some slices, the same in each slice."""
        if label in self.seen:
            return
        slices: dict[int, Tensor] = {}
        # The same sums in each pass that this one may be compared with.
        numbers = min(_OF_EACH, _OF_ALL // len(self.positions))
        for dim, size in enumerate(activation.shape):
            if size == self.samples:
                rows = activation.detach().movedim(dim, 0)
                if self.positions != range(size):
                    rows = rows.index_select(0, torch.tensor(self.positions, device=rows.device))
                slices[dim] = _folded(rows.reshape(len(rows), -1), numbers).cpu()
        self.seen[label] = Glance(tuple(activation.shape), slices, second, torch.finfo(activation.dtype).eps)


class Probe:
    """Passes over parts of a batch. After each, the model and all random states are as before.

    Args:
        run: runs the model on a batch.
        model: the model.
        batch: the first batch.
        samples: number of samples in it.

    Attributes:
        few: a few samples of the batch.
        chosen: their numbers in the batch.
        first: the pass over them.
    """

    def __init__(self, run: Run, model: nn.Module, batch: Any, samples: int) -> None:
        self._run, self._batch, self._samples = run, batch, samples
        # Ranks that make each pass together must make every pass, even if it is not needed.
        self._snapshot, self._always = Snapshot(model), is_sharded(model)
        self.chosen = _unlike(batch, samples)
        self.few = cut(batch, samples, self.chosen)
        self.first = self.look(self.few, len(self.chosen))

    def look(self, batch: Any, samples: int, positions: Sequence[int] = (), *, redraws: bool = False) -> Look:
        """Make a pass over a batch of that many samples, and look at those at `positions`, or at all.

        With `redraws`, the model draws other random numbers than in the other passes.
        """
        look = Look(samples, positions or range(samples))
        try:
            if redraws:
                draw_anew()
            self._run(batch, look.take)
        except Exception as error:
            look.problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        finally:
            look.drew = self._snapshot.drew()
            self._snapshot.restore()
        return look

    def sample_dimensions(self) -> tuple[dict[str, int | str | None], str | None]:
        """Find the dimension with the samples of every layer that runs.

        Returns:
            For each label, the dimension with the samples, None if there is none, or why it is not known; and why the
            model cannot run on the batch at all, None if it can.
        """
        first, batch, samples = self.first, self._batch, self._samples
        # Not the last and the first: these are in place where a model flips its samples.
        order = {1: [0, 0], 2: [1, 0, 0]}.get(first.samples, [1, 0])
        second = self.look(cut(batch, samples, [self.chosen[i] for i in order]), len(order))
        problem = first.problem or second.problem
        drew = first.drew or second.drew
        alike = _alike(first, second, order, first.seen | second.seen)
        found = {label: _by_size(label, first, second, of_label) for label, of_label in alike.items()}
        if samples == 1 or not (self._always or drew or problem or OPEN in found.values()):
            return {label: _unknown(problem) if dim == OPEN else dim for label, dim in found.items()}, None
        several = min(samples, _SLICES)
        looked_at = [(samples - 1) * i // (several - 1) for i in range(several)]
        whole = self.look(cut(batch, samples, range(samples)), samples, looked_at)
        turned_round = _turned(samples)
        turned = self.look(cut(batch, samples, turned_round), samples, [turned_round.index(i) for i in looked_at])
        drew = drew or whole.drew
        redrawn = self.look(cut(batch, samples, range(samples)), samples, looked_at, redraws=True) if drew else whole
        for label in {**found, **whole.seen}:
            dim = found.get(label, OPEN)
            if dim == OPEN:
                found[label] = _by_order(label, whole, turned, problem or whole.problem or turned.problem)
            elif drew and isinstance(dim, int) and _shuffled(label, whole, turned, redrawn, dim):
                found[label] = MOVED
        return found, whole.problem

    def is_elsewhere(self, label: str, activation: Tensor, dim: int) -> bool:
        """Whether the whole batch clearly has one of the few samples in another place than its own.

        A few may be in an order already in which a model puts all of them: that of lengths, of domains or of experts.

        Args:
            label: label of the layer.
            activation: what it returned for the whole batch.
            dim: the dimension with the samples.
        """
        glance = self.first.seen.get(label)
        is_there = dim < activation.ndim and activation.shape[dim] == self._samples
        if self.first.drew or glance is None or dim not in glance.slices or not is_there:
            return False
        few, rows = glance.slices[dim].double(), activation.detach().movedim(dim, 0)
        own = _folded(rows[self.chosen].reshape(len(few), -1), _OF_EACH).cpu().double()
        if own.shape != few.shape:
            return False
        off, apart = (own - few).norm(dim=1), torch.cdist(few, few).fill_diagonal_(math.inf).amin(1)
        nearly = 8 * glance.eps * few.norm(dim=1).max()
        moved = (off > torch.maximum(nearly, _ALIKE * apart)) & (few.norm(dim=1) > nearly)
        if not moved.any():
            return False
        level = torch.maximum(nearly, _ALIKE * off) if few.shape[1] >= _MANY else nearly.expand(len(few))
        whole = _folded(rows.reshape(self._samples, -1), _OF_EACH).cpu().double()
        found = (torch.cdist(few, whole) <= level[:, None]).sum(1)
        # Several places have the same if samples are in the batch twice, or if an expert had no room for them. Two of
        # the few that differ are not of the latter kind.
        twice = moved & (found > 1) & (found <= self._samples // 2) & (apart > level)
        return bool((moved & (found == 1)).any() or twice.sum() > 1)


def _unlike(batch: Any, samples: int) -> list[int]:
    """A few samples of a batch: the one with the most data, the one with the least, and one in between.

    Data are not 0 and change from one number to the next; padding is either 0 or all the same. A model that sorts its
    samples by length moves these, whichever way it sorts.
    """
    tensors = [it for it in tensors_in(with_tensors(batch)) if is_plain(it) and it.ndim and len(it) == samples]
    rows = [it.reshape(samples, -1) for it in tensors]
    whole = [((it != 0).sum(1) + (it[:, 1:] != it[:, :-1]).sum(1)).cpu() for it in rows]
    order = torch.stack([torch.zeros(samples, device="cpu"), *whole]).sum(0).argsort(stable=True).tolist()
    return [order[i] for i in (-1, 0, samples // 2)][: min(samples, FEW)]


def _folded(rows: Tensor, numbers: int) -> Tensor:
    """(n, d) numbers as (n, at most `numbers`): blocks of them are added, so that each one counts.

    Signs drawn at random keep what all numbers share from adding up.
    """
    rows = rows if rows.dtype is torch.float64 else rows.float()
    if rows.shape[1] <= numbers:
        return rows.nan_to_num(0, 0, 0)
    if missing := -rows.shape[1] % numbers:
        rows = nn.functional.pad(rows, (0, missing))
    rows = rows.view(len(rows), -1, numbers)
    signs = torch.randint(2, rows.shape[1:2], generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    weights = signs.to(rows).expand(len(rows), 1, -1)
    sums = exactly(rows.device, torch.bmm, weights, rows)
    # One NaN or infinity shows in the sum of all.
    if not math.isfinite(sums.sum()):
        sums = exactly(rows.device, torch.bmm, weights, rows.nan_to_num(0, 0, 0))
    return sums.squeeze(1)


def _turned(samples: int) -> list[int]:
    """An order in which shuffles show.

    A shuffle shows unless it and this order may change places. Few samples, all but the last, move round in a ring:
    n - 1 of all n! shuffles may change places with that, and neither flipping nor rolling. More are in an order drawn
    at random.
    """
    if samples > _FEW_ORDERS:
        return torch.randperm(samples, generator=torch.Generator().manual_seed(0), device="cpu").tolist()
    ring = max(2, samples - 1)
    step = next(step for step in range(ring // 2, 0, -1) if math.gcd(step, ring) == 1)
    return [*((i + step) % ring for i in range(ring)), *range(ring, samples)]


def is_same(before: Glance, after: Glance) -> bool:
    """Whether two passes showed the same numbers."""
    return before.shape == after.shape and all(
        torch.allclose(a.double(), after.slices[dim].double(), rtol=0, atol=8 * before.eps * float(a.abs().max()))
        for dim, a in before.slices.items()
        if a.numel()
    )


def _by_size(label: str, first: Look, second: Look, alike: dict[int, bool | None]) -> int | str | None:
    """The dimension whose size and slices follow the samples; None if none does, OPEN if this does not decide it."""
    before, after = first.seen.get(label), second.seen.get(label)
    if before is None or after is None:
        return OPEN if first.problem or second.problem else "ran for some samples and not for others"
    fitting, sure = list(alike), [dim for dim in alike if alike[dim]]
    if len(sure) == 1:
        return sure[0]
    # If its samples are all the same, or get other random numbers in each pass, only the size can decide.
    silent = first.drew or second.drew or None in alike.values()
    if silent and len(fitting) == 1 and fitting[0] in (0, int(before.second)):
        return fitting[0]
    return OPEN if fitting or _may_be_fixed(before.shape, after.shape, first.samples, second.samples) else None


def _by_order(label: str, whole: Look, turned: Look, problem: str | None) -> int | str | None:
    """The dimension whose slices change places along with the samples; None if none is, or why it is not known."""
    if not (label in whole.seen and label in turned.seen):
        return _unknown(problem)
    alike = _alike(whole, turned, list(range(len(whole.positions))), [label])[label]
    sure = [dim for dim in alike if alike[dim]]
    if len(sure) == 1 or not alike:
        return next(iter(sure), None)
    if problem:
        return _unknown(problem)
    followed = f"dimensions {sure} all" if sure else "no dimension alone"
    return f"{followed} followed the samples when their order changed"


def _alike(before: Look, after: Look, order: list[int], labels: Iterable[str]) -> dict[str, dict[int, bool | None]]:
    """For each layer and dimension of the right size, whether slices of two passes are those of the same samples.

    None if the numbers cannot show it. All layers are compared at once, which takes fewer operations.
    """
    alike: dict[str, dict[int, bool | None]] = {label: {} for label in labels}
    pairs: list[tuple[str, int]] = []
    for label in alike.keys() & before.seen.keys() & after.seen.keys():
        one, other = before.seen[label].slices, after.seen[label].slices
        alike[label] = dict.fromkeys(one.keys() & other.keys())
        pairs += [(label, dim) for dim in alike[label] if one[dim].shape[1] == other[dim].shape[1]]
    if pairs:
        # Zeros at the end change no distance.
        slices = ([look.seen[label].slices[dim].double().mT for label, dim in pairs] for look in (before, after))
        a, b = (nn.utils.rnn.pad_sequence(columns, batch_first=True).mT for columns in slices)
        largest, moved = (it.norm(dim=2).amax(1) for it in (a, b - a[:, order]))
        found = torch.stack([torch.cdist(a, a).amax((1, 2)), largest, moved], 1).tolist()
        for (label, dim), (spread, size, off) in zip(pairs, found, strict=True):
            if spread > 8 * before.seen[label].eps * size:
                alike[label][dim] = off <= _ALIKE * spread
    return alike


def _may_be_fixed(before: tuple[int, ...], after: tuple[int, ...], samples: int, fewer: int) -> bool:
    """Whether samples may have a dimension of their own only in the whole batch, as in ``x.view(8, -1, d)``.

    Windows, heads or beams that are folded into dimension 0 do not have one there either.
    """
    folded = before[1:] == after[1:] and before != after and before[0] * fewer == after[0] * samples
    return before != after and not folded and math.prod(before) * fewer == math.prod(after) * samples


def _shuffled(label: str, whole: Look, turned: Look, redrawn: Look, dim: int) -> bool:
    """Whether many slices are those of other samples, although the model drew random numbers.

    Slices that look like others of the same pass, such as zeros, do not count.
    """
    glances = [look.seen[label] for look in (whole, turned, redrawn) if label in look.seen]
    found = [glance.slices[dim].double() for glance in glances if dim in glance.slices]
    if len(found) < 3 or len({it.shape for it in found}) > 1:
        return False
    a, b, other = found
    nearly = 8 * glances[0].eps * a.norm(dim=1).max()
    distances = torch.cdist(b, a)
    own = distances.diagonal()[:, None]
    unique = (torch.cdist(a, a) <= nearly).sum(0) == 1
    at, was_at = (torch.tensor(look.positions, device="cpu") for look in (turned, whole))
    same_place = at[:, None] == was_at
    # Elsewhere, a sample has got other random numbers, which may hide what it was.
    level = torch.maximum(nearly, _ALIKE * own) if a.shape[1] >= _MANY else nearly
    elsewhere = ((distances <= level) & (distances < own) & ~same_place & unique).any(1)
    # A sorted batch is as it was. Random numbers, the same at each place in both passes, do not explain it if they
    # are small.
    small = (a - other).norm(dim=1) <= _ALIKE * own
    in_place = (distances <= _ALIKE * own) & (own > nearly) & same_place & unique & small
    # Of a shuffled batch, so many of what is looked at are found again.
    expected = len(a) ** 2 / whole.samples
    several = max(min(4, len(a) // 2), expected / 4)
    return int(elsewhere.sum()) >= several or int(in_place.sum()) >= max(several, 0.75 * int(same_place.sum()))


def _unknown(problem: str | None) -> str:
    reason = f"the model raised {problem}" if problem else "it was not reached"
    return f"could not be confirmed by a probe of the first batch: {reason}"
