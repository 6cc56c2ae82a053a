"""The loop: models x loader x accumulator, with progress."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cka_hooks import batches
from cka_hooks.accumulator import CKAAccumulator
from cka_hooks.class_order import ClassOrder
from cka_hooks.errors import LayerError, NonFiniteError, OptionError, TooFewSamplesError
from cka_hooks.features import Reduction
from cka_hooks.hsic import MIN_SAMPLES, Estimator
from cka_hooks.layers import Layers, select_layers, unwrap
from cka_hooks.recorder import LayerRecorder, nothing_ran
from cka_hooks.result import CKAResult
from cka_hooks.running import RandomStream, runnable, untouched

# With `tolerance`, the first look at the standard errors is after this many minibatches (a look at the third
# one covers too little: it stops where the spread happens to be small), the next ones at this ratio.
FIRST_LOOK = 30
LOOK_RATIO = 1.25


def compare(
    model: nn.Module | Mapping[str, nn.Module],
    loader: Iterable[Any],
    *,
    layers: Layers | Mapping[str, Layers] = None,
    kernel: str | Callable[[Tensor], Tensor] = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: Estimator = "unbiased",
    minibatch: int | None = None,
    features: Reduction | str | Mapping[str, Reduction | str] = "flatten",
    batch_dim: int | Mapping[str, int] | None = None,
    forward: batches.Forward | Mapping[str, batches.Forward] | None = None,
    tolerance: float | None = None,
    max_samples: int | None = None,
    epochs: int = 1,
    keep_minibatches: bool = False,
    progress: bool = True,
) -> CKAResult:
    """CKA of every pair of layers of one or several models, in one pass over a loader.

    The models run in eval mode, without gradients, on the device they are on. Afterwards they and torch's
    random state are as they were, whether the run ended, raised or was interrupted.

    Args:
        model: one model, or a mapping from names to models, whose layers are then ``name/layer``.
        loader: yields ``(input, target)`` pairs, tensors, or dicts of keyword arguments; see
            :func:`cka_hooks.batches.arguments`. Shuffle it where classes are stored in order.
        layers: which layers, see :func:`cka_hooks.layers.select_layers`; or a mapping from model name to that.
        kernel: see :class:`CKAAccumulator`, as `bandwidth`, `sigma`, `estimator`, `minibatch`, `keep_minibatches`.
        features: see :class:`LayerRecorder`, as `batch_dim`.
        forward: ``(model, batch) -> anything`` where the default call does not fit, or a mapping from model
            name to that: two names for one model with different `forward` compare two views of the data.
        tolerance: end the run once every standard error off the diagonal is below it. Looked at first after
            30 minibatches, then at geometric intervals.
        max_samples: end the run after this many samples.
        epochs: passes over the loader. Later passes of a shuffled loader are other minibatches of the same
            samples: standard errors stay those of one pass, and `tolerance` looks at one pass's worth.
        progress: show a progress bar on stderr.

    Returns:
        The matrix with standard errors and all that was left out.

    Raises:
        LayerError: an entry of `layers` that matches nothing, before any forward pass; or nothing ran.
        ModelError: a model that hooks cannot see into.
        OptionError: an option with a value it cannot have.
        BatchError: a model that cannot be called with a batch.
        SampleCountError: two models, or two layers, with different numbers of samples.
        TooFewSamplesError: an empty loader, or only batches of fewer than 4 samples.
        NonFiniteError: NaN or infinity in a layer; `.partial` is the result of all others.

    Example:
        >>> import torch, cka_hooks
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> loader = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=16)
        >>> result = cka_hooks.compare(model, loader, progress=False)
        >>> result.layers, result.samples, result.minibatches
        (('0', '1', '2'), 64, 4)
        >>> result["0", "1"] > result["0", "2"]
        True
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise OptionError("the mapping of models is empty: name at least one model")
    if tolerance is not None and not tolerance > 0:
        raise OptionError(f"tolerance={tolerance!r} must be above 0: it is a standard error")
    if max_samples is not None and max_samples < MIN_SAMPLES:
        raise OptionError(f"max_samples={max_samples!r} must be at least {MIN_SAMPLES}")
    if not isinstance(epochs, int) or epochs < 1:
        raise OptionError(f"epochs={epochs!r} must be a whole number of passes, at least 1")
    accumulator = CKAAccumulator(
        kernel=kernel,
        bandwidth=bandwidth,
        sigma=sigma,
        estimator=estimator,
        minibatch=minibatch,
        keep_minibatches=keep_minibatches,
    )
    recorders = _recorders(models, layers, accumulator, features, batch_dim)
    run = _Run(recorders, _per_model(forward, models, "forward"), accumulator)
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(RandomStream())
        for recorder in recorders.values():
            stack.enter_context(untouched(recorder.model))
            stack.enter_context(recorder)
        stack.enter_context(torch.no_grad())
        run.over(loader, epochs, max_samples, tolerance, progress)
    settings = {
        "models": {name or "model": type(unwrap(m)).__qualname__ for name, m in models.items()},
        "layers": _spelled(layers),
        "features": _spelled(features),
        "tolerance": tolerance,
        "max_samples": max_samples,
        "epochs": epochs,
        "shapes": run.shapes,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return _finished(accumulator, recorders, models, settings, run)


def _per_model(option: Any, models: Mapping[str, nn.Module], name: str) -> dict[str, Any]:
    """An option for each model, given once for all or as a mapping from model name."""
    if not isinstance(option, Mapping):
        return dict.fromkeys(models, option)
    unknown = [key for key in option if key not in models]
    if unknown:
        raise OptionError(f"{name}= names the models {unknown}, and the models are {list(models)}")
    return {key: option.get(key) for key in models}


def _recorders(
    models: Mapping[str, nn.Module],
    layers: Layers | Mapping[str, Layers],
    accumulator: CKAAccumulator,
    features: Any,
    batch_dim: Any,
) -> dict[str, LayerRecorder]:
    chosen = _per_model(layers, models, "layers")
    if len(models) > 1 and not isinstance(layers, Mapping):
        chosen = _each_where_it_matches(models, layers)
    recorders = {}
    for name, model in models.items():
        prefix = f"{name}/" if name else ""

        def consumer(layer: str, activation: Tensor, prefix: str = prefix) -> None:
            accumulator.observe(prefix + layer, activation)

        recorders[name] = LayerRecorder(
            model, chosen[name], consumer=consumer, features=features, batch_dim=batch_dim
        )
    return recorders


def _each_where_it_matches(models: Mapping[str, nn.Module], layers: Any) -> dict[str, Any]:
    """One choice for several models: an entry has to match in one of them, and each needs a match."""
    if layers is None or isinstance(layers, str | type) or callable(layers):
        return dict.fromkeys(models, layers)
    chosen: dict[str, list[Any]] = {name: [] for name in models}
    for entry in layers:
        failure: LayerError | None = None
        matched = False
        for name, model in models.items():
            try:
                select_layers(model, [entry])
            except LayerError as error:
                failure = failure or error
            else:
                matched = True
                chosen[name].append(entry)
        if not matched and failure is not None:
            raise failure
    for name, entries in chosen.items():
        if not entries:
            raise LayerError(f"none of layers={list(layers)!r} matches a layer of the model {name!r}")
    return chosen


class _Run:
    """One run over the loader: what it has to know between two batches."""

    def __init__(
        self,
        recorders: Mapping[str, LayerRecorder],
        forwards: Mapping[str, batches.Forward | None],
        accumulator: CKAAccumulator,
    ) -> None:
        self.accumulator = accumulator
        self.shapes: dict[str, str] = {}
        self.stopped: str | None = None
        self.class_order = ClassOrder()
        self._recorders = recorders
        self._calls: list[Callable[[Any, int | None], None]] = []
        for name, recorder in recorders.items():
            model = runnable(recorder.model)
            device = batches.device_of(model)
            self._calls.append(partial(self._forward, recorder, model, device, forwards[name]))
        self._next_look = FIRST_LOOK

    @staticmethod
    def _forward(
        recorder: LayerRecorder,
        model: nn.Module,
        device: torch.device | None,
        forward: batches.Forward | None,
        batch: Any,
        limit: int | None,
    ) -> None:
        with recorder.forward_pass(batch, limit=limit):
            batches.call(model, batches.to_device(batch, device), forward)

    def over(
        self,
        loader: Iterable[Any],
        epochs: int,
        max_samples: int | None,
        tolerance: float | None,
        progress: bool,
    ) -> None:
        """Every batch through every model, until the loader or one of the bounds ends it."""
        total = _length(loader, epochs, max_samples)
        with tqdm(total=total, unit="sample", unit_scale=True, desc="cka", disable=not progress) as bar:
            for epoch in range(epochs):
                if epoch:
                    self.accumulator.start_pass()
                before = self.accumulator.samples + self.accumulator.left_out
                for batch in loader:
                    seen = self.accumulator.samples + self.accumulator.left_out - before
                    limit = None if max_samples is None else max_samples - seen
                    self._batch(batch, limit)
                    now = self.accumulator.samples + self.accumulator.left_out - before
                    bar.update(now - seen)
                    if max_samples is not None and now >= max_samples:
                        break
                    if tolerance is not None and epoch == 0 and self._known_well_enough(tolerance, bar):
                        return
                else:
                    if not epoch and not self.accumulator.samples + self.accumulator.left_out:
                        raise TooFewSamplesError("the loader yielded no batch: it is empty, or exhausted already")

    def _batch(self, batch: Any, limit: int | None) -> None:
        self.class_order.add(batches.targets(batch))
        try:
            for forward in self._calls:
                forward(batch, limit)
        except BaseException:
            self.accumulator.discard()
            raise
        if not self.accumulator.observing:
            raise LayerError(
                nothing_ran({k: v for recorder in self._recorders.values() for k, v in recorder.skipped.items()})
            )
        self.accumulator.step()

    def _known_well_enough(self, tolerance: float, bar: Any) -> bool:
        """A look at the standard errors, when one is due: the only place in the loop that waits for the device."""
        if self.accumulator.minibatches < self._next_look:
            return False
        self._next_look = int(self.accumulator.minibatches * LOOK_RATIO) + 1
        largest = self.accumulator.largest_stderr()
        bar.set_postfix_str(f"largest stderr {largest:.2g}")
        if largest < tolerance:
            self.stopped = f"every standard error was below {tolerance} after {self.accumulator.samples} samples"
            return True
        return False


def _length(loader: Iterable[Any], epochs: int, max_samples: int | None) -> int | None:
    """How many samples a run will see, None where the loader does not say."""
    dataset = getattr(loader, "dataset", None)
    sampler = getattr(loader, "sampler", None)
    try:
        samples: int | None = len(cast(Any, sampler if sampler is not None else dataset))
    except TypeError:
        samples = None
    if isinstance(loader, Sequence):
        counts = [batches.sample_count(batch) for batch in loader]
        samples = None if None in counts else sum(cast(list[int], counts))
    if samples is None:
        return None if max_samples is None else max_samples * epochs
    return min(samples, max_samples or samples) * epochs


def _finished(
    accumulator: CKAAccumulator,
    recorders: Mapping[str, LayerRecorder],
    models: Mapping[str, nn.Module],
    settings: dict[str, Any],
    run: _Run,
) -> CKAResult:
    skipped = {
        (f"{name}/" if name else "") + layer: reason
        for name, recorder in recorders.items()
        for layer, reason in recorder.skipped.items()
    }
    if run.stopped is not None:
        settings["stopped"] = run.stopped
    run.class_order.warn()

    def with_details(result: CKAResult) -> CKAResult:
        return dataclasses.replace(
            result,
            skipped={**skipped, **result.skipped},
            settings={**result.settings, **settings},
            models=tuple(name for name in models if name),
        )

    try:
        return with_details(accumulator.compute())
    except NonFiniteError as error:
        if error.partial is not None:
            error.partial = with_details(error.partial)
        raise


def _spelled(option: Any) -> Any:
    """How an option stands in a result's settings."""
    if option is None or isinstance(option, str | int | float | bool):
        return option
    if isinstance(option, Mapping):
        return {str(key): _spelled(value) for key, value in option.items()}
    if isinstance(option, type) or callable(option):
        return f"{getattr(option, '__module__', '?')}.{getattr(option, '__qualname__', type(option).__qualname__)}"
    return [_spelled(item) for item in option]
