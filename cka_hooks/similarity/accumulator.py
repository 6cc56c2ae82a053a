"""`CKAAccumulator`: minibatches in, a `CKAResult` out, with torchmetrics' words for what lies between."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cka_hooks import memory, schema
from cka_hooks.errors import (
    CKAWarning,
    LayerError,
    NonFiniteError,
    OptionError,
    OutOfMemoryError,
    SampleCountError,
    TooFewSamplesError,
)
from cka_hooks.features import Reduction, check_reduction, feature_rows
from cka_hooks.hsic import MIN_SAMPLES, Estimator, all_pairs, centre, pack, sample_parts
from cka_hooks.precision import without_gradients
from cka_hooks.results.result import CKAResult, Influence
from cka_hooks.run import ranks as distributed
from cka_hooks.similarity.kernels import as_kernel
from cka_hooks.similarity.products.grams import Grams
from cka_hooks.similarity.sums import NEVER, Sums

# Above this share of a layer's own HSIC in pairs of one single sample, `compute` warns, and not below this many
# times the 2 / samples that alike samples have: in a small run the largest share is large by chance.
INFLUENCE_WARNING = 0.25
INFLUENCE_TIMES_EVEN = 10
# The form of `state_dict`.
_STATE: dict[str, Any] = {
    "options": {str: object},
    "layers": [str],
    "dtypes": {str: str},
    "seen": {str: schema.COUNT},
    "largest": schema.COUNT,
    "first_pass": (None, [schema.COUNT]),
    "passes": schema.COUNT,
    "minibatches": schema.COUNT,
    "samples": schema.COUNT,
    "left_out": schema.COUNT,
    "sums": (None, {str: Tensor}),
    "kept": [Tensor],
}
# Numbers of the (layers, minibatches, n, n) stack that are centred at a time: 32 MB, and 8 MB on a CPU, whose
# allocator would ask the system for anew what is larger.
_CENTRED_AT_A_TIME = 1 << 22
_CENTRED_AT_A_TIME_ON_CPU = 1 << 20


class _Observed(NamedTuple):
    """What one layer left behind in the minibatch that is under way."""

    samples: int
    grams: list[Grams]


class Centred(NamedTuple):
    """All layers of m minibatches of n samples, ready to be added up.

    Attributes:
        layers: l labels.
        vectors: (l, m, p) centred Gram matrices, see :func:`cka_hooks.hsic.pack`.
        spread: (l, m) traces of the centred linear Gram matrices.
        size: (l, m) traces of the linear Gram matrices.
        finite: (l, m) bool, whether the layer was finite; its vectors are 0 where it was not.
        parts: (l, m, n) parts of the layer's own HSIC that each sample has.
    """

    layers: tuple[str, ...]
    vectors: Tensor
    spread: Tensor
    size: Tensor
    finite: Tensor
    parts: Tensor


class Step(NamedTuple):
    """One batch of `samples`, of which `counted` are in `groups` of equal minibatches."""

    samples: int
    counted: int
    groups: list[Centred]


class CKAAccumulator:
    """Minibatch CKA of every pair of layers, one forward pass at a time.

    ``observe(layer, activation)`` takes the Gram matrix of an activation, at once: call it inside a forward
    hook, before the next module can change the activation. ``step()`` says that all layers of the minibatch
    have been observed. ``update({layer: activation})`` does both. ``compute()`` gives the result so far and
    changes nothing; ``merge_state`` adds another accumulator, ``reset`` forgets.

    CKA_ij = sum_b w_b HSIC(K_i, K_j) / sqrt(sum_b w_b HSIC(K_i, K_i) sum_b w_b HSIC(K_j, K_j)) over minibatches b
    (Nguyen, Raghu & Kornblith 2021) with the unbiased HSIC of Song et al. 2012 and w_b = n_b - 3, or the
    biased one of Kornblith et al. 2019 and w_b = n_b - 1.

    ``compute`` warns where more than 25 % of a layer's own HSIC (20 / samples in runs of fewer than 80) lies in
    pairs with one single sample: a few outlying samples can decide CKA (Davari et al. 2023).
    `CKAResult.influence` names the sample.

    Args:
        kernel: a name in `cka_hooks.similarity.kernels.KERNELS` ("linear", "rbf", "distance", ...), or a callable
            (n, d) -> (n, n) on raw float64 features.
        bandwidth: of "rbf", a multiple of the root of the minibatch's median squared distance; default 1.
        sigma: of "rbf", in the features' units and the same over the whole run, instead of `bandwidth`.
        estimator: "unbiased" or "biased".
        minibatch: samples per HSIC estimate; None takes each batch as it comes. A batch is split into
            groups of this many, a remainder of 4 or more is one more group, a smaller one is left out.
        features: how an activation becomes a row of features, see :func:`cka_hooks.features.feature_rows`.
        seed: of whatever is drawn at random.
        keep_minibatches: keep each minibatch's values, O(minibatches * layers^2), for `CKAResult.difference`.

    Raises:
        OptionError: an option that is not one of those above.

    Example:
        >>> import torch
        >>> from cka_hooks import CKAAccumulator
        >>> cka = CKAAccumulator()
        >>> generator = torch.Generator().manual_seed(0)
        >>> for _ in range(4):
        ...     x = torch.randn(32, 8, generator=generator)
        ...     cka.update({"x": x, "twice x": 2 * x, "noise": torch.randn(32, 8, generator=generator)})
        >>> result = cka.compute()
        >>> round(result["x", "twice x"], 6), abs(result["x", "noise"]) < 0.2
        (1.0, True)
    """

    def __init__(
        self,
        *,
        kernel: str | Callable[[Tensor], Tensor] = "linear",
        bandwidth: float | None = None,
        sigma: float | None = None,
        estimator: Estimator = "unbiased",
        minibatch: int | None = None,
        features: Reduction | str = "flatten",
        seed: int = 0,
        keep_minibatches: bool = False,
    ) -> None:
        self._kernel = as_kernel(kernel, bandwidth=bandwidth, sigma=sigma)
        if estimator not in ("unbiased", "biased"):
            raise OptionError(f"estimator={estimator!r} is not known: use 'unbiased' or 'biased'")
        if minibatch is not None and (not isinstance(minibatch, int) or minibatch < MIN_SAMPLES):
            raise OptionError(f"minibatch={minibatch!r}: an HSIC estimate needs at least {MIN_SAMPLES} samples")
        check_reduction(features)
        self._estimator: Estimator = estimator
        self._minibatch = minibatch
        self._features = features
        self._keep = keep_minibatches
        self._options = {
            "kernel": _name(kernel),
            "bandwidth": bandwidth,
            "sigma": sigma,
            "estimator": estimator,
            "minibatch": minibatch,
            "features": _name(features),
            "seed": seed,
            "keep_minibatches": keep_minibatches,
        }
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added."""
        self._pending: dict[str, _Observed] = {}
        self._batches = 0
        self._positions: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._seen: Counter[str] = Counter()
        self._sums: Sums | None = None
        self._kept: list[Tensor] = []
        self._own: dict[str, Any] | None = None
        self._largest = 0
        self._first_pass: tuple[int, int] | None = None
        self.passes = 1
        self.minibatches = 0
        self.samples = 0
        self.left_out = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in the order in which they were first observed."""
        return tuple(self._positions)

    @property
    def observing(self) -> bool:
        """Whether a layer was observed since the last `step`."""
        return bool(self._pending)

    def largest_stderr(self) -> float:
        """The largest standard error of a defined pair so far, infinite before the third minibatch.

        This waits for the device.
        """
        if self._sums is None or self.minibatches < 3:
            return float("inf")
        sums = self._sums.to("cpu")
        left_out = self._degenerate(sums).keys() | self._irregular().keys()
        defined = torch.tensor([layer not in left_out for layer in self._positions]) & (sums.bad == NEVER)
        stderr = sums.stderr(self.minibatches, self._per_pass[0])[defined][:, defined]
        return float(stderr.max()) if len(stderr) else 0.0

    @property
    def _per_pass(self) -> tuple[int, int]:
        """Minibatches and samples of the first pass over the data."""
        return self._first_pass or (self.minibatches, self.samples)

    def observe(self, layer: str, activation: Tensor) -> None:
        """Take the Gram matrix of one layer's activation.

        Args:
            layer: its label.
            activation: (n, ...) floating point, the same n samples in the same order for every layer.

        Raises:
            SampleCountError: its number of samples is not that of the layers before it.
            LayerError: the layer was observed already since the last `step`.
            OutOfMemoryError: also in smaller pieces; `discard` the minibatch and go on, or take another one.
        """
        with without_gradients():
            self._take(layer, feature_rows(activation.detach(), self._features), activation.dtype)

    def slot(self, layer: str) -> Callable[[Tensor], None] | None:
        """`observe` for one layer: what takes its features, (n, P, C), where no reduction has to make them first."""
        return partial(self._take, layer) if self._features == "flatten" else None

    def _take(self, layer: str, rows: Tensor, dtype: torch.dtype | None = None) -> None:
        if layer in self._pending:
            raise LayerError(
                f"layer {layer!r} was observed twice in batch {self._batches} (counted from 0): call step() after "
                "each forward pass, or discard() where one broke off"
            )
        with without_gradients():
            samples = rows.shape[0]
            for other, observed in self._pending.items():
                if observed.samples != samples:
                    raise SampleCountError(
                        f"layer {layer!r} has {samples} samples and {other!r} has {observed.samples} in the same "
                        "minibatch: CKA compares the same samples in the same order"
                    )
                break
            size = samples if self._minibatch is None else min(self._minibatch, samples)
            groups = samples // size if size else 0
            rest = samples - groups * size
            grams = []
            if size >= MIN_SAMPLES:
                grams.append(self._grams(layer, rows[: groups * size], groups))
                if rest >= MIN_SAMPLES:
                    grams.append(self._grams(layer, rows[groups * size :], 1))
        self._dtypes.setdefault(layer, dtype or rows.dtype)
        self._pending[layer] = _Observed(samples, grams)

    def _grams(self, layer: str, rows: Tensor, minibatches: int) -> Grams:
        """Gram matrices of one layer, in smaller pieces where memory does not suffice for all of them at once."""
        try:
            return self._kernel(rows, minibatches)
        except memory.EXHAUSTED as error:
            memory.raise_unless_exhausted(error)
        # Outside of the handler, whose traceback would keep the scratch buffers of the failed attempt.
        memory.release(rows.device)
        try:
            with memory.smaller_pieces():
                parts = [self._kernel(part, 1) for part in rows.chunk(minibatches)]
        except memory.EXHAUSTED as error:
            memory.raise_unless_exhausted(error)
            features = rows.shape[1] * rows.shape[2]
            raise OutOfMemoryError(
                f"out of memory in layer {layer!r}: {len(rows)} samples of {features:,} features "
                f"({rows.numel() * rows.element_size() / 1e6:,.1f} MB, {str(rows.dtype).removeprefix('torch.')}) on "
                f"{rows.device}, also in smaller pieces. Leave the layer out (layers=), average it over positions "
                "(features='mean'), take smaller minibatches (minibatch=), or use a smaller batch_size in the loader"
            ) from error
        joined: list[Any] = [None if of_one[0] is None else torch.cat(of_one) for of_one in zip(*parts, strict=True)]
        return Grams(*joined)

    def step(self) -> None:
        """The minibatch is complete: add it to the sums.

        Raises:
            LayerError: no layer was observed since the last `step`.
            OptionError: it is synchronised; `unsync` first.
            OutOfMemoryError: nothing was added; the accumulator goes on with the next minibatch.
        """
        if self._own is not None:
            raise OptionError("this accumulator is synchronised: call unsync() before the next minibatch")
        if not self._pending:
            raise LayerError(
                "no layer was observed since the last step(): pass observe to the hooks of the modules that run, "
                "or drop this step()"
            )
        pending, self._pending = self._pending, {}
        self._batches += 1
        first = next(iter(pending.values()))
        counted = sum(grams.values.shape[0] * grams.values.shape[1] for grams in first.grams)
        try:
            with without_gradients():
                groups = [
                    self._centred({layer: observed.grams[group] for layer, observed in pending.items()})
                    for group in range(len(first.grams))
                ]
                self._commit(Step(first.samples, counted, groups))
        except memory.EXHAUSTED as error:
            memory.raise_unless_exhausted(error)
            raise OutOfMemoryError(
                f"out of memory while comparing {len(pending)} layers of {first.samples} samples with one another, "
                "and this minibatch was not added: choose fewer layers (layers=) or smaller minibatches (minibatch=)"
            ) from error

    def discard(self) -> None:
        """Forget what was observed since the last `step`, after a forward pass that broke off."""
        self._pending = {}

    def update(self, activations: Mapping[str, Tensor]) -> None:
        """Observe every layer of one minibatch, then step.

        Args:
            activations: layer -> (n, ...) tensor.

        Raises:
            SampleCountError: they differ in their number of samples; nothing was added.
        """
        try:
            for layer, activation in activations.items():
                self.observe(layer, activation)
        except BaseException:
            self.discard()
            raise
        self.step()

    def start_pass(self) -> None:
        """From here on come the samples seen before, in other minibatches: they are not new samples.

        Standard errors then divide by the number of minibatches in one pass.
        """
        if self._first_pass is None:
            self._first_pass = (self.minibatches, self.samples)
        self.passes += 1

    def _centred(self, grams: Mapping[str, Grams]) -> Centred:
        """Centre the Gram matrices of all layers of m minibatches, a bounded stack at a time."""
        reference = next(iter(grams.values())).values
        device = reference.device
        m, n, _ = reference.shape
        rows = list(grams.values())
        packed: Tensor | None = None
        rest: list[tuple[Tensor, ...]] = []
        at_a_time = _CENTRED_AT_A_TIME_ON_CPU if device.type == "cpu" else _CENTRED_AT_A_TIME
        step = max(1, at_a_time // (m * n * n))
        for low in range(0, len(rows), step):
            some = rows[low : low + step]
            stacked = Grams(*(_stacked(of_one, device) for of_one in zip(*some, strict=True)))
            values = stacked.values
            spread, size = stacked.traces()
            finite = torch.isfinite(values.sum((-2, -1)) + size)
            bad = ~finite.unsqueeze(-1)
            centred = centre(values, self._estimator)
            parts = sample_parts(centred, self._estimator).masked_fill_(bad, 0)
            rest.append((spread, size, finite, parts))
            vectors = pack(centred, self._estimator).masked_fill_(bad, 0)
            if packed is None:
                packed = vectors if len(some) == len(rows) else vectors.new_empty(len(rows), *vectors.shape[1:])
            if packed is not vectors:
                packed[low : low + len(some)] = vectors
        assert packed is not None
        return Centred(tuple(grams), packed, *(torch.cat(parts) for parts in zip(*rest, strict=True)))

    def _commit(self, step: Step) -> None:
        """Add a batch to the sums: as a whole, since all that may fail comes before the first change."""
        if self._sums is None and step.groups:
            layers = step.groups[0].layers
            self._sums = Sums.zeros(len(layers), step.groups[0].vectors.device)
            self._positions = {layer: i for i, layer in enumerate(layers)}
        ready = [self._aligned(group) for group in step.groups]
        pairs = [all_pairs(group.vectors) for group in ready]
        start = self.samples + self.left_out
        for before, group, hsic in zip(step.groups, ready, pairs, strict=True):
            assert self._sums is not None
            # Sums that came from a file go to where the activations are: the other way would wait for the device.
            self._sums = self._sums.to(hsic.device)
            self._sums.add_layers(
                slice(0, len(group.layers)),
                group.spread,
                group.size,
                group.finite,
                group.parts,
                self.minibatches,
                start,
            )
            self._sums.add_pairs(hsic)
            if self._keep:
                self._kept.append(hsic)
            minibatches = group.finite.shape[1]
            for layer in before.layers:
                self._seen[layer] += minibatches
            self.minibatches += minibatches
            start += group.parts[0].numel()
        self._largest = max(self._largest, step.samples)
        self.samples += step.counted
        self.left_out += step.samples - step.counted

    def _aligned(self, group: Centred) -> Centred:
        """The layers of the first minibatch in their order, zeros for one that is missing.

        `compute` leaves out every layer that was not always there.
        """
        if group.layers == self.layers:
            return group
        rows = {layer: i for i, layer in enumerate(group.layers)}
        index = torch.tensor([rows.get(layer, len(rows)) for layer in self._positions])

        def placed(tensor: Tensor) -> Tensor:
            absent = torch.full_like(tensor[:1], tensor.dtype is torch.bool)
            return torch.cat([tensor, absent])[index.to(tensor.device, non_blocking=True)]

        return Centred(self.layers, *map(placed, group[1:]))

    def merge_state(self, other: CKAAccumulator) -> None:
        """Add what another accumulator has seen, as if its minibatches came after those of this one.

        Raises:
            OptionError: the other one has other options.
        """
        self._check_options(other._options)
        if other._sums is not None:
            positions = dict(self._positions)
            for layer in other._positions:
                positions.setdefault(layer, len(positions))
            theirs = other._sums.at([positions[layer] for layer in other._positions], len(positions))
            if self._sums is None:
                self._sums = theirs
            else:
                mine = self._sums.at(range(len(self._positions)), len(positions))
                mine.add(theirs.to(mine.moments.device), self.minibatches, self.samples + self.left_out)
                self._sums = mine
            self._kept += [self._placed(kept, other._positions, positions) for kept in other._kept]
            self._positions = positions
        self._seen.update(other._seen)
        self._dtypes = {**other._dtypes, **self._dtypes}
        self._largest = max(self._largest, other._largest)
        if self._first_pass or other._first_pass:
            first, second = self._per_pass, other._per_pass
            self._first_pass = (first[0] + second[0], first[1] + second[1])
            self.passes = max(self.passes, other.passes)
        self.minibatches += other.minibatches
        self.samples += other.samples
        self.left_out += other.left_out

    def _check_options(self, other: Mapping[str, Any]) -> None:
        for option, value in self._options.items():
            if other[option] != value:
                raise OptionError(
                    f"accumulators with different options do not add up: {option} is {value!r} here and "
                    f"{other[option]!r} there"
                )

    @staticmethod
    def _placed(kept: Tensor, theirs: Mapping[str, int], ours: Mapping[str, int]) -> Tensor:
        index = torch.tensor([ours[layer] for layer in theirs], device=kept.device)
        placed = kept.new_zeros(len(kept), len(ours), len(ours))
        placed[:, index[:, None], index] = kept
        return placed

    def state_dict(self) -> dict[str, Any]:
        """All that was added, as numbers, text and float64 tensors: copies, safe to save and to send.

        ``torch.save`` writes it and ``torch.load(weights_only=True)`` reads it.

        Raises:
            LayerError: a minibatch is under way.
        """
        if self._pending:
            raise LayerError("a minibatch is under way: call step() or discard() before state_dict()")
        sums = None
        if self._sums is not None:
            sums = {field.name: getattr(self._sums, field.name).clone() for field in fields(self._sums)}
        return {
            "options": dict(self._options),
            "layers": list(self._positions),
            "dtypes": {layer: str(dtype).removeprefix("torch.") for layer, dtype in self._dtypes.items()},
            "seen": dict(self._seen),
            "largest": self._largest,
            "first_pass": None if self._first_pass is None else list(self._first_pass),
            "passes": self.passes,
            "minibatches": self.minibatches,
            "samples": self.samples,
            "left_out": self.left_out,
            "sums": sums,
            "kept": [hsic.clone() for hsic in self._kept],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state_dict` gave, whatever was added here before.

        Raises:
            OptionError: it is from an accumulator with other options, or not from an accumulator.
        """
        schema.check(state, _STATE, "the accumulator's state")
        self._check_options(state["options"])
        layers, sums, kept = list(state["layers"]), state["sums"], list(state["kept"])
        if sums is not None:
            sums = Sums(**{name: tensor.clone() for name, tensor in sums.items()})
            sums.check(len(layers))
        if (
            (sums is None) != (not layers)
            or not all(isinstance(getattr(torch, name, None), torch.dtype) for name in state["dtypes"].values())
            or (state["first_pass"] is not None and len(state["first_pass"]) != 2)
            or (sums is not None and not state["minibatches"])
        ):
            raise OptionError("this is no accumulator's state: its layers, dtypes and sums do not fit together")
        self.reset()
        self._positions = {layer: i for i, layer in enumerate(layers)}
        self._dtypes = {layer: getattr(torch, name) for layer, name in state["dtypes"].items()}
        self._seen = Counter(state["seen"])
        self._largest = state["largest"]
        self._first_pass = None if state["first_pass"] is None else tuple(state["first_pass"])
        self.passes = state["passes"]
        self.minibatches = state["minibatches"]
        self.samples = state["samples"]
        self.left_out = state["left_out"]
        self._sums = sums
        self._kept = [hsic.clone() for hsic in kept]

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Become the sum of the accumulators of all ranks of a process group, on every rank.

        As in torchmetrics: call it on every rank before `compute`, and `unsync` to go on with this rank's own
        minibatches. Without a process group, or in one of a single rank, it does nothing. Ranks that hold the
        same samples (tensor parallel) must not be in the group: name the data-parallel one.

        Raises:
            OptionError: it is synchronised already, or the ranks have different options.
            RankError: a rank failed or does not answer.
        """
        if self._own is not None:
            raise OptionError("this accumulator is synchronised already: call unsync() first")
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) < 2:
            return
        own = self.state_dict()
        self.load_state_dict(distributed.added_up(own, group))
        self._own = own

    def unsync(self) -> None:
        """Undo `sync`: this rank's own minibatches again, to go on from."""
        if self._own is not None:
            self.load_state_dict(self._own)

    def compute(self) -> CKAResult:
        """The result so far, on the CPU.

        Raises:
            TooFewSamplesError: no minibatch had the samples an HSIC estimate needs.
            NonFiniteError: a layer was NaN or infinite in some minibatch. It is left out of the sums, and
                the error's `partial` is the result of all other layers.
        """
        if self._sums is None or not self.minibatches:
            raise TooFewSamplesError(
                f"an HSIC estimate needs at least {MIN_SAMPLES} samples in a minibatch, and "
                + (f"the largest batch had {self._largest}" if self._largest else "nothing was observed")
                + ": use a larger batch_size in the loader"
            )
        sums = self._sums.to("cpu")
        bad = {layer: int(sums.bad[i]) for layer, i in self._positions.items() if sums.bad[i] != NEVER}
        irregular = self._irregular()
        kept = [layer for layer in self._positions if layer not in bad and layer not in irregular]
        reasons = {layer: f"not finite, first in minibatch {number}" for layer, number in bad.items()}
        result = self._result(sums, kept, {**irregular, **reasons}) if kept else None
        if bad:
            layer, number = min(bad.items(), key=lambda item: (item[1], self._positions[item[0]]))
            others = f", and {len(bad) - 1} more layers" if len(bad) > 1 else ""
            raise NonFiniteError(
                f"layer {layer!r} has NaN or infinity in minibatch {number} (counted from 0){others}: mend the model "
                "or its inputs, or leave these layers out with layers=; the error's `.partial` has the result "
                "of all other layers",
                bad,
                result,
            )
        if result is None:
            raise LayerError(
                "no layer ran in every minibatch: " + "; ".join(f"{k} {v}" for k, v in irregular.items())
            )
        return result

    def _irregular(self) -> dict[str, str]:
        """Layers that did not run in every minibatch, and how often they did."""
        return {
            layer: f"ran in {self._seen[layer]} of {self.minibatches} minibatches"
            for layer in self._seen
            if self._seen[layer] != self.minibatches
        }

    def _degenerate(self, sums: Sums) -> dict[str, str]:
        """Layers for which CKA is undefined, and why."""
        degenerate = {}
        for layer, i in self._positions.items():
            eps = torch.finfo(self._dtypes[layer]).eps
            if not sums.spread[i] > (8 * eps) ** 2 * sums.size[i]:
                degenerate[layer] = "its samples do not differ, so that CKA is undefined"
            elif not sums.moments[0, i, i] > 0:
                degenerate[layer] = "the estimate of its own HSIC is not above 0, so that CKA is undefined"
        return degenerate

    def _result(self, sums: Sums, layers: list[str], skipped: dict[str, str]) -> CKAResult:
        index = torch.tensor([self._positions[layer] for layer in layers])
        degenerate = {layer: reason for layer, reason in self._degenerate(sums).items() if layer in layers}
        gone = torch.tensor([layer in degenerate for layer in layers])
        undefined = gone.unsqueeze(1) | gone
        per_pass, samples = self._per_pass
        cka = sums.cka()[index[:, None], index].masked_fill(undefined, torch.nan)
        stderr = sums.stderr(self.minibatches, per_pass)[index[:, None], index].masked_fill(undefined, torch.nan)
        shares = sums.influence(self.minibatches / per_pass)
        influence = {
            layer: Influence(share=float(shares[i]), sample=int(sums.peak_sample[i]))
            for layer, i in self._positions.items()
            if layer in layers and layer not in degenerate
        }
        self._warn(influence, samples)
        kept = None
        if self._keep:
            whole = [
                self._placed(k, dict(list(self._positions.items())[: k.shape[-1]]), self._positions)
                for k in self._kept
            ]
            kept = torch.cat(whole).cpu()[:, index[:, None], index]
        return CKAResult(
            rows=tuple(layers),
            columns=tuple(layers),
            matrix=cka,
            stderr=stderr,
            samples=samples,
            minibatches=self.minibatches,
            degrees_of_freedom=per_pass - 1,
            degenerate=degenerate,
            skipped=skipped,
            influence=influence,
            minibatch_hsic=kept,
            minibatch_layers=tuple(layers) if kept is not None else (),
            passes=self.passes,
            settings={**self._options, "samples_left_out": self.left_out, "torch": torch.__version__},
        )

    def _warn(self, influence: Mapping[str, Influence], samples: int) -> None:
        if self.left_out:
            warnings.warn(
                f"{self.left_out} samples at the end of batches were left out: fewer than {MIN_SAMPLES} of them were "
                "left for a minibatch",
                CKAWarning,
                stacklevel=4,
            )
        level = max(INFLUENCE_WARNING, INFLUENCE_TIMES_EVEN * 2 / samples)
        heavy = {layer: found for layer, found in influence.items() if found.share > level}
        if heavy:
            layer, found = max(heavy.items(), key=lambda item: item[1].share)
            warnings.warn(
                f"one sample decides much of {len(heavy)} layer(s): {found.share:.0%} of the own HSIC of {layer!r} "
                f"is in pairs of sample {found.sample}; look at it, and see `result.influence`",
                CKAWarning,
                stacklevel=4,
            )


def _stacked(tensors: Sequence[Tensor | None], device: torch.device) -> Any:
    """One attribute of several layers' Gram matrices, None where these have none."""
    there = [tensor.to(device, non_blocking=True) for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None


def _name(option: Any) -> Any:
    """How an option stands in a result's settings."""
    if isinstance(option, Mapping):
        return {str(key): _name(value) for key, value in option.items()}
    if callable(option):
        return f"{getattr(option, '__module__', '?')}.{getattr(option, '__qualname__', type(option).__qualname__)}"
    return option
