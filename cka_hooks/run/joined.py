"""Join the features of consecutive batches into minibatches that are larger than the loader's batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cka_hooks.errors import LayerError, OptionError, SampleCountError
from cka_hooks.precision import without_gradients
from cka_hooks.similarity.accumulator import CKAAccumulator
from cka_hooks.similarity.batch import Step
from cka_hooks.similarity.state import State

_NOTHING = Step(0, 0, [], {})


class Joined:
    """Hands an accumulator a fixed number of samples at a time, whatever the loader's batches are.

    It has the accumulator's methods, and copies the features it is given: averaged features are small.

    Args:
        accumulator: takes the minibatches.
        size: number of samples in each. None hands over each batch as it comes, without a copy.

    Attributes:
        waiting_batches: features of earlier batches that are in no minibatch yet, by layer.
    """

    def __init__(self, accumulator: CKAAccumulator, size: int | None) -> None:
        self._accumulator = accumulator
        self._size = size
        self._now: dict[str, Tensor] = {}
        self.waiting_batches: list[dict[str, Tensor]] = []

    @property
    def observing(self) -> frozenset[str]:
        """The layers that were observed since the last `step`."""
        return self._accumulator.observing if self._size is None else frozenset(self._now)

    @property
    def observing_samples(self) -> int:
        """Number of samples of each layer observed since the last `step`."""
        return self._accumulator.observing_samples if self._size is None else _samples(self._now)

    @property
    def waiting(self) -> int:
        """Number of samples of earlier batches that are in no minibatch yet."""
        return sum(map(_samples, self.waiting_batches))

    def observe(self, layer: str, activation: Tensor) -> None:
        """Keep a copy of one layer's features, if they are to be joined.

        Raises:
            LayerError: the layer has already been observed since the last `step`.
            SampleCountError: the number of samples differs from that of the layers before it.
            OptionError: the number of features differs from that in the batch before.
        """
        if self._size is None:
            self._accumulator.observe(layer, activation)
            return
        if layer in self._now:
            raise LayerError(f"layer {layer!r} was observed twice in a batch")
        with without_gradients():
            rows = activation.detach().reshape(len(activation), -1).clone()
        before = next((batch[layer] for batch in self.waiting_batches if layer in batch), None)
        if self._now and len(rows) != _samples(self._now):
            other = next(iter(self._now))
            raise SampleCountError(
                f"layer {layer!r} has {len(rows)} samples and {other!r} has {_samples(self._now)} in the same batch: "
                "CKA compares the same samples in the same order"
            )
        if before is not None and before.shape[1] != rows.shape[1]:
            raise OptionError(
                f"layer {layer!r} has {rows.shape[1]} features in this batch and {before.shape[1]} in one before, "
                "and join_batches= joins what has the same features: average them over positions, features='mean'"
            )
        self._now[layer] = rows

    def slot(self, layer: str) -> Callable[[Tensor], None] | None:
        """See :meth:`CKAAccumulator.slot`. If features are joined, no product takes an activation at once."""
        return self._accumulator.slot(layer) if self._size is None else None

    def step(self) -> Step:
        """Complete the batch, and hand over as many whole minibatches as there are.

        Returns:
            What was added.

        Raises:
            LayerError: no layer was observed since the last `step`.
            OutOfMemoryError: memory does not suffice. Nothing was added, and the samples are forgotten.
        """
        if self._size is None:
            return self._accumulator.step()
        if not self._now:
            raise LayerError("no layer was observed since the last step()")
        self.waiting_batches.append(self._now)
        self._now = {}
        whole = self.waiting // self._size * self._size
        return self._hand_over(whole) if whole else _NOTHING

    def flush(self) -> Step:
        """Hand over what waits, as one smaller minibatch."""
        return self._hand_over(self.waiting) if self.waiting_batches else _NOTHING

    def _hand_over(self, samples: int) -> Step:
        batches, self.waiting_batches = self.waiting_batches, []
        # A layer that did not run in one of the batches is not in the minibatch.
        layers = [layer for layer in batches[0] if all(layer in batch for batch in batches)]
        try:
            for layer in layers:
                device = batches[-1][layer].device
                rows = torch.cat([batch[layer].to(device) for batch in batches])
                if samples < len(rows):
                    self.waiting_batches = self.waiting_batches or [{}]
                    self.waiting_batches[0][layer] = rows[samples:].clone()
                self._accumulator.observe(layer, rows[:samples])
            return self._accumulator.step() if layers else _NOTHING
        except BaseException:
            self._accumulator.discard()
            raise

    def with_rest(self) -> State:
        """The state that the accumulator would have after a `flush`. Nothing changes."""
        if not self.waiting_batches:
            return self._accumulator.state
        own, waiting = self._accumulator.state, self.waiting_batches
        try:
            self._accumulator.state = State.from_state_dict(own.state_dict())
            self.flush()
            return self._accumulator.state
        finally:
            self._accumulator.state, self.waiting_batches = own, waiting

    def discard(self) -> None:
        """Forget what was observed since the last `step`."""
        self._now = {}
        self._accumulator.discard()

    def reset(self) -> None:
        """Forget everything."""
        self._accumulator.reset()
        self.waiting_batches = []

    def state_list(self) -> list[dict[str, Tensor]]:
        """Copies of what waits."""
        return [{layer: rows.clone() for layer, rows in batch.items()} for batch in self.waiting_batches]


def checked_batches(waiting: Any) -> list[dict[str, Tensor]]:
    """Check what :meth:`Joined.state_list` returned.

    Raises:
        OptionError: this is anything else.
    """
    if not isinstance(waiting, list) or not all(map(_is_batch, waiting)):
        raise OptionError("the features that wait to be joined are not those of batches")
    return [dict(batch) for batch in waiting]


def _samples(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values()), ()))


def _is_batch(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    rows = list(value.values())
    return all(isinstance(one, Tensor) and one.ndim == 2 and len(one) == _samples(value) for one in rows)
