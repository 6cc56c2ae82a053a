"""`TrainingCKA`: how alike the layers of a network in training are to what they were, over a fixed loader."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import MissingExtraError, ModelError, NonFiniteError, OptionError, warn
from cka_hooks.features import Reduction
from cka_hooks.hsic import Estimator
from cka_hooks.integrations.footprint import Footprint, compared
from cka_hooks.options import Options, whole
from cka_hooks.recording.batches import Forward
from cka_hooks.recording.guest import is_sharded
from cka_hooks.recording.layers import Layers
from cka_hooks.recording.padding import MaskOption
from cka_hooks.recording.snapshot import Snapshot
from cka_hooks.results.result import CKAResult
from cka_hooks.run.comparison import Comparison
from cka_hooks.run.entries import named_models, per_model
from cka_hooks.run.in_turn import Replayed
from cka_hooks.run.replay import Randomness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What results call the network itself, its first weights, and those of the last time.
NOW, INITIAL, PREVIOUS = "now", "initial", "previous"


class TrainingCKA:
    """CKA of a network in training with its initial weights, with the previous time, and with other networks.

    Each time is one pass over the loader in eval mode. Modes, buffers, gradients, random states, and what metrics in
    the network have added up, are then as before: the network trains to the same weights, to the bit. Kept
    between two times are centred Gram matrices on the CPU and no copies of weights: about ``samples * minibatch * 4``
    bytes for each layer, three times over and once for each network.

    Args:
        loader: batches that are the same each time, some hundred samples: a `DataLoader` of its own, or a list.
        layers: which layers, see :func:`cka_hooks.compare`, or a mapping to that from ``now`` and the names of the
            other networks. Each layer is a curve in the log: choose a few.
        network: another network to compare with, such as a teacher; or several by name. It is measured once.
        every_n_epochs: how often, where `every_n_steps` is None.
        every_n_steps: measure after every so many optimizer steps, and not after epochs.
        folder: where results are saved; by default a folder `name` in that of the trainer's logs.
        name: the front of the names in the log.
        forward: ``(model, batch) -> anything`` where the default call does not fit, or a mapping as `layers`.
        kernel: see :func:`cka_hooks.compare`, as all further options.

    Attributes:
        result: the last one. Its models are ``now``, ``initial``, ``previous``, and the given networks.

    Raises:
        OptionError: an option with a value that it cannot have, or a loader that can be iterated only once.

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
        seed: int = 0,
    ) -> None:
        self._options: dict[str, Any] = {
            "kernel": kernel,
            "bandwidth": bandwidth,
            "sigma": sigma,
            "estimator": estimator,
            "minibatch": minibatch,
            "features": features,
            "batch_dim": batch_dim,
            "channel_dim": channel_dim,
            "mask": mask,
            "seed": seed,
        }
        # Refused now, not when the training has begun.
        Options(**self._options)
        given = (
            {}
            if network is None
            else named_models({"network": network} if isinstance(network, nn.Module) else network)
        )
        if taken := given.keys() & {NOW, INITIAL, PREVIOUS}:
            raise OptionError(
                f"network= has the name {taken.pop()!r}, which results use themselves: choose another one"
            )
        self._given: dict[str, nn.Module] = given
        self._layers, self._forwards = (
            per_model(option, {NOW: None, **given}, name)
            for option, name in ((layers, "layers"), (forward, "forward"))
        )
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        self.every_n_steps = whole("every_n_steps", every_n_steps, 1)
        self.folder = None if folder is None else Path(folder)
        self.name = name
        self.result: CKAResult | None = None
        self._loader = loader
        self._batches = Replayed(loader)
        self._then: dict[str, Footprint] = {}
        self._networks: dict[str, Footprint] = {}
        self._last: int | None = None

    def start(self, model: nn.Module, step: int = 0, prepare: Callable[[Any], Any] | None = None) -> None:
        """Take the weights as the initial ones, unless :meth:`load_state_dict` has brought those of a resumed run.

        Args:
            model: the network as it is before the first step.
            step: how many steps have been made.
            prepare: what a batch becomes before the network has it, such as one of another dtype.

        Raises:
            ModelError: its weights are spread over several processes.
            CKAError: it cannot be measured; see :func:`cka_hooks.compare`.
        """
        self.refuse_sharded(model)
        self._networks = {name: self._footprint(network, name) for name, network in self._given.items()}
        now = self._footprint(model, prepare=prepare)
        if step == 0 or not self._then:
            if step:
                warn(
                    f"this run goes on from step {step}, and its checkpoint has no CKA of the initial weights: "
                    f"{INITIAL!r} are those of step {step}"
                )
            self._then = {INITIAL: now, PREVIOUS: now}
        # Mistakes show now, and not after an epoch.
        compared({NOW: now, **self._then, **self._networks}, {})
        self._last = step

    @staticmethod
    def refuse_sharded(model: nn.Module) -> None:
        """Refuse a network that one process cannot run alone: say so on all of them, or the others wait.

        Raises:
            ModelError: its weights are spread over several processes.
        """
        if is_sharded(model):
            raise ModelError(
                "the weights of this network are spread over several processes (FSDP, tensor parallel), and one "
                "process measures it: leave the callback out, save checkpoints, and compare these with "
                "cka_hooks.compare()"
            )

    def due(self, step: int, epoch: int | None = None) -> bool:
        """Whether it is time to measure.

        Args:
            step: how many steps have been made.
            epoch: how many epochs, where one has ended.
        """
        if not self._then or step == self._last:
            return False
        if self.every_n_steps is not None:
            return epoch is None and step % self.every_n_steps == 0
        return epoch is not None and epoch % self.every_n_epochs == 0

    def measure(self, model: nn.Module, step: int, prepare: Callable[[Any], Any] | None = None) -> CKAResult | None:
        """One pass over the loader: CKA with the initial weights, the previous time, and the given networks.

        Training continues whatever happens here: an error becomes a warning.

        Args:
            model: the network as it is now.
            step: how many steps have been made; the name of the saved result, and in its settings.
            prepare: see :meth:`start`.

        Returns:
            The result, None where there is none. Where a layer is NaN or infinite it has all other layers.
        """
        self._last, self.result = step, None
        try:
            now = self._footprint(model, prepare=prepare)
            parts = {NOW: now, **self._then, **self._networks}
            self.result = compared(parts, {"step": step})
            self._then = {**self._then, PREVIOUS: now}
        except NonFiniteError as error:
            self.result = error.partial
            warn(f"step {step}: {error}")
        except Exception as error:
            warn(f"no CKA at step {step}: {type(error).__name__}: {error}")
        if self.result is not None and self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.result.save(self.folder / f"step-{step:08d}.json")
            except OSError as error:
                warn(f"the result of step {step} could not be saved: {error}")
        return self.result

    def scalars(self) -> dict[str, float]:
        """CKA of each layer with itself at another time, by its name in the log: ``cka/initial/fc``.

        With another network it is that of the layer of the same name; where there is none, the largest of all.
        """
        found: dict[str, float] = {}
        for other, block in self._with_others():
            for row, values in zip(block.rows, block.matrix, strict=True):
                layer = block.layer_of(row)
                same = f"{other}/{layer}"
                value = block[row, same] if same in block.columns else float(values.nan_to_num(-math.inf).max())
                if math.isfinite(value):
                    # Not every logger takes "relu#2" for a name.
                    found[f"{self.name}/{other}/{layer.replace('#', '-')}"] = value
        return found

    def log_pictures(self, log: Callable[[str, Figure], object]) -> None:
        """Hand over the picture of each block of the result, with its name in the log, where matplotlib is installed.

        A picture that cannot be drawn or logged is a warning.
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
        """What a run needs to be resumed: plain values and float64 tensors; empty before :meth:`start`."""
        if not self._then:
            return {}
        parts = {name: footprint.state_dict() for name, footprint in self._then.items()}
        return {"batches": self._batches.batches(), **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            OptionError: it is something else.
        """
        if state:
            self._then = {name: Footprint.of(state.get(name, {})) for name in (INITIAL, PREVIOUS)}
            self._batches.known = list(state.get("batches", []))

    def _with_others(self) -> Iterator[tuple[str, CKAResult]]:
        if self.result is not None:
            there = {self.result.model_of(label) for label in self.result.rows}
            for other in self.result.models:
                if other != NOW and there >= {NOW, other}:
                    yield other, self.result.between(NOW, other)

    def _footprint(self, model: nn.Module, name: str = NOW, prepare: Callable[[Any], Any] | None = None) -> Footprint:
        with _as_before(model, self._loader):
            its = {"layers": self._layers[name], "forward": self._forwards[name]}
            batches: Iterable[Any] = self._batches.rewind(name)
            return Footprint.left_by(
                Comparison(model, **self._options, **its), map(prepare, batches) if prepare else batches
            )


@contextmanager
def _as_before(model: nn.Module, loader: Any) -> Iterator[None]:
    """Random states, those of the loader, and what modules keep in attributes are as before afterwards."""
    randomness = Randomness(loader)
    before, snapshot = randomness.state(), Snapshot(model)
    try:
        with torch.no_grad():
            yield
    finally:
        randomness.restore(before)
        snapshot.restore()


def missing(package: str, extra: str) -> MissingExtraError:
    """The error where a trainer's package is not installed."""
    return MissingExtraError(
        f"cka_hooks.integrations.{extra} needs {package}, which is not installed: pip install 'cka-hooks[{extra}]'"
    )
