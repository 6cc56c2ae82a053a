"""Which samples of its data set each batch of a loader has, if the loader's own sampler tells."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from cka_hooks.errors import OptionError
from cka_hooks.run.precomputed import Identifier, identifiers


class Drawn:
    """A loader that tells which samples the last batch has.

    Only of a plain ``DataLoader`` over a data set with indices, if its workers do not persist and its collation keeps
    all samples in their order.

    Attributes:
        ids: their indices in the data set, behind any ``Subset``, or what its `sample_ids` has there; None where
            nothing surely tells.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.ids: list[Identifier] | None = None

    def __iter__(self) -> Iterator[Any]:
        drawn: deque[list[Any]] = deque()
        loader = self._loader
        if _keeps_order(loader):
            # A copy has the same data, samplers and generators, and the user's loader stays as it is.
            loader = copy.copy(loader)
            vars(loader)["batch_sampler"] = _noted(loader.batch_sampler, drawn)
        return self._told(iter(loader), drawn)

    def _told(self, stream: Iterator[Any], drawn: deque[list[Any]]) -> Iterator[Any]:
        for batch in stream:
            self.ids = self._ids_of(drawn.popleft()) if drawn else None
            yield batch

    def _ids_of(self, drawn: list[Any]) -> list[Identifier] | None:
        dataset: Any = self._loader.dataset
        try:
            found: Any = identifiers(drawn, "a sampler")
            while type(dataset) is Subset:
                found, dataset = [dataset.indices[index] for index in found], dataset.dataset
            names = getattr(dataset, "sample_ids", None)
            return identifiers(found if names is None else [names[index] for index in found], "sample_ids")
        except (OptionError, LookupError, TypeError):
            return None


def _noted(sampler: Iterable[Any], drawn: deque[list[Any]]) -> Iterator[Any]:
    """What a batch sampler draws, noted long before workers bring it."""
    for indices in sampler:
        drawn.append(list(indices))
        yield indices


def _keeps_order(loader: Any) -> bool:
    """Whether a loader brings what its batch sampler draws, all samples of it, in that order.

    Workers that persist are those of the user's loader and ask its own sampler.
    """
    collate = getattr(loader, "collate_fn", None)
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not loader.persistent_workers
        and not isinstance(loader.dataset, IterableDataset)
        and getattr(loader, "in_order", True)
        and (collate is default_collate or str(getattr(collate, "__module__", "")).startswith("transformers.data."))
    )
