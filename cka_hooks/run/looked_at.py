"""What the batches of a run tell by themselves: their classes, and whether one of them came twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cka_hooks.recording import batches
from cka_hooks.run import class_order, replay
from cka_hooks.similarity.state import State

# Batches of a pass that are known again.
_REMEMBERED = 256


class LookedAt:
    """Looks at each batch before the models have it, which may change it in place."""

    def __init__(self) -> None:
        self._targets: Tensor | None = None
        self._fingerprints: set[str] = set()

    def look_at(self, batch: Any, state: State) -> None:
        """A batch comes; what is found wrong is noted in the state."""
        self._targets = batches.targets(batch)
        fingerprint = replay.fingerprint(batch)
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

    def step(self, state: State) -> None:
        """The batch was counted."""
        if len(state.classes) <= class_order.MOST_CLASSES:
            state.merge(class_order.counted(self._targets))

    def start_pass(self) -> None:
        """From here on come the samples seen before."""
        self._fingerprints.clear()
