"""Everything that adds up over the minibatches of a run, in one class.

Each field of :class:`State` declares how it combines: as a sum, as the first value, as the largest with its place, or
concatenated. Adding a minibatch, merging, reducing over ranks, joining models that were built in turn, saving and
restoring all follow from these declarations. To add a field, declare it here. If it comes from Gram matrices, also
give the function that makes it from a few minibatches.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cka_hooks.errors import OptionError, SampleCountError
from cka_hooks.hsic import all_pairs
from cka_hooks.null import null_cumulants, null_weights, permuted_pairs
from cka_hooks.options import Options
from cka_hooks.precision import moved
from cka_hooks.similarity.batch import DIFFER, FINITE, SIZE, SPREAD, TRIANGLES, Minibatches, Step
from cka_hooks.similarity.products import fused

# Combines two values of a field, the second from minibatches that come after those of the first. The third argument
# is the number of items before the second. Tensors change in place, so nothing grows from batch to batch.
_Combine = Callable[[Any, Any, int], Any]
# Makes a field from m minibatches and the (m, L, L) weighted HSICs of all pairs of their layers.
_Of = Callable[[Minibatches, Tensor], Tensor]


def sum_up(mine: Any, theirs: Any, _: int) -> Any:
    """Add the numbers, key by key in a mapping."""
    if isinstance(mine, dict):
        return {**mine, **{key: mine.get(key, 0) + number for key, number in theirs.items()}}
    if isinstance(mine, Tensor):
        # A state without permutations adds none.
        return mine.add_(theirs) if len(mine) == len(theirs) else mine if len(mine) else theirs.clone()
    return mine + theirs


def keep_first(mine: Any, theirs: Any, offset: int) -> Any:
    """Keep the first value, key by key in a mapping. In a tensor of minibatch numbers, keep the smallest."""
    if isinstance(mine, Tensor):
        return torch.minimum(mine, theirs + offset, out=mine)
    return {**theirs, **mine} if isinstance(mine, dict) else theirs if mine is None else mine


def keep_largest(mine: Any, theirs: Any, offset: int) -> Any:
    """Keep the larger number. A tensor (2, ...) holds numbers, and the place where each was found."""
    if isinstance(mine, Tensor):
        moved = torch.stack([theirs[0], theirs[1] + offset])
        return torch.where(theirs[0] > mine[0], moved, mine)
    return max(mine, theirs)


def append(mine: Any, theirs: Any, _: int) -> Any:
    """Append the second to the first."""
    return mine + theirs if theirs else mine


class _Declared(NamedTuple):
    """The declaration of a field. The last two are for mappings, the others for float64 tensors.

    Attributes:
        combine: how to combine two values.
        of: makes it from minibatches.
        axes: how many axes of L layers it ends in; 0 if it is no tensor.
        lead: its shape before the axes of layers; (0,) if an option gives the number.
        fill: the value for a layer that was never seen.
        after: the attribute with the number of earlier items, from which its places are counted.
        of_layers: whether its keys are labels.
        items: the type of its values.
    """

    combine: _Combine
    of: _Of | None = None
    axes: int = 0
    lead: tuple[int, ...] = ()
    fill: float = 0.0
    after: str = ""
    of_layers: bool = False
    items: type = int


def _field(combine: _Combine, blank: Any = None, of: _Of | None = None, **declared: Any) -> Any:
    """Declare a field by its blank value or the type of that, or a tensor by its axes."""
    it = _Declared(combine, of, **declared)

    def tensor() -> Tensor:
        return torch.full((*it.lead, *[0] * it.axes), it.fill, dtype=torch.float64, device="cpu")

    default = tensor if it.axes and blank is None else blank
    given: Any = {"default_factory" if callable(default) else "default": default}
    return dataclasses.field(metadata={"is": it}, **given)


def moments_of(hsic: Tensor) -> Tensor:
    """`State.moments` of m minibatches, from the (m, L, L) weighted HSICs of all pairs."""
    own = hsic.diagonal(dim1=-2, dim2=-1)
    return torch.stack([hsic.sum(0), hsic.square().sum(0), (hsic * own.unsqueeze(-1)).sum(0), own.mT @ own])


def _sum_of(number: int) -> _Of:
    return lambda it, _: it.numbers[..., number].sum(1)


def _seen(minibatches: Minibatches, _: Tensor) -> Tensor:
    return minibatches.parts.new_full(minibatches.parts.shape[:1], minibatches.parts.shape[1])


def _bad(minibatches: Minibatches, _: Tensor) -> Tensor:
    finite = minibatches.numbers[..., FINITE]
    numbers = torch.arange(finite.shape[1], dtype=finite.dtype, device=finite.device)
    return torch.where(finite > 0, math.inf, numbers).amin(1)


def _null(minibatches: Minibatches, hsic: Tensor) -> Tensor:
    own = hsic.diagonal(dim1=-2, dim2=-1).mT
    return null_cumulants(own, minibatches.numbers[..., TRIANGLES:], minibatches.parts.shape[-1])


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
        seen: (L,) number of minibatches in which the layer ran.
        bad: (L,) number of the first minibatch in which the layer was not finite, infinity if there is none.
        peak: (2, L) the largest part of the sum of h_ii that one sample has, and that sample's position in the run.
        kept: (m, L, L) the h_ij of every minibatch, if they are kept.
        null: (2, L, L) variance and third central moment of the sum of h_ij under random permutation of the samples,
            over the first pass; see :mod:`cka_hooks.null`. Unbiased estimates only.
        permuted: (B, L, L) the sum of h_ij with permuted samples, B times, over the first pass.
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
    moments: Tensor = _field(sum_up, of=lambda _, hsic: moments_of(hsic), lead=(4,), axes=2)
    spread: Tensor = _field(sum_up, of=_sum_of(SPREAD), axes=1)
    size: Tensor = _field(sum_up, of=_sum_of(SIZE), axes=1)
    differ: Tensor = _field(sum_up, of=_sum_of(DIFFER), axes=1)
    seen: Tensor = _field(sum_up, of=_seen, axes=1)
    bad: Tensor = _field(keep_first, of=_bad, axes=1, fill=math.inf, after="minibatches")
    peak: Tensor = _field(keep_largest, of=_peak, lead=(2,), axes=1, after="positions")
    null: Tensor = _field(sum_up, of=_null, lead=(2,), axes=2)
    permuted: Tensor = _field(sum_up, lead=(0,), axes=2)
    kept: list[Tensor] = _field(append, list, lead=(0,), axes=2)
    dtypes: dict[str, str] = _field(keep_first, dict, of_layers=True, items=str)
    shapes: dict[str, list[int]] = _field(keep_first, dict, of_layers=True, items=list)
    sample_axes: dict[str, str] = _field(keep_first, dict, of_layers=True, items=str)
    skipped: dict[str, str] = _field(keep_first, dict, of_layers=True, items=str)
    minibatches: int = _field(sum_up, 0)
    samples: int = _field(sum_up, 0)
    left_out: int = _field(sum_up, 0)
    empty: int = _field(sum_up, 0)
    largest: int = _field(keep_largest, 0)
    passes: int = _field(keep_largest, 1)
    first_minibatches: int = _field(sum_up, 0)
    first_samples: int = _field(sum_up, 0)
    classes: dict[str, int] = _field(sum_up, dict)
    neighbours: int = _field(sum_up, 0)
    equal_neighbours: int = _field(sum_up, 0)
    first_batches: list[str] = _field(append, list)
    identifiers: list[str] = _field(append, list)
    repeats: str | None = _field(keep_first, None)
    stopped: str | None = _field(keep_first, None)
    # Where the h_ij of a batch are made on a GPU.
    _hsic: Tensor | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @property
    def positions(self) -> int:
        """Number of samples so far, counted or not."""
        return self.samples + self.left_out

    @classmethod
    def blank(cls, options: Options) -> State:
        """An empty state of a run with these options."""
        return cls(permuted=torch.zeros(options.permutations, 0, 0, dtype=torch.float64, device="cpu"))

    def add(self, step: Step, options: Options) -> None:
        """Add a batch as a whole: everything that may fail comes before the first change.

        Args:
            step: the batch.
            options: whether to keep the values of its minibatches, and the seed of the permutations.
        """
        keep = options.keep_minibatches
        device = step.groups[0].vectors.device if step.groups else self.moments.device
        if self.moments.device.type == "cpu" and device.type != "cpu":
            # It was read from a file. Everything that is added would have to come here, and be waited for.
            vars(self).update(vars(self.to(device)))
        made = []
        for group in self._add_in_place(step.groups, keep):
            hsic = all_pairs(group.vectors)
            tensors: dict[str, Any] = {name: it.of(group, hsic) for name, it in DECLARED.items() if it.of}
            tensors |= {"kept": [hsic] if keep else [], "permuted": hsic[:0]}
            if self.passes > 1:
                # Later passes bring no new samples, so the null is that of the first pass.
                tensors["null"].zero_()
            elif count := len(self.permuted):
                n = group.parts.shape[-1]
                tensors["permuted"] = permuted_pairs(group.vectors, hsic, n, count, options.seed)
            made.append(type(self)(group.layers, **tensors, **self._counts(group)))
        for state in made:
            self.merge(state)
        self._combine(largest=step.samples, left_out=step.samples - step.counted, dtypes=step.dtypes)

    def _counts(self, group: Minibatches) -> dict[str, Any]:
        """What minibatches add to the fields that are not tensors."""
        m, n = group.parts.shape[1:]
        counts = {"minibatches": m, "samples": m * n}
        return counts | {"first_minibatches": m, "first_samples": m * n} if self.passes == 1 else counts

    def _add_in_place(self, groups: list[Minibatches], keep: bool) -> list[Minibatches]:
        """Add a batch on a GPU, a product and a launch for each group. Return the groups that PyTorch has to add."""
        if not groups or len(self.permuted) or not fused.adds_up(groups[0].vectors):
            return groups
        layers, sizes = groups[0].layers, [group.vectors.shape[1] for group in groups]
        room, device = self._hsic, groups[0].vectors.device
        if room is None or room.device != device or room.shape[1] != len(layers) or len(room) < sum(sizes):
            room = groups[0].vectors.new_empty(sum(sizes), len(layers), len(layers))
        hsics = room[: sum(sizes)].split(sizes)
        for group, hsic in zip(groups, hsics, strict=True):
            vectors = group.vectors.transpose(0, 1)
            torch.bmm(vectors, vectors.mT, out=hsic)
        self._cover(layers, device)
        if self.layers != layers or self.moments.device != device:
            return groups
        sums = self.moments, self.null, self.spread, self.size, self.differ, self.seen, self.bad, self.peak
        for number, (group, hsic) in enumerate(zip(groups, hsics, strict=True)):
            weights = null_weights(group.parts.shape[-1]) if self.passes == 1 else (0.0,) * 4
            if not fused.add_up((hsic, group.numbers, group.parts, *sums), weights, self.minibatches, self.positions):
                return groups[number:]
            self._combine(**self._counts(group), kept=[hsic] if keep else [])
        self._hsic = None if keep else room
        return []

    def merge(self, other: State) -> None:
        """Add another state, whose minibatches come after those of this one."""
        self._cover(other.layers, other.moments.device)
        theirs = other.at(self.layers) if other.layers != self.layers else other
        if theirs.moments.device != self.moments.device:
            theirs = theirs.to(self.moments.device)
        self._combine(**{name: getattr(theirs, name) for name in DECLARED})

    def _combine(self, **theirs: Any) -> None:
        """Add fields of another state, which has the same layers."""
        offsets = {name: getattr(self, DECLARED[name].after, 0) for name in theirs}
        for name, value in theirs.items():
            setattr(self, name, DECLARED[name].combine(getattr(self, name), value, offsets[name]))

    def _cover(self, layers: tuple[str, ...], device: torch.device) -> None:
        """Make room for more layers, on a device if they are the first."""
        union = tuple(dict.fromkeys(self.layers + layers))
        if union != self.layers:
            vars(self).update(vars(self.at(union).to(self.moments.device if self.layers else device)))

    def at(self, layers: tuple[str, ...]) -> State:
        """The same sums with every axis of layers in another order, filled for layers that were not seen."""
        position = {layer: i for i, layer in enumerate(layers)}
        index = torch.tensor([position[layer] for layer in self.layers], dtype=torch.int64, device="cpu")
        index = moved(index, self.moments.device)

        def placed(tensor: Tensor, it: _Declared) -> Tensor:
            filled = tensor.new_full((*tensor.shape[: -it.axes], *[len(layers)] * it.axes), it.fill)
            if self.layers:
                filled[(..., index[:, None], index) if it.axes == 2 else (..., index)] = tensor
            return filled

        return self._with_tensors(placed, layers)

    def to(self, device: torch.device | str) -> State:
        """A copy with its tensors on another device. Tensors that are already there stay the same objects."""
        return self._with_tensors(lambda tensor, _: moved(tensor, torch.device(device)), self.layers)

    def _with_tensors(self, change: Callable[[Tensor, _Declared], Tensor], layers: tuple[str, ...]) -> State:
        changed: dict[str, Any] = {}
        for name, it in DECLARED.items():
            if it.axes:
                value = getattr(self, name)
                changed[name] = [change(one, it) for one in value] if isinstance(value, list) else change(value, it)
        return dataclasses.replace(self, layers=layers, **changed)

    @classmethod
    def joined(
        cls, states: Mapping[str, State], steps: Mapping[str, Sequence[Step | None]], options: Options
    ) -> State:
        """The state of models that ran one after another over the same batches, as if they had run together.

        Args:
            states: the sums of each model's run, with different layers.
            steps: each model's part of each batch. None in all models marks the start of another pass.
            options: of the run: what to keep, and how often to permute.

        Raises:
            SampleCountError: a batch had different numbers of samples in two models.
        """
        total = cls.blank(options)
        for number, of_batch in enumerate(zip_longest(*steps.values())):
            parts = dict(zip(steps, of_batch, strict=True))
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
            total.add(step, options)
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
        fields = {"layers": list(self.layers), **{name: getattr(self, name) for name in DECLARED}}
        for name in CONCATENATED:
            fields[name] = torch.cat([*fields[name], self.moments[:0]])
        return {name: it.clone() if isinstance(it, Tensor) else copy.deepcopy(it) for name, it in fields.items()}

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
        are_labels = isinstance(layers, list) and all(isinstance(it, str) for it in layers)
        if not are_labels or len(set(layers)) < len(layers):
            raise OptionError("the state's layers are not a list of different labels")
        blank, values = cls(), {name: copy.deepcopy(state[name]) for name in DECLARED}
        if isinstance(seen := values["seen"], dict):
            # An earlier version kept it by label, in the order of the layers.
            values["seen"] = torch.tensor(list(seen.values()), dtype=torch.float64, device="cpu")
        for name, declared in DECLARED.items():
            if not _fits(values[name], declared, getattr(blank, name), len(layers)):
                raise OptionError(f"the state's {name!r} is {values[name]!r:.60}, which it cannot be: measure again")
        for name in CONCATENATED:
            values[name] = [values[name]] if len(values[name]) else []
        return cls(tuple(layers), **values)


DECLARED: dict[str, _Declared] = {
    field.name: field.metadata["is"] for field in dataclasses.fields(State) if "is" in field.metadata
}
# Lists of tensors, which are saved as one.
CONCATENATED = [name for name, it in DECLARED.items() if it.axes and it.combine is append]


def _fits(value: Any, declared: _Declared, blank: Any, layers: int) -> bool:
    """Whether a value from outside is a valid one for its field, with these many layers."""
    if declared.axes:
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            return False
        lead = value.shape[:1] if declared.lead == (0,) else declared.lead
        return value.shape == (*lead, *[layers] * declared.axes)
    if isinstance(blank, dict | list):
        fits = isinstance(value, type(blank)) and all(isinstance(it, str) for it in value)
        return fits and (isinstance(value, list) or all(type(it) is declared.items for it in value.values()))
    return type(value) is int and value >= blank if isinstance(blank, int) else isinstance(value, str | None)
