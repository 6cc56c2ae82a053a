"""Turn the sums of a run into its result, and warn about the order and repetition of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cka_hooks.errors import warn
from cka_hooks.results.result import CKAResult
from cka_hooks.run.looked_at import MOST_CLASSES
from cka_hooks.similarity.estimate import result_of
from cka_hooks.similarity.state import State

# A shuffled loader passes this with a probability of about 1e-9.
_DEVIATIONS = 6.0


def finished(state: State, types: Mapping[str, str], settings: Mapping[str, Any]) -> CKAResult:
    """The result of a run, with warnings about the order and repetition of samples.

    Args:
        state: the sums of the run.
        types: the class of each model by its name, "" for a single model.
        settings: further provenance, plain JSON values.
    """
    if _deviations(state) > _DEVIATIONS:
        warn(
            "the loader brings runs of samples of one class: its minibatches are not random samples of "
            "the data, and CKA over them is not CKA over the data set. Shuffle it (DataLoader(..., shuffle=True, "
            "generator=torch.Generator().manual_seed(0)) shuffles in the same way in every run of a script)"
        )
    if state.repeats is not None:
        warn(state.repeats)
    if state.empty:
        warn(
            f"{state.empty} batches without samples were skipped: None, an empty list, or tensors without rows, as "
            "from a collate_fn that drops every sample of a batch"
        )
    same = max((state.first_batches.count(first) for first in state.first_batches), default=0)
    if same > 1:
        warn(
            f"{same} ranks have the same first batch, so that their samples count that often: give the loader a "
            "DistributedSampler, name the ranks with different samples by group=, or run each rank alone with "
            "distributed=False"
        )
    models = {name or "model": kind for name, kind in types.items()}
    return result_of(state, {"models": models, **settings}, tuple(name for name in types if name))


def _deviations(state: State) -> float:
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
