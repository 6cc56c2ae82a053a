"""Look at the batches of a run themselves: at their classes, and at whether one of them came twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from cka_hooks.recording import batches
from cka_hooks.run import replay
from cka_hooks.similarity.state import State

# With more classes than this, they are identifiers of samples.
MOST_CLASSES = 10_000
# How many batches of a pass to recognise.
_REMEMBERED = 256


class LookedAt:
    """Looks at each batch before the models get it, since they may change it in place."""

    def __init__(self) -> None:
        self._targets: Tensor | None = None
        self._fingerprints: set[str] = set()

    def look_at(self, batch: Any, state: State) -> None:
        """Look at a new batch, and note in the state what is wrong with it."""
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
        # If workers yield the same samples, or data start over, the first batches show it.
        if len(self._fingerprints) < _REMEMBERED:
            self._fingerprints.add(fingerprint)

    def step(self, state: State) -> None:
        """The batch was counted: count its classes, and pairs of neighbours in one class."""
        if self._targets is None or not len(self._targets) or len(state.classes) > MOST_CLASSES:
            return
        classes = self._targets.long()
        state.merge(
            State(
                classes={str(number): count for number, count in Counter(classes.tolist()).items()},
                neighbours=len(classes) - 1,
                equal_neighbours=int((classes[1:] == classes[:-1]).sum()),
            )
        )

    def start_pass(self) -> None:
        """Begin another pass over the same samples."""
        self._fingerprints.clear()
