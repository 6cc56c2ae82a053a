"""Read files of features: `.npy`, `.npz`, `.safetensors` and HDF5, a batch at a time and without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cka_hooks.errors import OptionError, imported
from cka_hooks.files import replace_file
from cka_hooks.names import closest

SUFFIXES = (".npy", ".npz", ".safetensors", ".h5", ".hdf5")
IDS = "sample_ids"


def is_feature_file(spec: str) -> bool:
    """Whether a word names such a file, or one array in it."""
    return spec.partition("::")[0].lower().endswith(SUFFIXES)


def opened(file: str | os.PathLike[str]) -> tuple[dict[str, Any], Any]:
    """The arrays of a file by name, "" for a single one, and the identifiers of their rows, None if it has none.

    Args:
        file: path of the file, with ``::name`` for one of its arrays.

    Raises:
        OptionError: this is not such a file, it is damaged, or it has no array of that name.
        MissingExtraError: h5py is not installed.
        OSError: the file cannot be read.
    """
    path, _, name = os.fspath(file).partition("::")
    reader = _READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise OptionError(f"{path} is not a file of features that can be read: expected {', '.join(SUFFIXES)}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        found, sample_ids = reader(path, name)
        arrays = {key: found[key] for key in ([name] if name else found) if key != IDS}
    except KeyError:
        near = ", ".join(map(repr, closest(name, list(found)))) or "none"
        raise OptionError(f"{path} has no array {name!r}: the closest are {near}") from None
    except (ValueError, EOFError, SafetensorError, RuntimeError, BadZipFile) as error:
        raise OptionError(f"could not read {path} as features ({type(error).__name__}: {error})") from error
    if not arrays:
        raise OptionError(f"{path} has no array of features; name one inside a group with {path}::group/name")
    return (arrays if len(arrays) > 1 else {"": next(iter(arrays.values()))}), sample_ids


def write(path: Path, arrays: Mapping[str, Tensor], sample_ids: Sequence[int | str] | None) -> None:
    """Write arrays (N, ...) with the identifiers of their rows to a safetensors file, by replacing it.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {"format": "cka_hooks.features"}
    if sample_ids is not None:
        metadata[IDS] = json.dumps(list(sample_ids))
    data = safetensors.torch.save({name: array.contiguous() for name, array in arrays.items()}, metadata)
    replace_file(path, lambda file: file.write(data))


class _Slices:
    """A tensor of a safetensors file that is read as it is sliced."""

    def __init__(self, file: Any, name: str) -> None:
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        found: Tensor = self._slice[rows]
        return found


def _numpy(path: str, _: str) -> tuple[Mapping[str, Any], Any]:
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    return (found, found.get(IDS)) if isinstance(found, Mapping) else ({"": found}, None)


def _safetensors(path: str, _: str) -> tuple[Mapping[str, Any], Any]:
    file: Any = safe_open(path, framework="pt")
    names = list(file.keys())
    text = (file.metadata() or {}).get(IDS)
    sample_ids = json.loads(text) if text is not None else file.get_tensor(IDS) if IDS in names else None
    return {name: _Slices(file, name) for name in names}, sample_ids


def _hdf5(path: str, name: str) -> tuple[Mapping[str, Any], Any]:
    h5py = imported("h5py", f"{path} needs h5py", "h5py")
    file = h5py.File(path, "r")
    group = file[name.rpartition("/")[0] or "/"] if name in file else file
    found = {key: item for key, item in group.items() if isinstance(item, h5py.Dataset)}
    return file if name in file else found, found[IDS][:] if IDS in found else None


_READERS = {".npy": _numpy, ".npz": _numpy, ".safetensors": _safetensors, ".h5": _hdf5, ".hdf5": _hdf5}
