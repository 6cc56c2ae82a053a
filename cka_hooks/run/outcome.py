"""Turn the sums of a run into its result, and warn about the order and repetition of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cka_hooks.errors import warn
from cka_hooks.results.result import CKAResult
from cka_hooks.run import class_order
from cka_hooks.similarity.estimate import result_of
from cka_hooks.similarity.state import State


def finished(state: State, types: Mapping[str, str], settings: Mapping[str, Any]) -> CKAResult:
    """The result of a run, with warnings about the order and repetition of samples.

    Args:
        state: the sums of the run.
        types: the class of each model by its name, "" for a single model.
        settings: further provenance, plain JSON values.
    """
    class_order.warn_of_order(state)
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
