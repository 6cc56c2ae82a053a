"""`Comparison`: compare models one batch at a time, with everything that a result needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cka_hooks.errors import LayerError, ModelError, OptionError
from cka_hooks.features import Reduction
from cka_hooks.hsic import Estimator
from cka_hooks.names import labelled
from cka_hooks.options import Options, whole
from cka_hooks.recording import batches
from cka_hooks.recording.guest import RandomStream, untouched
from cka_hooks.recording.layers import Layers, check_model, refuse_weights, select_layers, unwrap
from cka_hooks.recording.padding import MaskOption
from cka_hooks.recording.positions import Positions
from cka_hooks.recording.recorder import LayerRecorder, nothing_ran
from cka_hooks.results.result import CKAResult
from cka_hooks.run import replay
from cka_hooks.run.checkpoint import UNEXPECTED
from cka_hooks.run.joined import JoiningAccumulator
from cka_hooks.run.precomputed import Identifier, Precomputed, SampleIds, is_features, without_ids
from cka_hooks.run.seen import Seen, finished
from cka_hooks.similarity.accumulator import CKAAccumulator
from cka_hooks.similarity.batch import Step
from cka_hooks.similarity.state import State


class Comparison:
    """CKA of every pair of layers of one or several models, one batch at a time.

    :func:`cka_hooks.compare` is a loop over one of these. Use it as a context manager in your own loop or in a
    callback. Inside the block, hooks are on and the models are in eval mode. Afterwards the models are as they were.

    Args:
        model: one model, or a mapping from names to models and precomputed features. Layers are then ``name/layer``.
        layers: see :func:`cka_hooks.compare`, like all options here.

    Attributes:
        entries: models and precomputed features by name.
        models: the entries that are models.
        types: the class of each entry by its name.
        positions: chooses the positions that are samples; None if samples are whole inputs.
        seen: what is known of the samples so far.
        steps: what each batch added, on the CPU, and None where another pass begins, if you put a list here.

    Raises:
        LayerError: an entry of `layers` matches nothing.
        ModelError: hooks cannot see into a model.
        OptionError: an option has an invalid value.

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
        join_batches: int | None = None,
        per: str = "sample",
        positions: int | None = None,
        seed: int = 0,
        keep_minibatches: bool = False,
        permutations: int = 0,
    ) -> None:
        self._options = Options.of(locals())
        self.entries = named_models(model)
        self.models = {name: check_model(it) for name, it in self.entries.items() if not is_features(it)}
        self.types = {name: type(unwrap(it)).__qualname__ for name, it in self.entries.items()}
        self.steps: list[Step | None] | None = None
        self.positions = Positions(self._options.positions, self._options.seed) if per == "position" else None
        given = {name: it for name, it in self.entries.items() if isinstance(it, Precomputed)}
        self.seen = Seen(given, self._options.sample_ids, self.positions is not None)
        # Recorders reduce features.
        product = self._options.arguments_of(CKAAccumulator)
        product |= {"features": "flatten", "minibatch": self._options.minibatch or self._options.join_batches}
        self._accumulator = JoiningAccumulator(self._options.join_batches, **product)
        if self.positions is not None:
            self.positions.is_shared = True
            if given:
                raise OptionError(f'{next(iter(given))!r} has a row for each sample: compare it with per="sample"')
        chosen = layers_of(self.models, layers)
        self._forwards = per_model(forward, self.models, "forward")
        shared = self._options.arguments_of(LayerRecorder) | {"positions": self.positions}
        self._recorders: dict[str, LayerRecorder] = {}
        for name, one in self.models.items():
            own = shared | {"layers": chosen[name], "forward": self._forwards[name]}
            self._recorders[name] = recorder = LayerRecorder(one, consumer=_Labelled(name, self._accumulator), **own)
            # Two names may stand for the same model, or for models that share a part.
            recorder.only_in_passes = True
        self.chosen = {name: recorder.chosen for name, recorder in self._recorders.items()}
        self._random = RandomStream()
        self._guests = ExitStack()
        self._within = False
        self._ran = False

    @classmethod
    def of(cls, models: Mapping[str, Any], options: Options) -> Comparison:
        """A comparison of models by name, "" for one without."""
        return cls(models.get("", models), **options.arguments_of(cls))

    def __enter__(self) -> Comparison:
        try:
            for name, recorder in self._recorders.items():
                for guest in (untouched(self.models[name]), recorder):
                    # Each leaves twice, since Ctrl-C may cut the first attempt short.
                    self._guests.push(guest)
                    self._guests.push(guest)
                    guest.__enter__()
            self._within = True
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        self._within = False
        try:
            self._accumulator.discard()
            self._guests.close()
        finally:
            self._guests.close()

    def update(self, batch: Any) -> int:
        """Run every model on a batch and add it; with `join_batches`, as soon as there are enough samples.

        Args:
            batch: a batch as a loader yields it: ``(input, target)``, a tensor, or a dict of keyword arguments.

        Returns:
            The number of samples that were counted.

        Raises:
            OptionError: the call is outside of the ``with`` block.
            BatchError: a model cannot be called with the batch.
            LayerError: of some model, none of the chosen layers ran.
            SampleCountError: two models, or two layers, have different numbers of samples.
            OutOfMemoryError: memory does not suffice. Nothing was added; you can continue with the next batch.
        """
        samples = self._accumulator.samples
        if self.observe(batch):
            self.step()
        return self._accumulator.samples - samples

    def observe(self, batch: Any, *, limit: int | None = None, drawn: Sequence[Identifier] | None = None) -> bool:
        """The first half of :meth:`update`: run every model on a batch. An error leaves nothing behind.

        Args:
            batch: as in :meth:`update`.
            limit: how many of its samples to count, from the first one on. With 0, the models see the whole batch.
            drawn: identifiers of its samples, if the loader tells them.

        Returns:
            Whether there is something to add. A batch without samples, as from a ``collate_fn`` that drops bad ones,
            is only counted.
        """
        if not self._within:
            raise OptionError("call update() inside the block: with Comparison(...) as comparison: ...")
        self.seen.fingerprint = replay.fingerprint(batch)
        if batches.is_empty(batch):
            self._accumulator.state.empty += 1
            return False
        self.seen.look_at(batch, self._accumulator.state, limit, drawn)
        number = self.seen.batches
        if self.positions is not None:
            self.positions.start(number)
        own = without_ids(batch, self._options.sample_ids)
        try:
            with self._random, torch.no_grad():
                for name, recorder in self._recorders.items():
                    before = self._accumulator.observing
                    given = own if self._forwards[name] is None else batch
                    recorder.run(given, limit=limit or None, number=number)
                    if self._accumulator.observing == before:
                        # Otherwise the result would compare only the other models, as if it had not been asked for.
                        of = f"of the model {name!r} " if name else ""
                        raise LayerError(of + nothing_ran(recorder.skipped))
            if limit == 0:
                self._accumulator.discard()
                return False
            for label, features in self.seen.features(self._accumulator.observing_samples):
                self._accumulator.observe(label, features)
            return True
        except BaseException:
            self._accumulator.discard()
            raise

    def step(self) -> None:
        """The second half of :meth:`update`: add what was observed."""
        self._keep(self._accumulator.step())
        self.seen.step(self._accumulator.state)
        self._ran = True

    def flush(self) -> None:
        """Add what still waits to be joined with further batches, as a smaller minibatch."""
        step = self._accumulator.flush()
        if step.samples:
            self._keep(step)

    def _keep(self, step: Step | None) -> None:
        if self.steps is not None:
            # A device has room for the next model, not for all these.
            self.steps.append(step and step._replace(groups=[group.cpu() for group in step.groups]))

    def start_pass(self) -> None:
        """Begin another pass over the same samples, in other minibatches. They are not new samples."""
        self._accumulator.start_pass()
        self.seen.start_pass()
        self._keep(None)

    def reset(self) -> None:
        """Forget everything that was added."""
        self._accumulator.reset()
        self.seen.start_pass()
        self.seen.batches = 0
        self._ran = False

    # Results

    @property
    def state(self) -> State:
        """Everything that was added, with what was skipped and why."""
        state = self._accumulator.state
        # A batch that was cut short has not called every layer.
        if self._ran:
            self._accumulator.skips(self._labelled("skipped"))
            state.shapes = {**{key: list(it) for key, it in self._labelled("shapes").items()}, **state.shapes}
            state.sample_axes = {**self._labelled("sample_axes"), **state.sample_axes}
        return state

    def _labelled(self, attribute: str) -> dict[str, Any]:
        """An attribute of recorders and precomputed features, under the layers' labels in the result."""
        return {
            labelled(name, layer): value
            for name, entry in {**self.entries, **self._recorders}.items()
            for layer, value in getattr(entry, attribute, {}).items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Provenance as a result has it: plain JSON values."""
        own = self._options.spelled(*self._options.arguments_of(Comparison))
        return {**own, "minibatch": self._accumulator.settings["minibatch"]}

    def compute(self) -> CKAResult:
        """The result so far. Nothing changes. What waits to be joined counts as one more, smaller minibatch.

        Raises:
            TooFewSamplesError: no minibatch had the 4 samples that an HSIC estimate needs.
            NonFiniteError: a layer has NaN or infinity. `.partial` has the result of all others.
        """
        self._accumulator.state = self.state
        return finished(self._accumulator.with_rest(), self.types, self.settings)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was added, as numbers, text and tensors: copies, safe to save and to send."""
        self._accumulator.state = self.state
        counted = [self.seen.batches, self.seen.row]
        return {**self._accumulator.state_dict(), "counted": counted, "random": self._random.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and forget what was added here before.

        Raises:
            OptionError: the state is from a comparison with other options, or from something else.
        """
        try:
            self._accumulator.load_state_dict(state)
            self.seen.start_pass()
            # Earlier versions have the samples of all passes in between.
            counted = [whole("counted", -1 if it is None else it, 0) for it in state.get("counted", (0, 0))]
            self.seen.batches, *_, self.seen.row = counted
            self._random.go_on_from(state.get("random", ()))
        except OptionError:
            raise
        except UNEXPECTED as error:
            raise OptionError(
                f"this is not the state of a comparison: its content is invalid ({error!r:.200})"
            ) from error

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """On every rank, become the sum of the comparisons of all ranks; see :meth:`CKAAccumulator.sync`.

        What waits to be joined becomes one smaller minibatch.
        """
        self.flush()
        self._accumulator.state = self.state
        self._accumulator.sync(group)

    def unsync(self) -> None:
        """Undo `sync`."""
        self._accumulator.unsync()


class _Labelled:
    """`CKAAccumulator.observe` for one of several models."""

    def __init__(self, name: str, accumulator: CKAAccumulator) -> None:
        self._name = name
        self._accumulator = accumulator

    def __call__(self, layer: str, activation: Tensor) -> None:
        self._accumulator.observe(labelled(self._name, layer), activation)

    def slot(self, layer: str) -> Callable[[Tensor], None] | None:
        """A function of one layer's features, see :meth:`CKAAccumulator.slot`."""
        return self._accumulator.slot(labelled(self._name, layer))


# The mapping that `compare` takes, and the options for each of its entries


def named_models(model: Any) -> dict[str, Any]:
    """The models by name, "" for a single one. Arrays in the mapping become `Precomputed`.

    Raises:
        OptionError: the mapping is empty, a name is not text, or features have no name.
        ModelError: an entry is a ``state_dict``, or text.
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
    refuse_weights(model)
    found: dict[str, Any] = {}
    for name, it in model.items():
        if isinstance(it, str | os.PathLike):
            raise ModelError(f"{name!r} is {it!r}: expected an nn.Module, or features, Precomputed.load({it!r})")
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


def layers_of(models: Mapping[str, nn.Module], layers: Any) -> dict[str, Any]:
    """The choice of layers for each model.

    Of one list for several models, each entry has to match in at least one of them, and each model needs a match.
    """
    if len(models) < 2 or layers is None or isinstance(layers, Mapping | str | type) or callable(layers):
        return per_model(layers, models, "layers")
    chosen: dict[str, list[Any]] = {name: [] for name in models}
    for entry in layers:
        failures: list[LayerError] = []
        for name, model in models.items():
            try:
                select_layers(model, [entry])
                chosen[name].append(entry)
            except LayerError as error:
                failures.append(error)
        if len(failures) == len(models):
            raise failures[0]
    for name, entries in chosen.items():
        if not entries:
            raise LayerError(f"none of layers={list(layers)!r} matches a layer of the model {name!r}")
    return chosen
