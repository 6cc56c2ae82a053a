"""`Comparison`: models, batches and an accumulator brought together, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cka_hooks.errors import LayerError, OptionError, SampleCountError, warn
from cka_hooks.features import Reduction
from cka_hooks.hsic import Estimator
from cka_hooks.options import Options, whole
from cka_hooks.recording import batches
from cka_hooks.recording.guest import RandomStream, untouched
from cka_hooks.recording.layers import Layers, select_layers, unwrap
from cka_hooks.recording.padding import MaskOption
from cka_hooks.recording.recorder import LayerRecorder, nothing_ran
from cka_hooks.results.result import CKAResult
from cka_hooks.run import class_order, replay
from cka_hooks.run.identity import of_model, of_rows
from cka_hooks.run.precomputed import Brought, Precomputed, SampleIds, is_features, without_ids
from cka_hooks.similarity.accumulator import CKAAccumulator
from cka_hooks.similarity.estimate import result_of
from cka_hooks.similarity.state import State, Step

_OWN_OPTIONS = ("layers", "features", "batch_dim", "channel_dim", "mask", "forward", "sample_ids")
# Batches of a pass that are known again.
_REMEMBERED = 256


class Comparison:
    """CKA of every pair of layers of one or several models, one batch at a time.

    :func:`cka_hooks.compare` is a loop over one of these. Use it as a context manager in a loop of your own, or in a
    callback: hooks are on, and the models in eval mode, inside the block. After it the models are as they were.

    Args:
        model: one model, or a mapping from names to models, whose layers are then ``name/layer``, and features that
            somebody else computed.
        layers: see :func:`cka_hooks.compare`, as all options here.

    Attributes:
        provenance: further settings of the results, plain JSON values.

    Raises:
        LayerError: an entry of `layers` that matches nothing.
        ModelError: a model that hooks cannot see into.
        OptionError: an option with a value that it cannot have.

    Example:
        >>> import torch
        >>> from cka_hooks import Comparison
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with Comparison(model, layers=["0", "2"]) as comparison:
        ...     for batch in torch.randn(4, 32, 16):
        ...         _ = comparison.update(batch)
        >>> result = comparison.compute()
        >>> result.layers, result.samples, result.minibatches
        (('0', '2'), 128, 4)
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module | Any],
        *,
        layers: Layers | Mapping[str, Layers] = None,
        kernel: str | Callable[[Tensor], Tensor] = "linear",
        bandwidth: float | None = None,
        sigma: float | None = None,
        estimator: Estimator = "unbiased",
        minibatch: int | None = None,
        features: Reduction | str | Mapping[str, Reduction | str] = "flatten",
        batch_dim: int | Mapping[str, int] | None = None,
        channel_dim: int | Mapping[str, int] | None = None,
        mask: MaskOption = None,
        forward: batches.Forward | Mapping[str, batches.Forward] | None = None,
        sample_ids: SampleIds | None = None,
        seed: int = 0,
        keep_minibatches: bool = False,
    ) -> None:
        self._options = Options(
            kernel=kernel,
            bandwidth=bandwidth,
            sigma=sigma,
            estimator=estimator,
            minibatch=minibatch,
            features=features,
            batch_dim=batch_dim,
            channel_dim=channel_dim,
            mask=mask,
            forward=forward,
            sample_ids=sample_ids,
            layers=layers,
            seed=seed,
            keep_minibatches=keep_minibatches,
        )
        entries = named_models(model)
        self._names = list(entries)
        self.models: dict[str, nn.Module] = {name: it for name, it in entries.items() if not is_features(it)}
        self._brought = Brought(
            {name: it for name, it in entries.items() if isinstance(it, Precomputed)}, self._options.sample_ids
        )
        self._accumulator = CKAAccumulator(
            kernel=kernel,
            bandwidth=bandwidth,
            sigma=sigma,
            estimator=estimator,
            minibatch=minibatch,
            seed=seed,
            keep_minibatches=keep_minibatches,
        )
        chosen = per_model(layers, self.models, "layers")
        if len(self.models) > 1 and not isinstance(layers, Mapping):
            chosen = _each_where_it_matches(self.models, layers)
        forwards = per_model(forward, self.models, "forward")
        self.chosen = {
            name: [selection.name for selection in select_layers(model, chosen[name])]
            for name, model in self.models.items()
        }
        self._with_ids = {name for name in self.models if forwards[name] is not None}
        self._recorders: dict[str, LayerRecorder] = {}
        for name, one in self.models.items():
            self._recorders[name] = LayerRecorder(
                one,
                chosen[name],
                consumer=_Labelled(name, self._accumulator),
                forward=forwards[name],
                **self._options.of_recorder(),
            )
            # Two names may stand for one model, or for models that share a part.
            self._recorders[name].only_in_passes = True
        self.provenance: dict[str, Any] = {}
        self._random = RandomStream()
        self._guests: list[AbstractContextManager[object]] = []
        self._within = False
        self._targets: Tensor | None = None
        self._fingerprints: set[str] = set()
        self._ran = False
        self._number = 0

    def __enter__(self) -> Comparison:
        try:
            for name, recorder in self._recorders.items():
                for guest in (untouched(self.models[name]), recorder):
                    self._guests.append(guest)
                    guest.__enter__()
            self._within = True
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        self._within = False
        try:
            _leave(self._guests)
        finally:
            # Ctrl-C may have broken off the first time; guests leave once, however often they are asked to.
            _leave(self._guests)
            self._guests = []

    def update(self, batch: Any) -> int:
        """Run every model on a batch, and add it.

        Args:
            batch: as a loader yields it: ``(input, target)``, a tensor, or a dict of keyword arguments.

        Returns:
            How many of its samples were counted.

        Raises:
            OptionError: outside of the ``with`` block.
            BatchError: a model that cannot be called with the batch.
            LayerError: none of the chosen layers ran.
            SampleCountError: two models, or two layers, with different numbers of samples.
            OutOfMemoryError: nothing was added; you can go on with the next batch.
        """
        samples = self._accumulator.samples
        if not self.passes_over(batch):
            self.observe(batch)
            self.step()
        return self._accumulator.samples - samples

    def passes_over(self, batch: Any) -> bool:
        """Whether a batch has no samples, as a ``collate_fn`` makes it that drops bad ones. Then it is counted."""
        empty = batches.is_empty(batch)
        self._accumulator.state.empty += empty
        return empty

    def observe(self, batch: Any, *, limit: int | None = None) -> None:
        """The first half of :meth:`update`: run every model on a batch. An error leaves nothing behind.

        Args:
            batch: as in :meth:`update`.
            limit: count only so many samples of it, the first ones. Of none the models see the batch whole, and it
                is to be discarded.
        """
        if not self._within:
            raise OptionError("call update() inside the block: with Comparison(...) as comparison: ...")
        self._look_at(batch)
        self._brought.look_at(batch, limit)
        number, self._number = self._number, self._number + 1
        observed: frozenset[str] = frozenset()
        silent: str | None = None
        own = without_ids(batch, self._options.sample_ids)
        try:
            with self._random, torch.no_grad():
                for name, recorder in self._recorders.items():
                    recorder.run(batch if name in self._with_ids else own, limit=limit or None, number=number)
                    before, observed = observed, self._accumulator.observing
                    if observed == before:
                        silent = name if silent is None else silent
            if self.models and not observed:
                raise LayerError(nothing_ran(self._labelled("skipped")))
            if silent is not None:
                # Else the result would compare the other models only, as if this one had not been asked for.
                raise SampleCountError(f"of the model {silent!r} {nothing_ran(self._recorders[silent].skipped)}")
            if limit == 0:
                return
            for label, features in self._brought.features(self._accumulator.observing_samples):
                self._accumulator.observe(label, features)
        except BaseException:
            self.discard()
            raise

    def step(self) -> Step:
        """The second half of :meth:`update`: add what was observed.

        Returns:
            What was added.
        """
        step = self._accumulator.step()
        self._brought.step()
        state = self._accumulator.state
        if len(state.classes) <= class_order.MOST_CLASSES:
            state.merge(class_order.counted(self._targets))
        self._ran = True
        return step

    def discard(self) -> None:
        """Forget what was observed since the last `step`."""
        self._accumulator.discard()

    def _look_at(self, batch: Any) -> None:
        """What is known of a batch before the models have it, which may change it in place."""
        self._targets = batches.targets(batch)
        fingerprint = replay.fingerprint(batch)
        state = self._accumulator.state
        if fingerprint.startswith("?"):
            return
        if not state.first_batches:
            state.first_batches = [fingerprint]
        if fingerprint in self._fingerprints and state.repeats is None:
            state.repeats = (
                "a batch came twice in one pass over the data, and its samples count twice: with an IterableDataset "
                "and several workers, each worker has to yield its own part (torch.utils.data.get_worker_info())"
            )
        # Workers that yield the same, and data that begin again, show in the first ones.
        if len(self._fingerprints) < _REMEMBERED:
            self._fingerprints.add(fingerprint)

    def check(self, loader: Iterable[Any]) -> None:
        """Refuse a loader whose order precomputed features without identifiers do not have.

        Raises:
            OptionError: it shuffles.
            SampleCountError: it has another number of samples than they have rows.
        """
        self._brought.check(loader)

    def end_pass(self) -> None:
        """The loader has no more batches.

        Raises:
            SampleCountError: precomputed features without identifiers have more rows.
        """
        self._brought.end_pass()

    def start_pass(self) -> None:
        """From here on come the samples seen before, in other minibatches: they are not new samples."""
        self._accumulator.start_pass()
        self._brought.start_pass()
        self._fingerprints.clear()

    def reset(self) -> None:
        """Forget everything that was added."""
        self._accumulator.reset()
        self._brought.start_pass()
        self._fingerprints.clear()
        self._ran = False

    # What was added up

    @property
    def state(self) -> State:
        """Everything that was added up, with what was skipped and why."""
        state = self._accumulator.state
        # A batch that broke off has not called every layer yet.
        if self._ran:
            self._accumulator.skips(self._labelled("skipped"))
            shapes = {**self._labelled("shapes"), **self._brought.shapes}
            state.shapes = {**{key: list(shape) for key, shape in shapes.items()}, **state.shapes}
            state.sample_axes = {**self._labelled("sample_axes"), **state.sample_axes}
        return state

    @state.setter
    def state(self, state: State) -> None:
        self._accumulator.state = state

    def _labelled(self, attribute: str) -> dict[str, Any]:
        """What the recorder of each model says of its layers, under the layers' labels."""
        return {
            _label(name, layer): value
            for name, recorder in self._recorders.items()
            for layer, value in getattr(recorder, attribute).items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Provenance as it stands in a result: plain JSON values."""
        return {**self._accumulator.settings, **self._options.spelled(*_OWN_OPTIONS)}

    @property
    def types(self) -> dict[str, str]:
        """The class of each model, by its name."""
        kinds = {name: type(unwrap(model)).__qualname__ for name, model in self.models.items()}
        return {name: kinds.get(name, Precomputed.__qualname__) for name in self._names}

    @property
    def identities(self) -> dict[str, Any]:
        """What tells its models and precomputed features from others."""
        rows = {name: of_rows(one.arrays, one.sample_ids) for name, one in self._brought.entries.items()}
        return {**{name: of_model(model) for name, model in self.models.items()}, **rows}

    def compute(self) -> CKAResult:
        """The result so far; nothing changes.

        Raises:
            TooFewSamplesError: no minibatch had the 4 samples an HSIC estimate needs.
            NonFiniteError: NaN or infinity in a layer; `.partial` is the result of all others.
        """
        return finished(self.state, self.types, {**self.settings, **self.provenance})

    def state_dict(self) -> dict[str, Any]:
        """All that was added, as numbers, text and float64 tensors: copies, safe to save and to send."""
        self._accumulator.state = self.state
        return {**self._accumulator.state_dict(), "row": self._brought.row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state_dict` gave, whatever was added here before.

        Raises:
            OptionError: it is from a comparison with other options, or from something else.
        """
        row = whole("row", state.get("row", 0) if isinstance(state, Mapping) else 0, 0) or 0
        self._accumulator.load_state_dict(state)
        self._brought.start_pass()
        self._brought.row = row

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Become the sum of the comparisons of all ranks of a process group; see :meth:`CKAAccumulator.sync`."""
        self._accumulator.state = self.state
        self._accumulator.sync(group)

    def unsync(self) -> None:
        """Undo `sync`."""
        self._accumulator.unsync()


def finished(state: State, types: Mapping[str, str], settings: Mapping[str, Any]) -> CKAResult:
    """The result of a run, with warnings about the order and repetition of samples.

    Args:
        state: what it added up.
        types: the class of each model by its name, "" for one model without a name.
        settings: further provenance, plain JSON values.
    """
    class_order.warn_of_order(state)
    if state.repeats is not None:
        warn(state.repeats)
    if state.empty:
        warn(
            f"{state.empty} batches without samples were skipped: None, an empty list, or tensors without rows, as "
            "from a collate_fn that drops every sample of a batch"
        )
    same = max((state.first_batches.count(first) for first in state.first_batches), default=0)
    if same > 1:
        warn(
            f"{same} ranks have the same first batch, so that their samples count that often: give the loader a "
            "DistributedSampler, name the ranks with different samples by group=, or run each rank alone with "
            "distributed=False"
        )
    models = {name or "model": kind for name, kind in types.items()}
    return result_of(state, {"models": models, **settings}, tuple(name for name in types if name))


def named_models(model: Any) -> dict[str, Any]:
    """The models by name, "" for one without; features that somebody brings are each a `Precomputed`.

    Raises:
        OptionError: an empty mapping, a name that is not text, or features without a name.
    """
    if not isinstance(model, Mapping):
        if is_features(model):
            raise OptionError("precomputed features need a name: pass a mapping, such as {'V4': array}")
        return {"": model}
    if not model:
        raise OptionError("the mapping of models is empty: name at least one model")
    for name in model:
        if not isinstance(name, str) or not name:
            raise OptionError(f"the name of a model is {name!r}: names are text, such as {{'epoch {name}': model}}")
    found: dict[str, Any] = {}
    for name, it in model.items():
        try:
            found[name] = Precomputed(it) if is_features(it) and not isinstance(it, Precomputed) else it
        except OptionError as error:
            raise OptionError(f"{name!r}: {error}") from error
    return found


def per_model(option: Any, models: Mapping[str, Any], name: str) -> dict[str, Any]:
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


def _label(name: str, layer: str) -> str:
    return f"{name}/{layer}" if name else layer


class _Labelled:
    """`CKAAccumulator.observe` for one of several models."""

    def __init__(self, name: str, accumulator: CKAAccumulator) -> None:
        self._name = name
        self._accumulator = accumulator

    def __call__(self, layer: str, activation: Tensor) -> None:
        self._accumulator.observe(_label(self._name, layer), activation)

    def slot(self, layer: str) -> Callable[[Tensor], None] | None:
        """What takes the features of one layer, see :meth:`CKAAccumulator.slot`."""
        return self._accumulator.slot(_label(self._name, layer))


def _leave(guests: Sequence[AbstractContextManager[object]]) -> None:
    """All of them, whatever one of them raises, the last one first."""
    if guests:
        try:
            guests[-1].__exit__(None, None, None)
        finally:
            _leave(guests[:-1])
