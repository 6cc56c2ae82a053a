"""Features that somebody else computed: rows of arrays, in the order of the loader or found by identifiers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from cka_hooks.arrays import as_features
from cka_hooks.errors import BatchError, OptionError, SampleCountError
from cka_hooks.names import labelled
from cka_hooks.recording.batches import fields_of, sample_count
from cka_hooks.run import replay
from cka_hooks.run.feature_files import opened
from cka_hooks.similarity.state import State

Identifier: TypeAlias = int | str
# A key of the batch, or a function that returns the identifiers of its samples.
SampleIds: TypeAlias = str | int | Callable[[Any], Any]


class Precomputed:
    """Features that somebody else computed, as an entry of the mapping that :func:`cka_hooks.compare` takes.

    You can also put an array without identifiers into the mapping as it is. One row is read before the run, and then
    one batch at a time.

    Args:
        array: (N, ...) numbers, one row per sample: a tensor, a NumPy array or memmap, a data set of h5py or zarr, or
            anything else with ``shape`` and slicing. Or a mapping from layer to such arrays: ``name/layer``.
        sample_ids: the identifiers of the N samples, whole numbers or texts. With them, `sample_ids` of
            :func:`cka_hooks.compare` finds the row of each sample of a batch, in whatever order a loader brings them.
            None: the rows are the samples of the loader, in its order; it must not shuffle.

    Attributes:
        samples: N.

    Raises:
        OptionError: an entry is not an array of numbers, arrays have different numbers of rows, or an identifier is
            repeated.

    Example:
        >>> import torch, cka_hooks
        >>> _ = torch.manual_seed(0)
        >>> model, images = torch.nn.Linear(16, 8), torch.randn(64, 16)
        >>> samples = [{"input": image, "id": f"image{i}"} for i, image in enumerate(images)]
        >>> loader = torch.utils.data.DataLoader(samples, batch_size=16, shuffle=True)
        >>> v4 = cka_hooks.Precomputed(images.numpy()[::-1], sample_ids=[f"image{i}" for i in reversed(range(64))])
        >>> result = cka_hooks.compare({"net": model, "V4": v4}, loader, sample_ids="id", progress=False)
        >>> result.layers, result["net/(model)", "V4"] > 0.5
        (('net/(model)', 'V4'), True)
    """

    def __init__(self, array: Any, *, sample_ids: Any = None) -> None:
        arrays = dict(array) if isinstance(array, Mapping) else {"": array}
        if not arrays:
            raise OptionError("the mapping of precomputed features is empty: give it at least one array")
        rows = {layer: _checked(one, layer) for layer, one in arrays.items()}
        if len(set(rows.values())) > 1:
            raise OptionError(
                f"precomputed features have different numbers of rows, {rows}: give one for each sample"
            )
        self.arrays: dict[str, Any] = arrays
        self.samples = next(iter(rows.values()))
        self.sample_ids: list[Identifier] | None = None
        self._row: dict[Identifier, int] = {}
        if sample_ids is not None:
            self.sample_ids = identifiers(sample_ids, "sample_ids of Precomputed")
            self._row = {identifier: row for row, identifier in enumerate(self.sample_ids)}
            if len(self.sample_ids) != self.samples:
                raise OptionError(f"Precomputed has {self.samples} rows and {len(self.sample_ids)} sample_ids")
            if len(self._row) < self.samples:
                raise OptionError(
                    f"Precomputed has identifiers twice in sample_ids: {_first(repeated(self.sample_ids))}; each row "
                    "needs its own"
                )

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Precomputed:
        """Open a file of features, ``file::name`` for one array of several.

        Args:
            file: ``.npy``, ``.npz``, ``.safetensors``, or ``.h5``/``.hdf5`` (needs h5py). All but ``.npz`` are read a
                batch at a time. Identifiers come from an array ``sample_ids`` beside the others, or from ``cka-hooks
                record``. Pickled arrays are not read.

        Raises:
            OptionError: this is not such a file, it is damaged, or it has no array of that name.
            MissingExtraError: h5py is not installed.
            OSError: the file cannot be read.

        Example:
            >>> import numpy, os, tempfile, cka_hooks
            >>> path = os.path.join(tempfile.mkdtemp(), "v4.npy")
            >>> numpy.save(path, numpy.zeros((50, 3)))
            >>> cka_hooks.Precomputed.load(path).samples
            50
        """
        arrays, sample_ids = opened(file)
        return cls(arrays, sample_ids=sample_ids)

    def ordered(self, order: Sequence[int]) -> Precomputed:
        """The same rows in another order, without identifiers. The rows are not read."""
        return Precomputed({layer: _Ordered(array, order) for layer, array in self.arrays.items()})

    def rows_of(self, samples: Sequence[Identifier]) -> list[int]:
        """The row of each sample.

        Raises:
            SampleCountError: a sample has no row.
        """
        missing = [identifier for identifier in samples if identifier not in self._row]
        if missing:
            known = next(iter(self._row), None)
            raise SampleCountError(
                f"has no row for {len(missing)} of the {len(samples)} samples of a batch: {_first(missing)}; its "
                f"sample_ids look like {known!r}"
            )
        return [self._row[identifier] for identifier in samples]

    def features(self, rows: Sequence[int] | slice) -> Iterator[tuple[str, Tensor]]:
        """Some rows of each array: pairs of layer ("" for one without a name) and features (n, ...)."""
        for layer, array in self.arrays.items():
            yield layer, as_features(gathered(array, rows), layer or "precomputed features", counts=True)


class Counted(NamedTuple):
    """How much was added: batches, samples of the loader over all passes, and samples of this pass."""

    batches: int = 0
    samples: int = 0
    row: int = 0


class Brought:
    """All precomputed features of a run, and which of their rows belong to a batch.

    Args:
        entries: precomputed features by name.
        sample_ids: see :func:`cka_hooks.compare`.
        of_positions: whether the samples are positions of the loader's samples.

    Attributes:
        counted: what was added so far.

    Raises:
        OptionError: there are identifiers but no `sample_ids`, or `sample_ids` is of the wrong kind.
    """

    def __init__(
        self, entries: Mapping[str, Precomputed], sample_ids: SampleIds | None, *, of_positions: bool = False
    ) -> None:
        if sample_ids is not None and (
            isinstance(sample_ids, bool) or not (isinstance(sample_ids, str | int) or callable(sample_ids))
        ):
            raise OptionError(
                f"sample_ids={sample_ids!r}: it is a key of the batch, or a function of the batch that returns the "
                "identifiers of its samples"
            )
        for name, one in entries.items():
            if one.sample_ids is not None and sample_ids is None:
                raise OptionError(
                    f"{name!r} has identifiers of samples: say which those of a batch are, with sample_ids=, a key "
                    "of the batch or a function of it"
                )
        self.entries = dict(entries)
        # If positions are samples, identifiers are of something else.
        self._of_positions = of_positions
        self._key = None if of_positions else sample_ids
        self._aligned = any(one.sample_ids is not None for one in entries.values())
        self.counted = Counted()
        self._seen: set[Identifier] = set()
        self._pending: tuple[int, list[Identifier]] = (0, [])
        self._lengths: set[int] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample of each layer, by label."""
        return {
            labelled(name, layer): tuple(array.shape[1:])
            for name, one in self.entries.items()
            for layer, array in one.arrays.items()
        }

    def check(self, loader: Iterable[Any]) -> None:
        """Refuse a loader whose order does not match the rows.

        Raises:
            OptionError: the loader shuffles, and there are no identifiers.
            SampleCountError: the number of its samples is not that of the rows.
        """
        in_order = {name: one for name, one in self.entries.items() if one.sample_ids is None}
        why = replay.out_of_order(loader) if in_order else None
        if why is not None:
            name = next(iter(in_order))
            raise OptionError(
                f"the rows of {name!r} are those of the loader in its order, and {why}. Give them identifiers, "
                f"{{..., {name!r}: cka_hooks.Precomputed(array, sample_ids=ids)}}, and name those of a batch, "
                "compare(..., sample_ids='id'); or do not shuffle, DataLoader(dataset, batch_size=64, shuffle=False)"
            )
        self._lengths = replay.lengths(loader) if in_order else None
        for name, one in in_order.items():
            if self._lengths is not None and one.samples not in self._lengths:
                raise SampleCountError(
                    f"{name!r} has {one.samples} rows and the loader has {max(self._lengths)} samples: give a row "
                    "for each, or identifiers, cka_hooks.Precomputed(array, sample_ids=ids)"
                )

    def end_pass(self) -> None:
        """End a whole pass over the loader.

        Raises:
            SampleCountError: rows are left over in an entry that is in the order of the loader.
        """
        for name, one in self.entries.items():
            ends = self._lengths or {one.samples}
            if one.sample_ids is None and self.counted.row not in ends:
                raise SampleCountError(
                    f"the loader brought {self.counted.row} samples and {name!r} has {one.samples} rows, which are "
                    "then those of other samples: give them identifiers, cka_hooks.Precomputed(array, sample_ids=ids)"
                )

    def look_at(self, batch: Any, limit: int | None, drawn: Sequence[Identifier] | None) -> None:
        """Read the identifiers of a batch before the models get it, since they may change it in place.

        Args:
            batch: a batch of the loader.
            limit: how many of its samples count, at most.
            drawn: identifiers that the loader tells.

        Raises:
            BatchError: the batch has no identifiers.
        """
        samples = sample_count(batch) or 0
        ids = list(drawn or ()) if self._key is None else [] if limit == 0 else ids_of(batch, self._key)
        self._pending = samples if limit is None else min(samples, limit), ids[:limit]

    def features(self, samples: int) -> Iterator[tuple[str, Tensor]]:
        """The features that belong to the batch: pairs of label and features.

        Args:
            samples: on how many of its samples models were measured, 0 if there are no models.

        Raises:
            BatchError: there are too few identifiers, or one is repeated.
            SampleCountError: a sample has no row.
        """
        if self._of_positions:
            return
        likely, ids = self._pending
        samples = samples or (likely if self._key is None else len(ids))
        self._pending = samples, ids
        if self._key is not None and len(ids) != samples:
            raise BatchError(
                f"sample_ids={self._key!r} gives {len(ids)} identifiers for a batch of {samples} samples"
            )
        if not self.entries:
            return
        if not samples:
            raise BatchError(
                "nothing says how many samples a batch has: give identifiers, with "
                "Precomputed(array, sample_ids=ids) and sample_ids="
            )
        twice = [*repeated(ids), *(one for one in ids if one in self._seen)] if self._aligned else []
        if twice:
            raise BatchError(
                f"the loader brought samples twice in one pass: {_first(twice)}. They would count twice: sample "
                "without replacement, or give each sample an identifier of its own"
            )
        for name, one in self.entries.items():
            try:
                for layer, features in one.features(self._rows(one, ids, samples)):
                    yield labelled(name, layer), features
            except (SampleCountError, OptionError) as error:
                raise type(error)(f"{name!r}: {error}") from error

    def _rows(self, one: Precomputed, ids: list[Identifier], samples: int) -> Sequence[int] | slice:
        if one.sample_ids is not None:
            return one.rows_of(ids)
        if self.counted.row + samples > one.samples:
            raise SampleCountError(
                f"it has {one.samples} rows and the loader brings more samples: give a row for each, or identifiers, "
                "cka_hooks.Precomputed(array, sample_ids=ids)"
            )
        return slice(self.counted.row, self.counted.row + samples)

    def step(self, state: State) -> None:
        """Note that the batch was counted, with the identifiers of its samples if there are any."""
        samples, ids = self._pending
        batches, total, row = self.counted
        self.counted = Counted(batches + 1, total + samples, row + samples)
        if self._aligned:
            self._seen.update(ids)
        self._pending = 0, []
        if not self._of_positions:
            state.identifiers.append(json.dumps(ids if len(ids) == samples else samples))

    def start_pass(self) -> None:
        """Begin another pass over the same samples."""
        self.counted = self.counted._replace(row=0)
        self._seen.clear()

    def reset(self) -> None:
        """Forget everything."""
        self.start_pass()
        self.counted = Counted()


class _Ordered:
    """The rows of an array in another order."""

    def __init__(self, array: Any, order: Sequence[int]) -> None:
        self._array, self._order = array, order
        self.shape = (len(order), *array.shape[1:])

    def __getitem__(self, rows: slice) -> Any:
        return gathered(self._array, self._order[rows])


def is_features(value: Any) -> bool:
    """Whether an entry of the mapping is features: an array, a mapping of arrays, or a `Precomputed`."""
    if isinstance(value, Precomputed | Mapping):
        return True
    is_code = isinstance(value, nn.Module | type) or (callable(value) and not hasattr(value, "shape"))
    return not is_code and hasattr(value, "shape") and hasattr(value, "__getitem__")


def gathered(array: Any, rows: Sequence[int] | slice) -> Any:
    """Some rows of anything with slicing, in that order."""
    if isinstance(rows, slice):
        return array[rows]
    if isinstance(array, Tensor):
        return array[torch.tensor(rows, device=array.device)]
    if isinstance(array, np.ndarray):
        return array[np.array(rows)]
    if hasattr(array, "oindex"):  # zarr: each chunk is read once
        return array.oindex[np.array(rows)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    parts, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or rows[order[end]] != rows[order[end - 1]] + 1:
            parts.append(as_features(array[rows[order[start]] : rows[order[end - 1]] + 1], "a row", counts=True))
            start = end
    back = torch.empty(len(order), dtype=torch.int64, device="cpu")
    back[torch.tensor(order, device="cpu")] = torch.arange(len(order), device="cpu")
    joined = torch.cat(parts)
    return joined[back.to(joined.device)]


def ids_of(batch: Any, key: SampleIds) -> list[Identifier]:
    """The identifiers of a batch's samples.

    Raises:
        BatchError: the batch has no such entry.
        OptionError: the entry does not hold identifiers.
    """
    if callable(key):
        return identifiers(key(batch), "what sample_ids= returned")
    is_listed = isinstance(batch, tuple | list) and isinstance(key, int)
    fields: Mapping[Any, Any] | None = dict(enumerate(batch)) if is_listed else fields_of(batch)
    fields = batch if isinstance(batch, Mapping) else fields
    if fields is None or key not in fields:
        there = "" if fields is None else f"; it has {', '.join(map(repr, islice(fields, 10)))}"
        raise BatchError(f"sample_ids={key!r}: a batch of type {type(batch).__name__} has no such entry{there}")
    return identifiers(fields[key], f"sample_ids={key!r} of a batch")


def without_ids(batch: Any, key: SampleIds | None) -> Any:
    """A mapping without the identifiers of its samples, which a model does not take."""
    if isinstance(batch, Mapping) and isinstance(key, str) and key in batch:
        return {name: item for name, item in batch.items() if name != key}
    return batch


def identifiers(given: Any, what: str) -> list[Identifier]:
    """Identifiers of samples from a list, an array, a tensor or a data set, or from a single one.

    Raises:
        OptionError: one of them is neither a whole number nor text.
    """
    if not isinstance(given, list | tuple | str | bytes | int | range):
        given = given.tolist() if hasattr(given, "tolist") else np.asarray(given).tolist()
    found: list[Identifier] = []
    for item in given if isinstance(given, list | tuple | range) else [given]:
        plain = item.item() if isinstance(item, np.generic) or (isinstance(item, Tensor) and item.ndim == 0) else item
        plain = plain.decode(errors="replace") if isinstance(plain, bytes) else plain
        if isinstance(plain, bool) or not isinstance(plain, int | str):
            raise OptionError(
                f"{what}: {plain!r:.60} does not identify a sample: expected one whole number or one text for each"
            )
        found.append(plain)
    return found


def repeated(ids: Sequence[Identifier]) -> list[Identifier]:
    """The identifiers that are repeated, once each."""
    seen: set[Identifier] = set()
    return list(dict.fromkeys(one for one in ids if one in seen or seen.add(one)))  # type: ignore[func-returns-value]


def _first(found: Sequence[Identifier]) -> str:
    return ", ".join(map(repr, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _checked(array: Any, layer: Any) -> int:
    """The number of rows, after a look at the first one.

    Raises:
        OptionError: this is not an array of numbers, or it has no rows.
    """
    what = f"precomputed features {layer!r}" if layer else "precomputed features"
    if not isinstance(layer, str):
        raise OptionError(f"{what}: layers are text, such as {str(layer)!r}")
    shape = getattr(array, "shape", None)
    if not isinstance(shape, tuple | list) or not hasattr(array, "__getitem__"):
        raise OptionError(f"{what} are {type(array).__name__}: expected an array (N, ...) with shape and slicing")
    if not shape or 0 in shape:
        raise OptionError(f"{what} have shape {tuple(shape)}: expected (N, ...), a row of numbers for each sample")
    as_features(gathered(array, slice(0, 1)), what, counts=True)
    return int(shape[0])
