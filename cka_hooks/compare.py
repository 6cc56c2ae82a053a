"""`compare`: models and a loader in, a result out; the loop itself is in `loop`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cka_hooks.errors import LayerError, NonFiniteError, OptionError
from cka_hooks.features import Reduction
from cka_hooks.hsic import MIN_SAMPLES, Estimator
from cka_hooks.recording import batches
from cka_hooks.recording.guest import RandomStream
from cka_hooks.recording.layers import Layers, select_layers, unwrap
from cka_hooks.recording.recorder import LayerRecorder
from cka_hooks.results.result import CKAResult
from cka_hooks.run import in_turn as many
from cka_hooks.run.checkpoint import Keeper, of_loader, of_model, path_of_rank
from cka_hooks.run.class_order import ClassOrder
from cka_hooks.run.loop import DONE, Bounds, Report, Run, warn_of_repetition
from cka_hooks.run.ranks import Ranks, is_sharded, told
from cka_hooks.similarity.accumulator import CKAAccumulator


def compare(
    model: nn.Module | Mapping[str, nn.Module | Callable[[], nn.Module]],
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
    seed: int = 0,
    keep_minibatches: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 30.0,
    distributed: bool | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> CKAResult:
    """CKA of every pair of layers of one or several models, in one pass over a loader.

    The models run in eval mode, without gradients, on the device they are on. Afterwards they and torch's
    random state are as they were, whether the run ended, raised or was interrupted.

    Args:
        model: one model, or a mapping from names to models, whose layers are then ``name/layer``. An entry may be
            a function that builds a model: see below.
        loader: yields ``(input, target)`` pairs, tensors, or dicts of keyword arguments; see
            :func:`cka_hooks.recording.batches.arguments`. Shuffle it where classes are stored in order.
        layers: which layers, see :func:`cka_hooks.recording.layers.select_layers`; or a mapping from model name to
            that.
        kernel: see :class:`CKAAccumulator`, as `bandwidth`, `sigma`, `estimator`, `minibatch`, `seed` and
            `keep_minibatches`.
        features: see :class:`LayerRecorder`, as `batch_dim`.
        forward: ``(model, batch) -> anything`` where the default call does not fit, or a mapping from model
            name to that: two names for one model with different `forward` compare two views of the data.
        tolerance: end the run once every standard error off the diagonal is below it. Looked at first after
            30 minibatches, then at geometric intervals.
        max_samples: end the run after this many samples.
        epochs: passes over the loader. Later passes of a shuffled loader are other minibatches of the same
            samples: standard errors stay those of one pass, and `tolerance` looks at one pass's worth.
        checkpoint: a file in which the run is kept, every `checkpoint_every` seconds and when an error or
            Ctrl-C ends it. The same call again goes on from there, and after the end returns the result at once.
            Several ranks keep a file each, ``NAME.rank0-of-2`` and so on.
        distributed: None: share the work with the initialised process group, if there is one. Every rank calls
            `compare` with its shard of the data and gets the same result. False: this rank runs alone; a call
            that only one rank makes needs it, since it would wait for the others without end.
        group: the process group to share with. Ranks that hold the same samples (tensor parallel) must not be in
            one group: name the data-parallel one, or their samples count twice.
        progress: show a progress bar on stderr.

    Functions in the mapping are called one after another. Each model goes over the whole loader alone and is
    freed before the next is built, so that twenty checkpoints of a network need the memory of one of them and
    about ``samples * (minibatch - 1) / 2 * 8`` bytes for each layer of each model: its centred Gram matrices. All
    pairs are compared at the end. The loader has to bring the same batches each time, which is checked. An entry
    of `layers` has to match in each of these models; `tolerance` and `checkpoint` need all models at once.

    Samples that a ``DistributedSampler`` repeats so that all ranks have equally many are left out. Positions of
    samples and numbers of minibatches count rank after rank: those of rank 1 follow those of rank 0.

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
        OutOfMemoryError: in a layer, also in smaller pieces.
        CheckpointError: the file at `checkpoint` is damaged, or of a run with another model or other options.
        RankError: another rank failed, was stopped, or does not answer.

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
    options: dict[str, Any] = {
        "kernel": kernel,
        "bandwidth": bandwidth,
        "sigma": sigma,
        "estimator": estimator,
        "minibatch": minibatch,
        "seed": seed,
        "keep_minibatches": keep_minibatches,
    }
    accumulator = CKAAccumulator(**options)
    plan = _Plan(
        models,
        {
            "layers": layers,
            "features": features,
            "batch_dim": batch_dim,
            "forward": forward,
            "tolerance": tolerance,
            "max_samples": max_samples,
            "epochs": epochs,
        },
        options,
    )
    ranks = Ranks.of(distributed, group)
    started = time.perf_counter()
    with told(ranks, accumulator), RandomStream(), torch.no_grad():
        if all(isinstance(it, nn.Module) for it in models.values()):
            ran = plan.together(loader, accumulator, ranks, checkpoint, checkpoint_every, progress)
        else:
            ran = plan.in_turn(loader, accumulator, ranks, checkpoint, progress)
    settings = {
        "models": {name or "model": kind for name, kind in ran.types.items()},
        **{name: _spelled(option) for name, option in plan.options.items() if name not in ("batch_dim", "forward")},
        "seconds": round(time.perf_counter() - started, 3),
    }
    if ranks is not None:
        settings["ranks"] = ranks.size
    return _finished(ran, settings)


@dataclass
class _Ran:
    """What a run leaves behind."""

    total: CKAAccumulator
    reports: list[Report]
    class_order: ClassOrder
    types: dict[str, str]


class _Plan:
    """Which models are run with which options, all of them at once or one after another."""

    def __init__(self, models: Mapping[str, Any], options: dict[str, Any], accumulated: dict[str, Any]) -> None:
        self.options = options
        self._models = models
        self._accumulated = accumulated
        self._layers = _per_model(options["layers"], models, "layers")
        self._forwards = _per_model(options["forward"], models, "forward")
        self._bounds = Bounds(options["epochs"], options["max_samples"], options["tolerance"])

    def together(
        self,
        loader: Iterable[Any],
        accumulator: CKAAccumulator,
        ranks: Ranks | None,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: float,
        progress: bool,
    ) -> _Ran:
        """Each batch through every model before the next batch."""
        layers = self._layers
        if len(self._models) > 1 and not isinstance(self.options["layers"], Mapping):
            layers = _each_where_it_matches(self._models, self.options["layers"])
        recorders = self._recorders(self._models, layers, accumulator)
        if checkpoint is not None and any(is_sharded(model) for model in self._models.values()):
            raise OptionError(
                "checkpoint= does not work with a model whose ranks run each forward pass together (FSDP, tensor "
                "parallel): they would have to be stopped between the same two batches. Leave it out"
            )
        settings = {}
        if checkpoint is not None:
            settings = {
                "models": {name: of_model(model) for name, model in self._models.items()},
                "loader": of_loader(loader),
                **{name: _spelled(option) for name, option in (self._accumulated | self.options).items()},
                "chosen": {
                    name: [selection.name for selection in select_layers(model, layers[name])]
                    for name, model in self._models.items()
                },
            }
        path = checkpoint if checkpoint is None else path_of_rank(checkpoint, ranks)
        keeper = Keeper(path, checkpoint_every, loader, settings)
        run = Run(recorders, self._forwards, accumulator, self._bounds, keeper, ranks)
        run.over(loader, progress=progress)
        types = {name: type(unwrap(model)).__qualname__ for name, model in self._models.items()}
        return _Ran(run.total, run.reports, run.class_order, types)

    def in_turn(
        self,
        loader: Iterable[Any],
        accumulator: CKAAccumulator,
        ranks: Ranks | None,
        checkpoint: object,
        progress: bool,
    ) -> _Ran:
        """All batches through one model before the next model is built."""
        if checkpoint is not None or self._bounds.tolerance is not None:
            raise OptionError(
                "checkpoint= and tolerance= need all models at once, and functions build them one after another: "
                "leave these out, or pass the models themselves"
            )
        ran = _Ran(accumulator, [], ClassOrder(), {})
        replayed = many.Replayed(loader)
        collectors: dict[str, many.Collector] = {}
        for name, model in many.built_in_turn(self._models):
            collectors[name] = many.Collector(**self._accumulated)
            recorders = self._recorders({name: model}, self._layers, collectors[name])
            keeper = Keeper(None, 0, replayed, {})
            run = Run(recorders, self._forwards, collectors[name], self._bounds, keeper, alone=ranks is None)
            run.over(replayed.rewind(name), progress=progress, name=name)
            ran.reports += run.reports
            ran.class_order = run.class_order
            ran.types[name] = type(unwrap(model)).__qualname__
            # The next one is built when nothing holds this one any more.
            del model, recorders, run
        many.add_up(collectors, accumulator)
        if ranks is not None:
            ran.total, others, _ = ranks.meet(accumulator, stage=DONE, details=ran.reports)
            ran.reports = [report for reports in others for report in reports]
        return ran

    def _recorders(
        self, models: Mapping[str, nn.Module], layers: Mapping[str, Any], accumulator: CKAAccumulator
    ) -> dict[str, LayerRecorder]:
        recorders = {}
        for name, model in models.items():
            prefix = f"{name}/" if name else ""

            recorders[name] = LayerRecorder(
                model,
                layers[name],
                consumer=_Prefixed(accumulator, prefix) if prefix else accumulator.observe,
                features=self.options["features"],
                batch_dim=self.options["batch_dim"],
            )
            # Two names may stand for one model, or for models that share a part.
            recorders[name].only_in_passes = True
        return recorders


class _Prefixed:
    """`accumulator.observe` for one of several models."""

    def __init__(self, accumulator: CKAAccumulator, prefix: str) -> None:
        self._accumulator = accumulator
        self._prefix = prefix

    def __call__(self, layer: str, activation: Tensor) -> None:
        self._accumulator.observe(self._prefix + layer, activation)

    def slot(self, layer: str) -> Callable[[Tensor], None] | None:
        return self._accumulator.slot(self._prefix + layer)


def _per_model(option: Any, models: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An option for each model, given once for all or as a mapping from model name."""
    if not isinstance(option, Mapping):
        return dict.fromkeys(models, option)
    unknown = [key for key in option if key not in models]
    if unknown:
        raise OptionError(f"{name}= names the models {unknown}, and the models are {list(models)}")
    return {key: option.get(key) for key in models}


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


def _finished(ran: _Ran, settings: dict[str, Any]) -> CKAResult:
    report = Report()
    for other in ran.reports:
        report = report.merged(other)
    if report.stopped is not None:
        settings["stopped"] = report.stopped
    ran.class_order.warn()
    warn_of_repetition(ran.reports)

    def with_details(result: CKAResult) -> CKAResult:
        return dataclasses.replace(
            result,
            skipped={**report.skipped, **result.skipped},
            settings={**result.settings, **settings, "shapes": report.shapes},
            models=tuple(name for name in ran.types if name),
        )

    try:
        return with_details(ran.total.compute())
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
