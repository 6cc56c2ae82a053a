"""Check whether a loader brings its classes in longer runs than chance would, so that minibatches are not random."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from cka_hooks.errors import warn
from cka_hooks.similarity.state import State

# A shuffled loader passes this with a probability of about 1e-9.
_DEVIATIONS = 6.0
# With more classes than this, they are identifiers of samples.
MOST_CLASSES = 10_000


def counted(targets: Tensor | None) -> State:
    """Count classes and pairs of neighbours in one batch, from its (n,) targets; nothing if these are not known."""
    if targets is None or not len(targets):
        return State()
    classes = targets.long()
    return State(
        classes={str(number): count for number, count in Counter(classes.tolist()).items()},
        neighbours=len(classes) - 1,
        equal_neighbours=int((classes[1:] == classes[:-1]).sum()),
    )


def deviations(state: State) -> float:
    """How many standard deviations more frequent neighbours of one class are than in random order.

    The Wald-Wolfowitz test for more than two classes (Barton & David 1957), within batches.
    """
    total = sum(state.classes.values())
    if total < 20 or not 2 <= len(state.classes) <= MOST_CLASSES:
        return 0.0
    # In a random permutation, a pair is of one class with the probability sum_c n_c (n_c - 1) / (N (N - 1)), and
    # pairs are close to independent.
    share = sum(n * (n - 1) for n in state.classes.values()) / (total * (total - 1))
    variance = state.neighbours * share * (1 - share)
    return (state.equal_neighbours - share * state.neighbours) / variance**0.5 if variance > 0 else 0.0


def warn_of_order(state: State) -> None:
    """Warn if classes came in runs."""
    if deviations(state) > _DEVIATIONS:
        warn(
            "the loader brings runs of samples of one class: its minibatches are not random samples of "
            "the data, and CKA over them is not CKA over the data set. Shuffle it (DataLoader(..., shuffle=True, "
            "generator=torch.Generator().manual_seed(0)) shuffles in the same way in every run of a script)"
        )
