"""Which samples of its data set each batch of a loader has, if the loader's own sampler tells."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from cka_hooks.errors import OptionError
from cka_hooks.run.precomputed import Identifier, identifiers


class Drawn:
    """A loader that tells which samples the last batch has.

    Only of a plain ``DataLoader`` over a data set with indices, whose collation keeps all samples in their order.

    Attributes:
        ids: their indices in the data set, behind any ``Subset``, or what its `sample_ids` has there; None where
            nothing surely tells.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.ids: list[Identifier] | None = None

    def __iter__(self) -> Iterator[Any]:
        told: deque[list[Any]] = deque()
        return self._told(_iterator(self._loader, told), told)

    def _told(self, stream: Iterator[Any], told: deque[list[Any]]) -> Iterator[Any]:
        for batch in stream:
            self.ids = self._ids_of(told.popleft()) if told else None
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


class _Telling:
    """A batch sampler that notes what it draws, long before workers bring it."""

    def __init__(self, sampler: Any, told: deque[list[Any]]) -> None:
        self._sampler, self._told = sampler, told

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        for drawn in self._sampler:
            self._told.append(list(drawn))
            yield drawn


def _iterator(loader: Any, told: deque[list[Any]]) -> Iterator[Any]:
    """The loader's own iterator, whose sampler notes what it draws where that will be the batches."""
    if not _keeps_order(loader):
        return iter(loader)
    # A copy has the same data, samplers and generators, and the user's loader stays as it is.
    ours, telling = copy.copy(loader), _Telling(loader.batch_sampler, told)
    vars(ours)["batch_sampler"] = telling
    if loader._iterator is not None:  # noqa: SLF001
        vars(loader._iterator)["_index_sampler"] = telling  # noqa: SLF001
    found: Iterator[Any] = iter(ours)
    if ours._iterator is not None:  # noqa: SLF001
        # Workers that stay are the user's.
        vars(found)["_index_sampler"] = loader.batch_sampler
        loader._iterator = found  # noqa: SLF001
    return found


def _keeps_order(loader: Any) -> bool:
    kind, collate = type(loader), getattr(loader, "collate_fn", None)
    return (
        isinstance(loader, DataLoader)
        and kind.__iter__ is DataLoader.__iter__
        and kind._get_iterator is DataLoader._get_iterator  # noqa: SLF001
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
        and getattr(loader, "in_order", True)
        and (collate is default_collate or str(getattr(collate, "__module__", "")).startswith("transformers.data."))
    )
