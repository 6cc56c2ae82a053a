"""Whether a loader brings its classes in longer runs than chance gives: minibatches are no samples then."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from cka_hooks.errors import CKAWarning

# A shuffled loader passes this with a probability of about 1e-9.
_DEVIATIONS = 6.0


class ClassOrder:
    """Counts neighbours of equal class; the Wald-Wolfowitz test for more than two classes (Barton & David 1957)."""

    def __init__(self) -> None:
        self._classes: Counter[int] = Counter()
        self._equal = 0
        self._last: int | None = None

    def add(self, targets: Tensor | None) -> None:
        """The classes of one batch, (n,) integers, or None where they are not known."""
        if targets is None or not len(targets):
            return
        classes = targets.tolist()
        self._classes.update(classes)
        previous = classes if self._last is None else [self._last, *classes]
        self._equal += sum(a == b for a, b in pairwise(previous))
        self._last = classes[-1]

    def deviations(self) -> float:
        """By how many standard deviations equal neighbours are more frequent than in random order."""
        total = sum(self._classes.values())
        if total < 20 or len(self._classes) < 2:
            return 0.0
        # The number of equal neighbours among total - 1 in a random permutation: its mean is
        # sum_c n_c (n_c - 1) / N, its variance close to that of independent neighbours.
        share = sum(n * (n - 1) for n in self._classes.values()) / (total * (total - 1))
        mean = share * (total - 1)
        variance = (total - 1) * share * (1 - share)
        return float((self._equal - mean) / variance**0.5) if variance > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What was counted."""
        return {"classes": dict(self._classes), "equal": self._equal, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._classes = Counter(state["classes"])
        self._equal = state["equal"]
        self._last = state["last"]

    def warn(self) -> None:
        """Warn where classes came in runs."""
        if self.deviations() > _DEVIATIONS:
            warnings.warn(
                "the loader brings samples of one class one after another: its minibatches are no random samples of "
                "the data, and CKA over them is not CKA over the data set. Shuffle it (DataLoader(..., shuffle=True, "
                "generator=torch.Generator().manual_seed(0)) shuffles the same way every time)",
                CKAWarning,
                stacklevel=4,
            )
