"""More models than fit into memory at once: one after another, each leaving its centred Gram matrices behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cka_hooks.errors import BatchError, ModelError, OptionError, SampleCountError
from cka_hooks.recording.layers import check_model
from cka_hooks.run import replay
from cka_hooks.similarity.accumulator import Centred, CKAAccumulator, Step

Builder = nn.Module | Callable[[], nn.Module]


class Collector(CKAAccumulator):
    """Keeps the centred Gram matrices of each batch, where an accumulator adds up their products."""

    def reset(self) -> None:
        """Forget everything that was collected."""
        super().reset()
        # None stands where another pass over the same samples begins.
        self._steps: list[Step | None] = []

    def start_pass(self) -> None:
        """From here on come the samples seen before."""
        super().start_pass()
        self._steps.append(None)

    def _commit(self, step: Step) -> None:
        # On the CPU: a device has room for the model that comes next, not for all that were.
        groups = [Centred(group.layers, *(_to_cpu(tensor) for tensor in group[1:])) for group in step.groups]
        self._steps.append(step._replace(groups=groups))
        self.samples += step.counted
        self.left_out += step.samples - step.counted
        self.minibatches += sum(group.finite.shape[1] for group in groups)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def add_up(collectors: Mapping[str, Collector], accumulator: CKAAccumulator) -> None:
    """All pairs of layers of all models, one batch at a time, as if they had run together.

    What was collected is let go of on the way.

    Raises:
        SampleCountError: a batch had different numbers of samples in two models.
    """
    columns = [collector._steps for collector in collectors.values()]
    for collector in collectors.values():
        accumulator._dtypes.update(collector._dtypes)
    for row in range(max(map(len, columns), default=0)):
        steps = [column[row] if row < len(column) else None for column in columns]
        for column in columns:
            if row < len(column):
                column[row] = None
        present = [step for step in steps if step is not None]
        if not present:
            accumulator.start_pass()
            continue
        for name, step in zip(collectors, steps, strict=True):
            if step is None or (step.samples, step.counted) != (present[0].samples, present[0].counted):
                found = "no batch" if step is None else f"{step.samples} samples"
                raise SampleCountError(
                    f"batch {row} has {found} in model {name!r} and {present[0].samples} in "
                    f"{next(iter(collectors))!r}: CKA compares the same samples in the same order"
                )
        groups = [_joined(groups) for groups in zip(*(step.groups for step in present), strict=True)]
        with torch.no_grad():
            accumulator._commit(present[0]._replace(groups=groups))


def _joined(groups: Sequence[Centred]) -> Centred:
    layers = tuple(layer for group in groups for layer in group.layers)
    return Centred(layers, *(torch.cat(tensors) for tensors in zip(*(group[1:] for group in groups), strict=True)))


def built_in_turn(models: Mapping[str, Builder]) -> Iterator[tuple[str, nn.Module]]:
    """Each model, built when it is its turn. Whoever takes it must let go of it before the next.

    Raises:
        ModelError: something is neither a model nor a function, or a function returned something else.
    """
    for given in models.values():
        if not callable(given) or isinstance(given, nn.Module | type):
            check_model(given)
    for name, given in models.items():
        model = given if isinstance(given, nn.Module) else given()
        if not isinstance(model, nn.Module):
            raise ModelError(f"the function for model {name!r} returned a {type(model).__name__}, not an nn.Module")
        yield name, model
        del model
        # Hooks and closures make cycles, which would keep a model alive beside the next one.
        gc.collect()


class Replayed:
    """A loader that is gone over once for each model, and has to bring the same batches each time.

    Raises:
        OptionError: it is an iterator, which can be gone over only once.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise OptionError(
                "functions that build models need a loader that can be gone over once for each of them, and this one "
                "is an iterator: pass a DataLoader or a list of batches"
            )
        self._loader = loader
        self._randomness = replay.Randomness(loader)
        self._start = self._randomness.state()
        self._known: list[str] | None = None
        self._seen: list[str] = []
        self._model = ""

    def rewind(self, model: str) -> Replayed:
        """Back to the start, for the next model."""
        if self._known is None and self._model:
            self._known = self._seen
        self._seen = []
        self._model = model
        self._randomness.restore(self._start)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        """One pass.

        Raises:
            BatchError: a batch is another one than it was for the first model.
        """
        for batch in self._loader:
            number = len(self._seen)
            self._seen.append(replay.fingerprint(batch))
            if self._known is not None and self._known[number : number + 1] != self._seen[-1:]:
                raise BatchError(
                    f"batch {number} (counted from 0) for model {self._model!r} is another one than for the first "
                    "model. Each model needs the same batches: give the loader one order, for example with "
                    "DataLoader(..., shuffle=True, generator=torch.Generator().manual_seed(0)), and no random "
                    "augmentation that it cannot repeat"
                )
            yield batch
