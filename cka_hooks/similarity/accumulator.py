"""`CKAAccumulator`: takes minibatches and gives a `CKAResult`, with the method names of torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cka_hooks import memory
from cka_hooks.arrays import Features, as_features
from cka_hooks.errors import LayerError, OptionError, OutOfMemoryError, SampleCountError
from cka_hooks.features import Reduction, check_reduction, feature_rows
from cka_hooks.hsic import MIN_SAMPLES, Estimator, features_differ
from cka_hooks.options import Options, difference
from cka_hooks.precision import without_gradients
from cka_hooks.results.result import CKAResult
from cka_hooks.similarity.batch import DIFFER, Batch, Step
from cka_hooks.similarity.estimate import largest_stderr, result_of
from cka_hooks.similarity.kernels import as_kernel
from cka_hooks.similarity.products import fused
from cka_hooks.similarity.reduce import exchanged, is_shared, reduced
from cka_hooks.similarity.state import State

# Default size of minibatches, where size changes only the spread: a GPU then reads each activation once.
LARGEST_BY_DEFAULT = 128


class CKAAccumulator:
    """Minibatch CKA of every pair of layers, one forward pass at a time.

    ``observe(layer, activation)`` takes the Gram matrix of an activation at once. Call it inside a forward hook,
    before the next module can change the activation. ``step()`` completes the batch after all layers have been
    observed. ``update({layer: activation})`` does both. ``compute()`` returns the result so far and changes nothing.
    ``merge_state`` adds another accumulator, and ``reset`` forgets everything.

    CKA_ij = sum_b w_b HSIC(K_i, K_j) / sqrt(sum_b w_b HSIC(K_i, K_i) sum_b w_b HSIC(K_j, K_j)) over minibatches b
    (Nguyen, Raghu & Kornblith 2021) with the unbiased HSIC of Song et al. 2012 and w_b = n_b - 3, or the
    biased one of Kornblith et al. 2019 and w_b = n_b - 1.

    ``compute`` warns if more than 25 % of a layer's own HSIC (20 / samples in runs of fewer than 80) is in pairs with
    a single sample: a few outliers can decide CKA (Davari et al. 2023). `CKAResult.influence` names the sample.

    Args:
        kernel: a name in `cka_hooks.similarity.kernels.KERNELS` ("linear", "rbf", "distance", ...), or a callable
            (n, d) -> (n, n) on raw float64 features.
        bandwidth: for "rbf", a multiple of the root of the minibatch's median squared distance; default 1.
        sigma: for "rbf", a width in the features' units, the same over the whole run, instead of `bandwidth`.
        estimator: "unbiased" or "biased".
        minibatch: samples per HSIC estimate. A batch is split into groups of this size. A remainder of 4 or more is
            one more group, and a smaller one is left out. None splits batches evenly into groups of at most 128, if
            the size changes only the spread of the estimates. Biased estimates, "rbf" with its median, and your own
            kernels depend on the size and take each batch as it comes.
        features: how to turn an activation into rows of features, see :func:`cka_hooks.features.feature_rows`.
        seed: seed of everything that is drawn at random.
        per: "position" if what you observe has a row for each token or pixel. Batches are then not split, since a
            minibatch holds whole inputs, and there are no p-values.
        keep_minibatches: whether to keep each minibatch's values, O(minibatches * layers^2), for
            `CKAResult.difference`.
        permutations: how often to permute the samples of one layer of every pair, for
            ``CKAResult.pvalue(family_wise=True)``. Each takes 8 bytes for each pair of layers, and about as long as
            comparing all pairs once more. 999 are enough for a level of 5 %.

    Attributes:
        state: the sums so far, see :class:`cka_hooks.similarity.state.State`.

    Raises:
        OptionError: an option has an invalid value.

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
        per: str = "sample",
        keep_minibatches: bool = False,
        permutations: int = 0,
    ) -> None:
        self._options = Options.of(locals())
        check_reduction(features)
        self._estimator: Estimator = estimator
        self._kernel = as_kernel(self._options)
        size_matters = estimator == "biased" or callable(kernel) or (kernel == "rbf" and sigma is None)
        self._split_by_default = minibatch is None and not size_matters and per == "sample"
        # The Gram matrices of the current batch, for each group of equal minibatches.
        self._groups: list[Batch] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added."""
        # The layers of the current batch, in order, with rows only if these are to be joined; how it is split.
        self._pending: dict[str, Tensor | None] = {}
        self._samples = 0
        self._parts: list[tuple[int, int]] = []
        # For layers that were not seen before: the dtype, and whether features differ.
        self._asked: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.discard()
        self._batches = 0
        self._own: State | None = None
        self.state = State.blank(self._options)

    @property
    def settings(self) -> dict[str, Any]:
        """The options as a result has them: plain JSON values."""
        settings = self._options.spelled(*self._options.arguments_of(CKAAccumulator))
        if self._split_by_default:
            settings["minibatch"] = f"at most {LARGEST_BY_DEFAULT}"
        # Settings of earlier versions do not have it.
        per = settings.pop("per")
        if per != "sample":
            settings["per"] = per
        return settings

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in the order in which they were first observed."""
        return self.state.layers

    @property
    def samples(self) -> int:
        """Number of samples in minibatches, over all passes."""
        return self.state.samples

    @property
    def minibatches(self) -> int:
        """Number of minibatches, over all passes."""
        return self.state.minibatches

    @property
    def left_out(self) -> int:
        """Number of samples that are in no minibatch."""
        return self.state.left_out

    @property
    def passes(self) -> int:
        """Number of passes over the data, see :meth:`start_pass`."""
        return self.state.passes

    @property
    def observing(self) -> frozenset[str]:
        """The layers that were observed since the last `step`."""
        return frozenset(self._pending)

    @property
    def observing_samples(self) -> int:
        """Number of samples of each layer observed since the last `step`."""
        return self._samples if self._pending else 0

    def largest_stderr(self) -> float:
        """The largest standard error of a defined pair so far, infinite before the third minibatch.

        This waits for the device.
        """
        return largest_stderr(self.state)

    def skips(self, left_out: Mapping[str, str]) -> None:
        """Give the reason for each layer that was not handed over: label -> sentence. Every result will have them."""
        self.state.skipped = {**self.state.skipped, **left_out}

    def observe(self, layer: str, activation: Features) -> None:
        """Take the Gram matrix of one layer's activation.

        Args:
            layer: label of the layer.
            activation: (n, ...) floating point, a tensor or an array, with the same n samples in the same order for
                every layer.

        Raises:
            OptionError: the activation is not a tensor or array of floating-point numbers, or the label is not text.
            SampleCountError: the number of samples differs from that of the layers before it.
            LayerError: the layer has already been observed since the last `step`.
            OutOfMemoryError: memory does not suffice, even in smaller pieces. `discard` the batch and go on, or use
                another one.
        """
        if not isinstance(layer, str):
            raise OptionError(f"the label of a layer is {layer!r}: labels are text, such as {f'layer {layer}'!r}")
        activation = as_features(activation, f"layer {layer!r}")
        with without_gradients():
            self._take(layer, feature_rows(activation.detach(), self._options.features), activation.dtype)

    def slot(self, layer: str) -> Callable[[Tensor], None] | None:
        """`observe` for one layer: a function of (n, P, C) features; None if a reduction has to make them first."""
        return partial(self._take, layer) if self._options.features == "flatten" else None

    def _begin(self, layer: str, rows: Tensor) -> None:
        """Check that a layer's rows are of the samples of this batch."""
        if layer in self._pending:
            raise LayerError(
                f"layer {layer!r} was observed twice in batch {self._batches} (counted from 0): call step() after "
                "each forward pass, or discard() where one broke off"
            )
        samples = rows.shape[0]
        if not self._pending:
            if fused.is_captured(rows):
                raise OptionError(
                    f"layer {layer!r} was observed while a CUDA graph is captured, which computes nothing: capture "
                    "the model without hooks, or run it eagerly to compare its layers"
                )
            self._samples = samples
            self._parts = _split(samples, self._options.minibatch, self._split_by_default)
        elif samples != self._samples:
            raise SampleCountError(
                f"layer {layer!r} has {samples} samples and {next(iter(self._pending))!r} has {self._samples} in the "
                "same batch: CKA compares the same samples in the same order"
            )

    def _take(self, layer: str, rows: Tensor, dtype: torch.dtype | None = None) -> None:
        self._begin(layer, rows)
        with without_gradients():
            start = 0
            for number, (count, size) in enumerate(self._parts):
                some = rows if count * size == self._samples else rows[start : start + count * size]
                if number == len(self._groups):
                    self._groups.append(Batch(self._kernel))
                self._groups[number].take(layer, some, count)
                start += count * size
            if layer not in self.state.dtypes:
                dtype = dtype or rows.dtype
                self._asked[layer] = dtype, features_differ(rows, dtype)
        self._pending[layer] = None

    def step(self) -> Step:
        """Complete the batch and add it to the sums.

        Returns:
            What was added.

        Raises:
            LayerError: no layer was observed since the last `step`.
            OptionError: the accumulator is synchronised; call `unsync` first.
            OutOfMemoryError: memory does not suffice. Nothing was added; you can continue with the next batch.
        """
        if self._own is not None:
            raise OptionError("this accumulator is synchronised: call unsync() before the next batch")
        if not self._pending:
            raise LayerError(
                "no layer was observed since the last step(): pass observe to the hooks of the modules that run, "
                "or drop this step()"
            )
        layers, asked = tuple(self._pending), self._asked
        self._batches += 1
        try:
            with without_gradients():
                groups = [group.minibatches(layers, self._estimator) for group in self._groups[: len(self._parts)]]
                for layer in asked if groups else ():
                    groups[0].numbers[layers.index(layer), 0, DIFFER] = asked[layer][1]
                dtypes = {layer: str(dtype).removeprefix("torch.") for layer, (dtype, _) in asked.items()}
                counted = sum(count * size for count, size in self._parts)
                step = Step(self._samples, counted, groups, dtypes)
                self.state.add(step, self._options)
        except memory.EXHAUSTED as error:
            memory.raise_unless_exhausted(error)
            raise OutOfMemoryError(
                f"out of memory while comparing {len(layers)} layers of {self._samples} samples with one another, "
                "and this batch was not added: choose fewer layers (layers=) or smaller minibatches (minibatch=)"
            ) from error
        finally:
            self.discard()
        return step

    def discard(self) -> None:
        """Forget what was observed since the last `step`, after a forward pass that was cut short."""
        # In place, because copies of an accumulator share it.
        self._pending.clear()
        self._asked = {}
        for group in self._groups:
            group.release()

    def update(self, activations: Mapping[str, Features]) -> None:
        """Observe every layer of a batch, then `step`.

        Args:
            activations: mapping from layer to (n, ...) tensor or array.

        Raises:
            OptionError: this is not such a mapping. Nothing was added.
            SampleCountError: the layers have different numbers of samples. Nothing was added.
        """
        if not isinstance(activations, Mapping):
            raise OptionError(
                f"update takes a mapping from layer to activation, found {type(activations).__name__}: write "
                'update({"layer": activation})'
            )
        try:
            for layer, activation in activations.items():
                self.observe(layer, activation)
        except BaseException:
            self.discard()
            raise
        self.step()

    def start_pass(self) -> None:
        """Begin another pass over the same samples, in other minibatches. They are not new samples.

        Standard errors then divide by the number of minibatches in one pass.
        """
        self.state.passes += 1

    def merge_state(self, other: CKAAccumulator) -> None:
        """Add another accumulator, as if its minibatches came after those of this one.

        Raises:
            OptionError: the accumulators have different options.
        """
        self._check_settings(other.settings)
        self.state.merge(other.state)

    def _check_settings(self, theirs: Any) -> None:
        if isinstance(theirs, Mapping) and theirs.get("sketch") is not None:
            raise OptionError("this state was made with sketch=, which no longer exists: measure again without it")
        if theirs != self.settings:
            found = difference(self.settings, theirs)
            raise OptionError(f"accumulators with different options cannot be merged: {found}")

    def state_dict(self) -> dict[str, Any]:
        """Everything that was added, as numbers, text and float64 tensors: copies, safe to save and to send.

        ``torch.save`` writes it and ``torch.load(weights_only=True)`` reads it.

        Raises:
            LayerError: a batch is under way.
        """
        if self._pending:
            raise LayerError("a batch is under way: call step() or discard() before state_dict()")
        return {"options": self.settings, "state": self.state.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and forget what was added here before.

        Raises:
            OptionError: the state is from an accumulator with other options, or not from an accumulator.
        """
        if not isinstance(state, Mapping) or "options" not in state:
            raise OptionError("this is not the state of an accumulator: state_dict() of a CKAAccumulator gives one")
        self._check_settings(state["options"])
        loaded = State.from_state_dict(state.get("state", {}))
        self.reset()
        self.state = loaded

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """On every rank, become the sum of the accumulators of all ranks of a process group.

        As in torchmetrics, call this on every rank before `compute`, and `unsync` to go on with this rank's own
        minibatches. Without a process group, or in one with a single rank, it does nothing. Ranks that hold the same
        samples (tensor parallel) must not be in the group: pass the data-parallel one.

        Raises:
            OptionError: the accumulator is synchronised already, or the ranks have different options.
            RankError: a rank failed or does not answer.
        """
        if self._own is not None:
            raise OptionError("this accumulator is synchronised already: call unsync() first")
        if not is_shared(group):
            return
        for theirs in exchanged(self.settings, group):
            self._check_settings(theirs)
        self.state, self._own = reduced(self.state, group), self.state

    def unsync(self) -> None:
        """Undo `sync` and go on from this rank's own minibatches."""
        if self._own is not None:
            self.state, self._own = self._own, None

    def compute(self) -> CKAResult:
        """The result so far, on the CPU.

        Raises:
            TooFewSamplesError: no minibatch had the samples that an HSIC estimate needs.
            NonFiniteError: a layer was NaN or infinite in some minibatch. It is left out of the sums, and the error's
                `partial` has the result of all other layers.
        """
        return result_of(self.state, self.settings)


@lru_cache(maxsize=256)
def _split(samples: int, minibatch: int | None, by_default: bool) -> list[tuple[int, int]]:
    """How to split a batch: pairs (m, n), for m minibatches of n samples each."""
    size = minibatch or samples
    if samples > LARGEST_BY_DEFAULT and by_default:
        # Evenly: sizes differ by one at most.
        count = -(-samples // LARGEST_BY_DEFAULT)
        size, larger = divmod(samples, count)
        groups = [(larger, size + 1), (count - larger, size)]
    else:
        groups = [(samples // size, size), (1, samples % size)] if samples > size else [(1, samples)]
    return [(count, size) for count, size in groups if count and size >= MIN_SAMPLES]
