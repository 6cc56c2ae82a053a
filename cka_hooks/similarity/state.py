"""Everything that adds up over the minibatches of a run, in one class.

Each field of :class:`State` declares how it combines: as a sum, as the first value, as the largest with its place, or
concatenated. Adding a minibatch, merging, reducing over ranks, joining models that were built in turn, saving and
restoring all follow from these declarations. To add a field, declare it here. If it comes from Gram matrices, also
give the function that makes it from a few minibatches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cka_hooks.errors import OptionError, SampleCountError
from cka_hooks.hsic import Estimator, all_pairs, centre, pack, sample_parts
from cka_hooks.null import null_cumulants, null_numbers, permuted_pairs
from cka_hooks.similarity.products import fused
from cka_hooks.similarity.products.grams import Grams

# How many numbers of the (layers, minibatches, n, n) stack to centre at a time: 32 MB. On a CPU 8 MB, because its
# allocator would request more from the system anew each time.
_CENTRED_AT_A_TIME = 1 << 22


class Minibatches(NamedTuple):
    """All layers of m minibatches of n samples, ready to be added. Every tensor has the layers in dimension 0.

    Attributes:
        layers: l labels.
        vectors: (l, m, p) centred Gram matrices, see :func:`cka_hooks.hsic.pack`.
        spread: (l, m) traces of the centred linear Gram matrices.
        size: (l, m) traces of the linear Gram matrices.
        finite: (l, m) bool, whether the layer was finite; its vectors are 0 where it was not.
        parts: (l, m, n) each sample's part of the layer's own HSIC.
        cubes: (l, m, 2) see :func:`cka_hooks.null.null_numbers`; 0 for the biased estimator.
        differ: (l,) 1 if :func:`cka_hooks.hsic.features_differ`, 0 if not, or if that was not asked.
    """

    layers: tuple[str, ...]
    vectors: Tensor
    spread: Tensor
    size: Tensor
    finite: Tensor
    parts: Tensor
    cubes: Tensor
    differ: Tensor

    @classmethod
    def of(cls, layers: tuple[str, ...], grams: Grams | Sequence[Grams], estimator: Estimator) -> Minibatches:
        """Centre the Gram matrices of all layers of m minibatches, a bounded stack at a time.

        Args:
            layers: their labels.
            grams: one for each layer, or those of all layers stacked in a leading dimension.
            estimator: "unbiased" or "biased".
        """
        if isinstance(grams, Grams) and estimator == "unbiased" and fused.centres(grams):
            made = fused.centred(grams)
            if made is not None:
                return cls(layers, *made, *[made[0].new_zeros(len(layers))])
        first = grams if isinstance(grams, Grams) else grams[0]
        device = first.values.device
        m, n, _ = first.values.shape[-3:]
        packed: Tensor | None = None
        rest: list[tuple[Tensor, ...]] = []
        step = max(1, _CENTRED_AT_A_TIME // (4 if device.type == "cpu" else 1) // (m * n * n))
        for low in range(0, len(layers), step):
            stacked = _stacked(grams, slice(low, low + step), device)
            spread, size = stacked.traces()
            finite = torch.isfinite(stacked.values.sum((-2, -1)) + size)
            bad = ~finite.unsqueeze(-1)
            centred = centre(stacked.values, estimator)
            cubes = null_numbers(centred) if estimator == "unbiased" else centred.new_zeros(*finite.shape, 2)
            parts = sample_parts(centred, estimator).masked_fill_(bad, 0)
            rest.append((spread, size, finite, parts, cubes.masked_fill_(bad, 0)))
            vectors = pack(centred, estimator).masked_fill_(bad, 0)
            if packed is None:
                packed = vectors if step >= len(layers) else vectors.new_empty(len(layers), *vectors.shape[1:])
            if packed is not vectors:
                packed[low : low + step] = vectors
        assert packed is not None
        return cls(layers, packed, *map(torch.cat, zip(*rest, strict=True)), *[packed.new_zeros(len(layers))])

    @classmethod
    def joined(cls, parts: Sequence[Minibatches]) -> Minibatches:
        """The same minibatches with the layers of several models."""
        layers = tuple(layer for part in parts for layer in part.layers)
        return cls(layers, *(torch.cat(tensors) for tensors in zip(*(part[1:] for part in parts), strict=True)))

    def cpu(self) -> Minibatches:
        """A copy on the CPU."""
        return Minibatches(self.layers, *(tensor.cpu() for tensor in self[1:]))


def _stacked(grams: Grams | Sequence[Grams], some: slice, device: torch.device) -> Grams:
    """The Gram matrices of some of the layers, stacked."""
    if isinstance(grams, Grams):
        return Grams(*(None if stack is None else stack[some] for stack in grams))  # type: ignore[arg-type]
    found: list[Any] = []
    for tensors in zip(*grams[some], strict=True):
        there = [tensor.to(device, non_blocking=True) for tensor in tensors if tensor is not None]
        found.append(torch.stack(there) if there else None)
    return Grams(*found)


class Step(NamedTuple):
    """A batch of `samples`, of which `counted` are in `groups` of equal minibatches; dtypes of layers by label."""

    samples: int
    counted: int
    groups: list[Minibatches]
    dtypes: dict[str, str]


class Combine(Enum):
    """How to combine two values of a field, the second from minibatches that come after those of the first.

    SUM: add the numbers, key by key in a mapping.
    FIRST: keep the first value, key by key in a mapping. In a tensor of minibatch numbers, keep the smallest.
    LARGEST: keep the larger number. A tensor (2, ...) holds numbers, and the place where each was found.
    CONCATENATED: append the second to the first.
    """

    SUM = "sum"
    FIRST = "first"
    LARGEST = "largest"
    CONCATENATED = "concatenated"


class _Declared(NamedTuple):
    """The declaration of a field. The last two are for mappings, the others for float64 tensors.

    Attributes:
        combine: how to combine two values.
        of: makes it from m minibatches and the (m, L, L) weighted HSICs of all pairs of their layers.
        axes: how many axes of L layers it ends in; 0 if it is no tensor.
        lead: its shape before the axes of layers; (0,) if an option gives the number.
        fill: the value for a layer that was never seen.
        after: the attribute with the number of earlier items, from which its places are counted.
        of_layers: whether its keys are labels.
        items: the type of its values.
    """

    combine: Combine
    of: Callable[[Minibatches, Tensor], Tensor] | None = None
    axes: int = 0
    lead: tuple[int, ...] = ()
    fill: float = 0.0
    after: str = ""
    of_layers: bool = False
    items: type = int


def _field(default: Callable[[], Any], combine: Combine, **declared: Any) -> Any:
    return dataclasses.field(default_factory=default, metadata={"is": _Declared(combine, **declared)})


def _tensor(combine: Combine, of: Callable[[Minibatches, Tensor], Tensor] | None = None, **declared: Any) -> Any:
    """Declare a float64 tensor, or a list of tensors to concatenate."""
    it = _Declared(combine, of, **declared)

    def blank() -> Tensor:
        return torch.full((*it.lead, *[0] * it.axes), it.fill, dtype=torch.float64, device="cpu")

    return _field(list if combine is Combine.CONCATENATED else blank, **it._asdict())


def _value(combine: Combine, default: Any, **declared: Any) -> Any:
    """Declare a number, text, or a list or mapping of these."""
    return _field(default if isinstance(default, type) else lambda: default, combine, **declared)


def moments_of(hsic: Tensor) -> Tensor:
    """`State.moments` of m minibatches, from the (m, L, L) weighted HSICs of all pairs."""
    own = hsic.diagonal(dim1=-2, dim2=-1)
    return torch.stack([hsic.sum(0), hsic.square().sum(0), (hsic * own.unsqueeze(-1)).sum(0), own.mT @ own])


def _bad(minibatches: Minibatches, _: Tensor) -> Tensor:
    numbers = torch.arange(minibatches.finite.shape[1], dtype=torch.float64, device=minibatches.finite.device)
    return torch.where(minibatches.finite, math.inf, numbers).amin(1)


def _null(minibatches: Minibatches, hsic: Tensor) -> Tensor:
    own = hsic.diagonal(dim1=-2, dim2=-1).mT
    return null_cumulants(own, minibatches.cubes, minibatches.parts.shape[-1])


def _peak(minibatches: Minibatches, _: Tensor) -> Tensor:
    part, place = minibatches.parts.flatten(1).max(1)
    return torch.stack([part, place.to(part.dtype)])


@dataclass
class State:
    """The sums of a run. Tensors are float64, on the device of the activations.

    h_ij,b = w_b HSIC(K_i,b, K_j,b) for layers i and j in minibatch b, see :func:`cka_hooks.hsic.pack`.

    Attributes:
        layers: L labels, the order of every axis of layers.
        moments: (4, L, L) sums of h_ij, of h_ij^2, of h_ij h_ii and of h_ii h_jj.
        spread: (L,) sum of the traces of the centred linear Gram matrices.
        size: (L,) sum of the traces of the linear Gram matrices.
        differ: (L,) number of first minibatches in which some feature differed by more than rounding can explain.
        bad: (L,) number of the first minibatch in which the layer was not finite, infinity if there is none.
        peak: (2, L) the largest part of the sum of h_ii that one sample has, and that sample's position in the run.
        kept: (m, L, L) the h_ij of every minibatch, if they are kept.
        null: (2, L, L) variance and third central moment of the sum of h_ij under random permutation of the samples,
            over the first pass; see :mod:`cka_hooks.null`. Unbiased estimates only.
        permuted: (B, L, L) the sum of h_ij with permuted samples, B times, over the first pass.
        seen: label -> number of minibatches in which the layer ran.
        dtypes: label -> the dtype of the activation, such as "float32".
        shapes: label -> the shape of one sample of the activation.
        sample_axes: label -> how the dimension with its samples is known.
        skipped: label -> why the layer was not recorded.
        minibatches: number of minibatches.
        samples: number of samples in them.
        left_out: number of samples that are in no minibatch.
        empty: number of batches without samples.
        largest: number of samples of the largest batch.
        passes: number of passes over the data.
        first_minibatches: number of minibatches in the first pass over the data.
        first_samples: number of samples in the first pass.
        classes: class, as text -> number of samples.
        neighbours: number of pairs of consecutive samples of a batch whose classes are known.
        equal_neighbours: number of such pairs in one class.
        first_batches: fingerprint of the first batch of each rank.
        identifiers: identifiers of the samples of each batch in order, as JSON, or how many these are.
        repeats: why samples may have been counted twice.
        stopped: why the run ended before its loader did.
    """

    layers: tuple[str, ...] = ()
    moments: Tensor = _tensor(Combine.SUM, lambda _, hsic: moments_of(hsic), lead=(4,), axes=2)
    spread: Tensor = _tensor(Combine.SUM, lambda it, _: torch.where(it.finite, it.spread, 0).sum(1), axes=1)
    size: Tensor = _tensor(Combine.SUM, lambda it, _: torch.where(it.finite, it.size, 0).sum(1), axes=1)
    differ: Tensor = _tensor(Combine.SUM, lambda it, _: it.differ, axes=1)
    bad: Tensor = _tensor(Combine.FIRST, _bad, axes=1, fill=math.inf, after="minibatches")
    peak: Tensor = _tensor(Combine.LARGEST, _peak, lead=(2,), axes=1, after="positions")
    null: Tensor = _tensor(Combine.SUM, _null, lead=(2,), axes=2)
    permuted: Tensor = _tensor(Combine.SUM, lead=(0,), axes=2)
    kept: list[Tensor] = _tensor(Combine.CONCATENATED, axes=2)
    seen: dict[str, int] = _value(Combine.SUM, dict, of_layers=True)
    dtypes: dict[str, str] = _value(Combine.FIRST, dict, of_layers=True, items=str)
    shapes: dict[str, list[int]] = _value(Combine.FIRST, dict, of_layers=True, items=list)
    sample_axes: dict[str, str] = _value(Combine.FIRST, dict, of_layers=True, items=str)
    skipped: dict[str, str] = _value(Combine.FIRST, dict, of_layers=True, items=str)
    minibatches: int = _value(Combine.SUM, 0)
    samples: int = _value(Combine.SUM, 0)
    left_out: int = _value(Combine.SUM, 0)
    empty: int = _value(Combine.SUM, 0)
    largest: int = _value(Combine.LARGEST, 0)
    passes: int = _value(Combine.LARGEST, 1)
    first_minibatches: int = _value(Combine.SUM, 0)
    first_samples: int = _value(Combine.SUM, 0)
    classes: dict[str, int] = _value(Combine.SUM, dict)
    neighbours: int = _value(Combine.SUM, 0)
    equal_neighbours: int = _value(Combine.SUM, 0)
    first_batches: list[str] = _value(Combine.CONCATENATED, list)
    identifiers: list[str] = _value(Combine.CONCATENATED, list)
    repeats: str | None = _value(Combine.FIRST, None)
    stopped: str | None = _value(Combine.FIRST, None)

    @property
    def positions(self) -> int:
        """Number of samples so far, counted or not."""
        return self.samples + self.left_out

    @classmethod
    def blank(cls, permutations: int) -> State:
        """An empty state, for this many permutations of the samples."""
        return cls(permuted=torch.zeros(permutations, 0, 0, dtype=torch.float64, device="cpu"))

    def add(self, step: Step, *, keep: bool, seed: int = 0) -> None:
        """Add a batch as a whole: everything that may fail comes before the first change.

        Args:
            step: the batch.
            keep: whether to keep the values of its minibatches.
            seed: seed of the permutations.
        """
        parts: list[State] = []
        for group in step.groups:
            hsic = all_pairs(group.vectors)
            tensors: dict[str, Any] = {
                name: declared.of(group, hsic) for name, declared in DECLARED.items() if declared.of is not None
            }
            m, n = group.parts.shape[1:]
            if keep:
                tensors["kept"] = [hsic]
            tensors["permuted"] = hsic[:0]
            if self.passes > 1:
                # Later passes bring no new samples, so the null is that of the first pass.
                tensors["null"].zero_()
            elif count := len(self.permuted):
                tensors["permuted"] = permuted_pairs(group.vectors, hsic, n, count, seed)
            part = type(self)(
                group.layers, **tensors, minibatches=m, samples=m * n, seen=dict.fromkeys(group.layers, m)
            )
            if self.passes == 1:
                part.first_minibatches, part.first_samples = m, m * n
            parts.append(part)
        # An empty state contributes nothing; its tensors would be made as large as the others and moved to the
        # device.
        last = parts[-1] if parts else type(self)()
        last.largest, last.left_out, last.dtypes = step.samples, step.samples - step.counted, step.dtypes
        for part in parts or [last]:
            self.merge(part)

    def merge(self, other: State) -> None:
        """Add another state, whose minibatches come after those of this one."""
        offsets = {declared.after: getattr(self, declared.after, 0) for declared in DECLARED.values()}
        layers = tuple(dict.fromkeys(self.layers + other.layers))
        if layers != self.layers:
            device = self.moments.device if self.layers else other.moments.device
            vars(self).update(vars(self.at(layers).to(device)))
        theirs = other.at(layers) if other.layers != layers else other
        if theirs.moments.device != self.moments.device:
            theirs = theirs.to(self.moments.device)
        for name, declared in DECLARED.items():
            offset = offsets[declared.after]
            setattr(self, name, _combined(declared, getattr(self, name), getattr(theirs, name), offset))

    def at(self, layers: tuple[str, ...]) -> State:
        """The same sums with every axis of layers in another order, filled for layers that were not seen."""
        position = {layer: i for i, layer in enumerate(layers)}
        index = torch.tensor([position[layer] for layer in self.layers], dtype=torch.int64, device="cpu")
        index = index.to(self.moments.device, non_blocking=True)

        def placed(tensor: Tensor, declared: _Declared) -> Tensor:
            moved = tensor.new_full(
                (*tensor.shape[: tensor.ndim - declared.axes], *[len(layers)] * declared.axes), declared.fill
            )
            if self.layers:
                moved[(..., index[:, None], index) if declared.axes == 2 else (..., index)] = tensor
            return moved

        return self._with_tensors(placed, layers)

    def to(self, device: torch.device | str) -> State:
        """A copy with its tensors on another device. Tensors that are already there stay the same objects."""
        return self._with_tensors(
            lambda tensor, _: tensor.to(device, non_blocking=torch.device(device).type != "cpu"), self.layers
        )

    def _with_tensors(self, change: Callable[[Tensor, _Declared], Tensor], layers: tuple[str, ...]) -> State:
        changed: dict[str, Any] = {}
        for name, declared in DECLARED.items():
            if declared.axes:
                value = getattr(self, name)
                changed[name] = (
                    [change(tensor, declared) for tensor in value]
                    if isinstance(value, list)
                    else change(value, declared)
                )
        return dataclasses.replace(self, layers=layers, **changed)

    @classmethod
    def joined(
        cls,
        states: Mapping[str, State],
        batches: Iterable[Mapping[str, Step | None]],
        *,
        keep: bool,
        permutations: int = 0,
        seed: int = 0,
    ) -> State:
        """The state of models that ran one after another over the same batches, as if they had run together.

        Args:
            states: the sums of each model's run, with different layers.
            batches: for each batch, each model's part of it. None in all of them marks the start of another pass.
            keep: whether to keep the values of single minibatches.
            permutations: number of permutations.
            seed: seed of the permutations.

        Raises:
            SampleCountError: a batch had different numbers of samples in two models.
        """
        total = cls.blank(permutations)
        for number, parts in enumerate(batches):
            there = {name: part for name, part in parts.items() if part is not None}
            if not there:
                total.passes += 1
                continue
            first = next(iter(there))
            for name, part in parts.items():
                if part is None or part[:2] != there[first][:2]:
                    found = "no batch" if part is None else f"{part.samples} samples"
                    raise SampleCountError(
                        f"batch {number} has {found} in model {name!r} and {there[first].samples} in {first!r}: CKA "
                        "compares the same samples in the same order"
                    )
            groups = zip(*(part.groups for part in there.values()), strict=True)
            step = there[first]._replace(groups=[Minibatches.joined(group) for group in groups])
            total.add(step, keep=keep, seed=seed)
        # Fields that are not made of Gram matrices: of layers, each model's own; of the data, what the first model
        # saw.
        for i, state in enumerate(states.values()):
            for name, declared in DECLARED.items():
                if not declared.axes and declared.of_layers:
                    setattr(total, name, {**getattr(total, name), **getattr(state, name)})
                elif not declared.axes and i == 0:
                    setattr(total, name, getattr(state, name))
        return total

    # Saving and restoring

    def state_dict(self) -> dict[str, Any]:
        """Copies of all fields: numbers, text, lists and mappings of these, and float64 tensors."""
        copies: dict[str, Any] = {"layers": list(self.layers)}
        for name, declared in DECLARED.items():
            value = getattr(self, name)
            if declared.combine is Combine.CONCATENATED and declared.axes:
                count = len(self.layers)
                value = torch.cat([*value, self.moments.new_empty(0, count, count)])
            copies[name] = value.clone() if isinstance(value, Tensor) else _copied(value)
        return copies

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> State:
        """Restore what :meth:`state_dict` returned.

        Raises:
            OptionError: this is anything else. The message names the field that does not fit.
        """
        if not isinstance(state, Mapping) or state.keys() != {"layers", *DECLARED}:
            odd = sorted(map(str, set(state) ^ {"layers", *DECLARED})) if isinstance(state, Mapping) else []
            raise OptionError(
                f"this is not the state of an accumulator of this version: {', '.join(odd) or type(state).__name__}"
            )
        layers = state["layers"]
        if (
            not isinstance(layers, list)
            or not all(isinstance(it, str) for it in layers)
            or len(set(layers)) < len(layers)
        ):
            raise OptionError("the state's layers are not a list of different labels")
        blank, values = cls(), dict[str, Any]()
        for name, declared in DECLARED.items():
            value = state[name]
            _check(name, value, declared, getattr(blank, name), layers)
            if declared.combine is Combine.CONCATENATED and declared.axes:
                values[name] = [value.clone()] if len(value) else []
            else:
                values[name] = value.clone() if isinstance(value, Tensor) else _copied(value)
        return cls(tuple(layers), **values)


DECLARED: dict[str, _Declared] = {
    field.name: field.metadata["is"] for field in dataclasses.fields(State) if "is" in field.metadata
}


def _combined(declared: _Declared, mine: Any, theirs: Any, offset: int) -> Any:
    """Combine two values of a field. Tensors change in place, so nothing grows from batch to batch."""
    if declared.combine is Combine.SUM:
        if isinstance(mine, dict):
            return {**mine, **{key: mine.get(key, 0) + number for key, number in theirs.items()}}
        if isinstance(mine, Tensor):
            # A state without permutations adds none.
            return mine.add_(theirs) if len(mine) == len(theirs) else mine if len(mine) else theirs.clone()
        return mine + theirs
    if declared.combine is Combine.FIRST:
        if isinstance(mine, Tensor):
            return torch.minimum(mine, theirs + offset, out=mine)
        return {**theirs, **mine} if isinstance(mine, dict) else theirs if mine is None else mine
    if declared.combine is Combine.LARGEST:
        if isinstance(mine, Tensor):
            moved = torch.stack([theirs[0], theirs[1] + offset])
            return torch.where(theirs[0] > mine[0], moved, mine)
        return max(mine, theirs)
    return mine + theirs if theirs else mine


def _copied(value: Any) -> Any:
    return type(value)(value) if isinstance(value, list | dict) else value


def _check(name: str, value: Any, declared: _Declared, blank: Any, layers: list[str]) -> None:
    """Raise :class:`OptionError` unless a value from outside is a valid one for its field."""
    if declared.axes:
        shape = (*declared.lead, *[len(layers)] * declared.axes)
        if isinstance(value, Tensor) and value.ndim and (isinstance(blank, list) or declared.lead == (0,)):
            shape = (len(value), *shape[-declared.axes :])
        fits = isinstance(value, Tensor) and value.shape == shape and value.dtype == torch.float64
        wanted = f"{shape} float64"
    elif isinstance(blank, dict):
        fits = isinstance(value, dict) and all(
            isinstance(key, str) and (_is_count(item) if declared.items is int else isinstance(item, declared.items))
            for key, item in value.items()
        )
        wanted = f"a mapping from text to {declared.items.__name__}"
    elif isinstance(blank, list):
        fits, wanted = isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of text"
    elif isinstance(blank, int):
        fits, wanted = _is_count(value) and value >= blank, f"a whole number, {blank} or more"
    else:
        fits, wanted = value is None or isinstance(value, str), "text or None"
    if not fits:
        raise OptionError(f"the state's {name!r} is not {wanted}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
