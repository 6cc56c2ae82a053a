"""`TrainingCKA`: compare the layers of a network in training with what they were, over a fixed loader."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import ModelError, NonFiniteError, OptionError, warn
from cka_hooks.features import Reduction
from cka_hooks.hsic import Estimator
from cka_hooks.options import Options, difference, whole
from cka_hooks.recording.batches import Forward
from cka_hooks.recording.guest import Snapshot, is_sharded
from cka_hooks.recording.layers import Layers, check_model
from cka_hooks.recording.padding import MaskOption
from cka_hooks.results.result import CKAResult
from cka_hooks.run.checkpoint import UNEXPECTED
from cka_hooks.run.comparison import Comparison, named_models, per_model
from cka_hooks.run.loop import refuse_other_positions
from cka_hooks.run.precomputed import SampleIds
from cka_hooks.run.replay import Randomness, Replayed
from cka_hooks.run.seen import finished
from cka_hooks.similarity.batch import Minibatches, Step
from cka_hooks.similarity.state import DECLARED, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The names in results for the network itself, its initial weights, and those of the previous measurement.
NOW, INITIAL, PREVIOUS = "now", "initial", "previous"

# What a network adds to a comparison, as the checkpoint of a trainer has it, so that it can be compared later without
# the network: its sums, the centred Gram matrices of each batch, its class, and the settings of its run.
Part = dict[str, Any]


class TrainingCKA:
    """CKA of a network in training with its initial weights, with the previous measurement, and with other networks.

    Each measurement is one pass over the loader in eval mode. Modes, buffers, gradients, random states, and what
    metrics in the network have accumulated are then as before, so the network trains to the same weights, to the bit.
    Between two measurements, centred Gram matrices are kept on the CPU, and no copies of weights: about ``samples *
    minibatch * 4`` bytes for each layer, three times, and once more for each other network.

    Args:
        loader: batches that are the same each time, a few hundred samples: a separate `DataLoader`, or a list.
        layers: which layers to compare, see :func:`cka_hooks.compare`, or a mapping to that from ``now`` and the
            names of the other networks. Each layer is a curve in the log, so choose a few.
        network: another network to compare with, such as a teacher, or several by name. It is measured once.
        every_n_epochs: how often to measure if `every_n_steps` is None.
        every_n_steps: measure after this many optimizer steps, instead of after epochs.
        folder: where to save results; by default a folder `name` in the folder of the trainer's logs.
        name: the prefix of the names in the log.
        forward: ``(model, batch) -> anything`` if the default call does not fit, or a mapping as for `layers`.
        kernel: see :func:`cka_hooks.compare`, like all further options.

    Attributes:
        result: the latest result. Its models are ``now``, ``initial``, ``previous``, and the given networks.

    Raises:
        OptionError: an option has an invalid value, or the loader can be iterated only once.
        ModelError: hooks cannot see into another network.

    Example:
        >>> import torch
        >>> from cka_hooks.integrations import TrainingCKA
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> cka = TrainingCKA(torch.randn(4, 64, 8), layers=["0", "2"])
        >>> cka.start(model)
        >>> _ = torch.nn.init.normal_(model[2].weight)  # a step of training
        >>> result = cka.measure(model, step=1)
        >>> result["now/0", "initial/0"], result["now/2", "initial/2"] < 0.9
        (1.0..., True)
        >>> sorted(cka.scalars())
        ['cka/initial/0', 'cka/initial/2', 'cka/previous/0', 'cka/previous/2']
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        layers: Layers | Mapping[str, Layers] = None,
        network: nn.Module | Mapping[str, nn.Module] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        name: str = "cka",
        forward: Forward | Mapping[str, Forward] | None = None,
        kernel: str | Callable[[Tensor], Tensor] = "linear",
        bandwidth: float | None = None,
        sigma: float | None = None,
        estimator: Estimator = "unbiased",
        minibatch: int | None = None,
        features: Reduction | str = "flatten",
        batch_dim: int | Mapping[str, int] | None = None,
        channel_dim: int | Mapping[str, int] | None = None,
        mask: MaskOption = None,
        sample_ids: SampleIds | None = None,
        join_batches: int | None = None,
        per: str = "sample",
        positions: int | None = None,
        seed: int = 0,
    ) -> None:
        # Refused now rather than after training has begun.
        self._options = Options.of(locals())
        networks = {"network": network} if isinstance(network, nn.Module) else network
        given = {} if networks is None else named_models(networks)
        if taken := given.keys() & {NOW, INITIAL, PREVIOUS}:
            raise OptionError(
                f"network= has the name {taken.pop()!r}, which results use themselves: choose another one"
            )
        self._given = {name: check_model(it) for name, it in given.items()}
        self._layers = per_model(layers, {NOW: None, **given}, "layers")
        self._forwards = per_model(forward, {NOW: None, **given}, "forward")
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        self.every_n_steps = whole("every_n_steps", every_n_steps, 1)
        self.folder = None if folder is None else Path(folder)
        self.name = name
        self.result: CKAResult | None = None
        self._loader = loader
        self._batches = Replayed(loader)
        self._then: dict[str, Part] = {}
        self._networks: dict[str, Part] = {}
        self._last: int | None = None

    def start(self, model: nn.Module, step: int = 0, prepare: Callable[[Any], Any] | None = None) -> None:
        """Take the weights as the initial ones, unless :meth:`load_state_dict` has restored those of a resumed run.

        Args:
            model: the network before its first step.
            step: number of steps so far.
            prepare: converts a batch before the network gets it, for example to another dtype.

        Raises:
            ModelError: the weights are spread over several processes.
            CKAError: the network cannot be measured; see :func:`cka_hooks.compare`.
        """
        self.refuse_sharded(model)
        self._networks = {name: self._measured(network, name) for name, network in self._given.items()}
        now = self._measured(model, prepare=prepare)
        if step == 0 or not self._then:
            if step:
                warn(
                    f"this run goes on from step {step}, and its checkpoint has no CKA of the initial weights: "
                    f"{INITIAL!r} are those of step {step}"
                )
            self._then = {INITIAL: now, PREVIOUS: now}
        # Show mistakes now and not after an epoch.
        self._compared(now, step)
        self._last = step

    @staticmethod
    def refuse_sharded(model: nn.Module) -> None:
        """Refuse a network that one process cannot run alone. Call this on all processes, or the others wait.

        Raises:
            ModelError: the weights are spread over several processes.
        """
        if is_sharded(model):
            raise ModelError(
                "the weights of this network are spread over several processes (FSDP, tensor parallel), and one "
                "measures it: leave the callback out, and compare saved checkpoints with cka_hooks.compare()"
            )

    def due(self, step: int, epoch: int | None = None) -> bool:
        """Whether it is time to measure.

        Args:
            step: number of steps so far.
            epoch: number of epochs so far, if one has just ended.
        """
        if not self._then or step == self._last:
            return False
        if self.every_n_steps is not None:
            return epoch is None and step % self.every_n_steps == 0
        return epoch is not None and epoch % self.every_n_epochs == 0

    def measure(self, model: nn.Module, step: int, prepare: Callable[[Any], Any] | None = None) -> CKAResult | None:
        """Measure over one pass: CKA with the initial weights, the previous measurement, and the given networks.

        Training continues whatever happens here: an error becomes a warning.

        Args:
            model: the network as it is now.
            step: number of steps so far. It names the saved result and is in its settings.
            prepare: see :meth:`start`.

        Returns:
            The result; None if there is none. If a layer is NaN or infinite, the result has all other layers.
        """
        self._last, self.result = step, None
        try:
            now = self._measured(model, prepare=prepare)
            try:
                self.result = self._compared(now, step)
                self._then = {**self._then, PREVIOUS: now}
            except NonFiniteError as error:
                self.result = error.partial
                warn(f"CKA at step {step}: {error}")
            if self.result is not None and self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.result.save(self.folder / f"step-{step:08d}.json")
        except Exception as error:
            warn(f"CKA at step {step}: {type(error).__name__}: {error}")
        return self.result

    def scalars(self) -> dict[str, float]:
        """CKA of each layer with itself at another time, by its name in the log: ``cka/initial/fc``.

        With another network, this is the CKA with the layer of the same name; if there is none, the largest one.
        """
        found: dict[str, float] = {}
        for other, block in self._with_others():
            for row, values in zip(block.rows, block.matrix, strict=True):
                layer = block.layer_of(row)
                same = f"{other}/{layer}"
                value = block[row, same] if same in block.columns else float(values.nan_to_num(-math.inf).max())
                if math.isfinite(value):
                    # Not every logger accepts "relu#2" as a name.
                    found[f"{self.name}/{other}/{layer.replace('#', '-')}"] = value
        return found

    def log_pictures(self, log: Callable[[str, Figure], object]) -> None:
        """Log the picture of each block of the result under its name, if matplotlib is installed.

        If a picture cannot be drawn or logged, you get a warning.
        """
        try:
            from matplotlib.figure import Figure

            for other, block in self._with_others():
                figure = Figure(figsize=(6, 5), layout="constrained")
                block.plot(ax=figure.add_subplot())
                log(f"{self.name}/{other}", figure)
        except Exception as error:
            warn(f"no picture in the log: {type(error).__name__}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values and float64 tensors; empty before :meth:`start`."""
        return {"batches": list(self._batches.known), **self._then} if self._then else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            OptionError: this is anything else.
        """
        if state:
            try:
                then = {name: state[name] for name in (INITIAL, PREVIOUS)}
                for part in then.values():
                    _named(part, NOW)
                self._then, self._batches.known = then, list(state["batches"])
            except OptionError:
                raise
            except UNEXPECTED as error:
                raise OptionError(
                    f"this is not the CKA of a network in training: {type(error).__name__} {error}"
                ) from error

    def _with_others(self) -> Iterator[tuple[str, CKAResult]]:
        if self.result is not None:
            there = {self.result.model_of(label) for label in self.result.rows}
            for other in self.result.models:
                if other != NOW and there >= {NOW, other}:
                    yield other, self.result.between(NOW, other)

    def _measured(self, model: nn.Module, name: str = NOW, prepare: Callable[[Any], Any] | None = None) -> Part:
        randomness, snapshot = Randomness(self._loader), Snapshot(model)
        before = randomness.state()
        try:
            own = replace(self._options, layers=self._layers[name], forward=self._forwards[name])
            batches: Iterable[Any] = self._batches.rewind(name)
            with torch.no_grad():
                return _part(Comparison.of({"": model}, own), map(prepare, batches) if prepare else batches)
        finally:
            randomness.restore(before)
            snapshot.restore()

    def _compared(self, now: Part, step: int) -> CKAResult:
        """The result of all networks, as if they had run together.

        Raises:
            OptionError: the networks were measured with different options.
            SampleCountError: they were measured on different numbers of samples, or other positions.
            NonFiniteError: a layer has NaN or infinity. `.partial` has the result of all others.
        """
        parts = {NOW: now, **self._then, **self._networks}
        options = now["settings"].keys() - {"layers", "forward"}
        for name, part in parts.items():
            ours, theirs = ({option: it["settings"].get(option) for option in options} for it in (now, part))
            if ours != theirs:
                found = difference(ours, theirs, where=("now", f"for {name!r}"))
                raise OptionError(f"{found}: go on with the options of the run that wrote the checkpoint")
        refuse_other_positions({name: part.get("places") for name, part in parts.items()})
        named = {name: _named(part, name) for name, part in parts.items()}
        states = {name: its for name, (its, _) in named.items()}
        steps = {name: its for name, (_, its) in named.items()}
        types = {name: part["type"] for name, part in parts.items()}
        return finished(State.joined(states, steps, Options()), types, {**now["settings"], "step": step})


def _part(comparison: Comparison, loader: Iterable[Any]) -> Part:
    """What a comparison's network adds in one pass over a loader."""
    steps: list[Any] = []
    comparison.steps = steps
    with comparison:
        for batch in loader:
            comparison.update(batch)
        comparison.flush()
    (kind,) = comparison.types.values()
    return {
        "state": comparison.state.to("cpu").state_dict(),
        "steps": [
            {**step._asdict(), "groups": [{**it._asdict(), "layers": list(it.layers)} for it in step.groups]}
            for step in steps
        ],
        "type": kind,
        "settings": comparison.settings,
        "places": comparison.positions and comparison.positions.digest,
    }


def _named(part: Part, name: str) -> tuple[State, list[Step]]:
    """The sums of a part and what each batch added, with labels ``name/layer``."""

    def label(of_layers: Any) -> Any:
        if isinstance(of_layers, list):
            return [f"{name}/{layer}" for layer in of_layers]
        return {f"{name}/{layer}": value for layer, value in of_layers.items()}

    fields = ["layers", *(field for field, it in DECLARED.items() if it.of_layers)]
    state = State.from_state_dict(part["state"] | {field: label(part["state"][field]) for field in fields})
    steps = []
    for step in part["steps"]:
        groups = [Minibatches(**{**it, "layers": tuple(label(it["layers"]))}) for it in step["groups"]]
        steps.append(Step(**{**step, "groups": groups, "dtypes": label(step["dtypes"])}))
    return state, steps
