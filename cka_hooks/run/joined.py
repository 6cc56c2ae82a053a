"""Join the features of consecutive batches into minibatches that are larger than the loader's batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cka_hooks.arrays import Features, as_features
from cka_hooks.errors import OptionError
from cka_hooks.precision import without_gradients
from cka_hooks.similarity.accumulator import CKAAccumulator
from cka_hooks.similarity.batch import Step
from cka_hooks.similarity.state import State


class JoiningAccumulator(CKAAccumulator):
    """A `CKAAccumulator` that adds a fixed number of samples at a time, whatever the loader's batches are.

    It copies tensors that are to be joined: averaged features are small.

    Args:
        size: number of samples. None adds each batch as it comes, without a copy.
        options: see :class:`CKAAccumulator`.
    """

    def __init__(self, size: int | None, **options: Any) -> None:
        self._size = size
        super().__init__(**options)

    def reset(self) -> None:
        """Forget everything that was added."""
        super().reset()
        # Rows of earlier batches that are in no minibatch yet, by layer.
        self._waiting: dict[str, Tensor] = {}

    def observe(self, layer: str, activation: Features) -> None:
        """Take the Gram matrix of one layer's activation, or keep a copy of its rows if they are to be joined.

        Raises:
            LayerError: the layer has already been observed since the last `step`.
            SampleCountError: the number of samples differs from that of the layers before it.
            OptionError: the number of features differs from that in the batch before.
        """
        if self._size is None:
            super().observe(layer, activation)
            return
        with without_gradients():
            rows = as_features(activation, f"layer {layer!r}").detach()
            rows = rows.reshape(len(rows), -1).clone()
        self._begin(layer, rows)
        if (width := self._waiting.get(layer, rows).shape[1]) != rows.shape[1]:
            raise OptionError(
                f"layer {layer!r} has {rows.shape[1]} features in this batch and {width} in one before, and "
                "join_batches= joins what has the same features: average them over positions, features='mean'"
            )
        self._pending[layer] = rows

    def slot(self, layer: str) -> Callable[[Tensor], None] | None:
        """See :meth:`CKAAccumulator.slot`. If features are joined, no product takes an activation at once."""
        return super().slot(layer) if self._size is None else None

    def step(self) -> Step:
        """Complete the batch, and add as many whole minibatches as there are.

        Returns:
            What was added.
        """
        if self._size is None:
            return super().step()
        batch: dict[str, Any] = dict(self._pending)
        self.discard()
        self._wait(batch)
        return self._add(_samples(self._waiting) // self._size * self._size)

    def flush(self) -> Step:
        """Add what waits as one smaller minibatch.

        Returns:
            What was added.
        """
        return self._add(_samples(self._waiting))

    def _wait(self, batch: Mapping[str, Tensor]) -> None:
        before = self._waiting or {layer: rows[:0] for layer, rows in batch.items()}
        # A layer that did not run in one of the batches is not in the minibatch.
        self._waiting = {
            layer: torch.cat([before[layer].to(rows.device), rows])
            for layer, rows in batch.items()
            if layer in before
        }

    def _add(self, samples: int) -> Step:
        if not samples:
            return Step(0, 0, [], {})
        waiting, self._waiting = self._waiting, {}
        try:
            for layer, rows in waiting.items():
                super().observe(layer, rows[:samples])
                if samples < len(rows):
                    self._waiting[layer] = rows[samples:].clone()
            return super().step()
        except BaseException:
            self.discard()
            raise

    def with_rest(self) -> State:
        """The state that there would be after a `flush`. Nothing changes."""
        if not self._waiting:
            return self.state
        rest = copy.copy(self)
        rest.state = copy.deepcopy(self.state)
        rest.flush()
        return rest.state

    def state_dict(self) -> dict[str, Any]:
        """Everything that was added or waits: copies, safe to save and to send."""
        return {**super().state_dict(), "waiting": [dict(self._waiting)] if self._waiting else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and forget what was added here before.

        Raises:
            OptionError: the state is from an accumulator with other options, or not from an accumulator.
        """
        super().load_state_dict(state)
        for batch in state.get("waiting", []):
            kinds = {(type(layer), rows.ndim, rows.is_floating_point()) for layer, rows in batch.items()}
            if kinds - {(str, 2, True)} or len(set(map(len, batch.values()))) > 1:
                raise OptionError(f"the state's 'waiting' has {batch!r:.60}, which it cannot have: measure again")
            self._wait(batch)


def _samples(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values()), ()))
