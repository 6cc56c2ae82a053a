"""Whether a loader brings its classes in longer runs than chance gives: minibatches are not random samples then."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from cka_hooks.errors import warn
from cka_hooks.similarity.state import State

# A shuffled loader passes this with a probability of about 1e-9.
_DEVIATIONS = 6.0
# More of them are identifiers of samples, not classes.
MOST_CLASSES = 10_000


def counted(targets: Tensor | None) -> State:
    """Classes and pairs of neighbours of one batch, from its (n,) targets; nothing where these are not known."""
    if targets is None or not len(targets):
        return State()
    classes = targets.long()
    return State(
        classes={str(number): count for number, count in Counter(classes.tolist()).items()},
        neighbours=len(classes) - 1,
        equal_neighbours=int((classes[1:] == classes[:-1]).sum()),
    )


def deviations(state: State) -> float:
    """By how many standard deviations neighbours of one class are more frequent than in random order.

    The Wald-Wolfowitz test for more than two classes (Barton & David 1957), within batches.
    """
    total = sum(state.classes.values())
    if total < 20 or not 2 <= len(state.classes) <= MOST_CLASSES:
        return 0.0
    # The number of equal neighbours in a random permutation: a pair is of one class with the probability
    # sum_c n_c (n_c - 1) / (N (N - 1)), and pairs are close to independent.
    share = sum(n * (n - 1) for n in state.classes.values()) / (total * (total - 1))
    variance = state.neighbours * share * (1 - share)
    return (state.equal_neighbours - share * state.neighbours) / variance**0.5 if variance > 0 else 0.0


def warn_of_order(state: State) -> None:
    """Warn where classes came in runs."""
    if deviations(state) > _DEVIATIONS:
        warn(
            "the loader brings samples of one class one after another: its minibatches are not random samples of "
            "the data, and CKA over them is not CKA over the data set. Shuffle it (DataLoader(..., shuffle=True, "
            "generator=torch.Generator().manual_seed(0)) shuffles in the same way in every run of a script)"
        )
