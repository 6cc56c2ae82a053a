"""Features that somebody else computed: rows of arrays, in the order of the loader or found by identifiers.

Files of features are `.npy`, `.npz`, `.safetensors` and HDF5. They are read a batch at a time and without pickle.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cka_hooks.arrays import as_features
from cka_hooks.errors import BatchError, OptionError, SampleCountError, imported
from cka_hooks.files import replace_file
from cka_hooks.names import closest, first_few, labelled
from cka_hooks.recording.batches import fields_of

Identifier: TypeAlias = int | str
# A key of the batch, or a function that returns the identifiers of its samples.
SampleIds: TypeAlias = str | int | Callable[[Any], Any]
# The array of identifiers in a file.
_IDS = "sample_ids"


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
        shapes: the shape of one row of each array, by layer.

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
        self.arrays: dict[str, Any] = dict(array) if isinstance(array, Mapping) else {"": array}
        if not self.arrays:
            raise OptionError("the mapping of precomputed features is empty: give it at least one array")
        rows = {layer: _checked(one, layer) for layer, one in self.arrays.items()}
        if len(set(rows.values())) > 1:
            raise OptionError(f"precomputed arrays have different numbers of rows, {rows}: give one for each sample")
        self.shapes = {layer: tuple(one.shape[1:]) for layer, one in self.arrays.items()}
        self.samples = next(iter(rows.values()))
        self.sample_ids = None if sample_ids is None else identifiers(sample_ids, "sample_ids of Precomputed")
        self._row = {identifier: row for row, identifier in enumerate(self.sample_ids or ())}
        if self.sample_ids is not None and not len(self._row) == len(self.sample_ids) == self.samples:
            raise OptionError(
                f"Precomputed has {self.samples} rows and {len(self.sample_ids)} sample_ids, and each row needs "
                f"its own; twice in sample_ids: {first_few([*map(repr, repeated(self.sample_ids))]) or 'none'}"
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
        path, _, name = os.fspath(file).partition("::")
        reader = _READERS.get(Path(path).suffix.lower())
        if reader is None:
            raise OptionError(f"{path} is not a file of features that can be read: expected {', '.join(_READERS)}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            found, sample_ids = reader(path, name)
            arrays = {key: found[key] for key in ([name] if name else found) if key != _IDS}
        except KeyError:
            near = ", ".join(map(repr, closest(name, list(found)))) or "none"
            raise OptionError(f"{path} has no array {name!r}: the closest are {near}") from None
        except (ValueError, EOFError, SafetensorError, RuntimeError, BadZipFile) as error:
            raise OptionError(f"could not read {path} as features ({type(error).__name__}: {error})") from error
        if not arrays:
            raise OptionError(f"{path} has no array of features; name one inside a group with {path}::group/name")
        return cls(arrays if len(arrays) > 1 else next(iter(arrays.values())), sample_ids=sample_ids)

    def ordered(self, order: Sequence[int]) -> Precomputed:
        """The same rows in another order, without identifiers. The rows are not read."""
        return Precomputed({layer: _Ordered(array, order) for layer, array in self.arrays.items()})

    def rows_of(self, samples: Sequence[Identifier], name: str) -> list[int]:
        """The row of each sample. Errors call these features by a name.

        Raises:
            SampleCountError: a sample has no row.
        """
        missing = [identifier for identifier in samples if identifier not in self._row]
        if missing:
            raise SampleCountError(
                f"{name!r} has no row for {len(missing)} of the {len(samples)} samples: "
                f"{first_few([*map(repr, missing)])}; its sample_ids look like {next(iter(self._row), None)!r}"
            )
        return [self._row[identifier] for identifier in samples]

    def features(self, rows: Sequence[int], name: str) -> Iterator[tuple[str, Tensor]]:
        """Some rows of each array: pairs of label, ``name/layer``, and features (n, ...)."""
        for layer, array in self.arrays.items():
            label = labelled(name, layer)
            yield label, as_features(gathered(array, rows), label, counts=True)


class _Ordered:
    """The rows of an array in another order."""

    def __init__(self, array: Any, order: Sequence[int]) -> None:
        self._array, self._order = array, order
        self.shape = (len(order), *array.shape[1:])

    def __getitem__(self, rows: slice) -> Any:
        return gathered(self._array, self._order[rows])


def is_features(value: Any) -> bool:
    """Whether an entry of the mapping is features: an array, a mapping of arrays, or a `Precomputed`."""
    is_array = hasattr(value, "shape") and hasattr(value, "__getitem__") and not isinstance(value, nn.Module | type)
    return is_array or isinstance(value, Precomputed | Mapping)


def gathered(array: Any, rows: Sequence[int]) -> Any:
    """Some rows of anything with slicing, in that order."""
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return array[rows[0] : rows[-1] + 1]
    if isinstance(array, Tensor):
        return array[torch.tensor(rows, device=array.device)]
    if isinstance(array, np.ndarray):
        return array[np.array(rows)]
    if hasattr(array, "oindex"):  # zarr: each chunk is read once
        return array.oindex[np.array(rows)]
    if type(array).__module__.startswith("h5py."):  # so does this, given ascending rows
        ascending, places = np.unique(rows, return_inverse=True)
        return array[ascending][places]
    # In ascending order, since files keep the last chunk that they read.
    found = torch.cat([as_features(array[row : row + 1], "a row", counts=True) for row in sorted(rows)])
    return found[torch.tensor(rows, device=found.device).argsort().argsort()]


def ids_of(batch: Any, key: SampleIds) -> list[Identifier]:
    """The identifiers of a batch's samples.

    Raises:
        BatchError: the batch has no such entry.
        OptionError: the entry does not hold identifiers.
    """
    if callable(key):
        return identifiers(key(batch), "what sample_ids= returned")
    fields: Any = batch if isinstance(batch, Mapping) else fields_of(batch) or {}
    fields = dict(enumerate(batch)) if isinstance(batch, tuple | list) else fields
    if key not in fields:
        raise BatchError(f"sample_ids={key!r}: the batch has no such entry; it has {list(fields)[:10]}")
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
        plain = item.item() if isinstance(item, Tensor | np.generic) else item
        plain = plain.decode(errors="replace") if isinstance(plain, bytes) else plain
        if isinstance(plain, bool) or not isinstance(plain, int | str):
            raise OptionError(f"{what}: {plain!r:.60} does not identify a sample: expected a whole number or text")
        found.append(plain)
    return found


def repeated(ids: Sequence[Identifier]) -> list[Identifier]:
    """The identifiers that are repeated, once each."""
    return [one for one, count in Counter(ids).items() if count > 1]


def _checked(array: Any, layer: Any) -> int:
    """The number of rows, after a look at the first one.

    Raises:
        OptionError: this is not an array of numbers, or it has no rows.
    """
    what = f"precomputed features {layer!r}" if layer else "precomputed features"
    if not isinstance(layer, str):
        raise OptionError(f"{what}: layers are text, such as {str(layer)!r}")
    shape = getattr(array, "shape", None)
    if not (isinstance(shape, tuple | list) and shape and 0 not in shape and hasattr(array, "__getitem__")):
        raise OptionError(f"{what} are {type(array).__name__} of shape {shape}: expected an array (N, ...) of rows")
    is_dense = not isinstance(array, Tensor) or array.layout is torch.strided
    as_features(array[:1] if is_dense else array, what, counts=True)
    return int(shape[0])


# Files


def is_feature_file(spec: str) -> bool:
    """Whether a word names such a file, or one array in it."""
    return spec.partition("::")[0].lower().endswith(tuple(_READERS))


def write_features(path: Path, arrays: Mapping[str, Tensor], sample_ids: Sequence[int | str] | None) -> None:
    """Write arrays (N, ...) with the identifiers of their rows to a safetensors file, by replacing it.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {"format": "cka_hooks.features"}
    if sample_ids is not None:
        metadata[_IDS] = json.dumps(list(sample_ids))
    data = safetensors.torch.save({name: array.contiguous() for name, array in arrays.items()}, metadata)
    replace_file(path, lambda file: file.write(data))


class _Slices:
    """A tensor of a safetensors file that is read as it is sliced."""

    def __init__(self, file: Any, name: str) -> None:
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, rows: slice) -> Any:
        return self._slice[rows]


def _numpy(path: str, _: str) -> tuple[Mapping[str, Any], Any]:
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    return (found, found.get(_IDS)) if isinstance(found, Mapping) else ({"": found}, None)


def _safetensors(path: str, _: str) -> tuple[Mapping[str, Any], Any]:
    file: Any = safe_open(path, framework="pt")
    names = list(file.keys())
    text = (file.metadata() or {}).get(_IDS)
    sample_ids = json.loads(text) if text is not None else file.get_tensor(_IDS) if _IDS in names else None
    return {name: _Slices(file, name) for name in names}, sample_ids


def _hdf5(path: str, name: str) -> tuple[Mapping[str, Any], Any]:
    h5py = imported("h5py", f"{path} needs h5py", "h5py")
    file = h5py.File(path, "r")
    group = file[name.rpartition("/")[0] or "/"] if name in file else file
    found = {key: item for key, item in group.items() if isinstance(item, h5py.Dataset)}
    return file if isinstance(file.get(name), h5py.Dataset) else found, found[_IDS][:] if _IDS in found else None


_READERS = {".npy": _numpy, ".npz": _numpy, ".safetensors": _safetensors, ".h5": _hdf5, ".hdf5": _hdf5}
