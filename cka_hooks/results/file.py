"""Save a result as a JSON file, whole or not at all, and read it back only if it is exactly what was written.

The file is one JSON object with one key to a line, in plain ASCII:

    format, format_version   "cka_hooks.result", 1
    rows, columns            labels
    matrix, stderr           lists of rows; null where undefined
    minibatch_hsic           null, or (B, L, L) nested lists; permuted likewise
    influence                {layer: {"share": number, "sample": index}}, and "identifier" where samples have them
    sha256                   of the other keys, so that an edited number does not pass for a measured one

The other keys are the other fields of :class:`CKAResult`. A field with a default may be missing, in a file of a
version that did not have it. Floats are written in the shortest form that gives the same 64 bits back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from typing import Any

import numpy as np
import torch

from cka_hooks.errors import OptionError, ResultFileError
from cka_hooks.files import PathLike, replace_file
from cka_hooks.results.result import CKAResult, Influence

_COMPACT = (",", ":")
FORMAT: dict[str, Any] = {"format": "cka_hooks.result", "format_version": 1}

#: Larger files are refused unread.
MAX_BYTES = 1 << 30
#: Larger results are not written. A float takes at most 24 characters and a separator, so they stay below MAX_BYTES.
MAX_NUMBERS = 40_000_000
# Python may need 30 times the memory of a text for what it makes of it, so that texts with more values than a result
# can have are not parsed.
_MAX_COMMAS = MAX_NUMBERS + 10_000_000


def write_result(result: CKAResult, path: PathLike) -> None:
    """Write ``result`` to ``path``; see :meth:`CKAResult.save`.

    Raises:
        OptionError: the result is larger than :func:`read_result` would read.
        OSError: the file cannot be written.
    """
    numbers = sum(value.numel() for value in vars(result).values() if isinstance(value, torch.Tensor))
    if numbers > MAX_NUMBERS:
        raise OptionError(
            f"{path}: the result holds {numbers:,} numbers, and a result file at most {MAX_NUMBERS:,}. "
            "save(path, minibatches=False) leaves out the values of single minibatches and permutations"
        )
    document = FORMAT | fields_as_json(result)
    document["sha256"] = _digest(document)
    lines = ",\n".join(f'"{key}": {json.dumps(value, separators=_COMPACT)}' for key, value in document.items())
    replace_file(path, lambda file: file.write(f"{{\n{lines}\n}}\n".encode("ascii")))


def read_result(path: PathLike) -> CKAResult:
    """Read what :func:`write_result` wrote; see :meth:`CKAResult.load`.

    Raises:
        ResultFileError: the file is anything else. The message has the path and the reason.
        FileNotFoundError: there is no such file.
    """
    try:
        return _result(json.loads(_content(path), object_pairs_hook=_without_repeats))
    # Files can hold anything, and the result checks its own fields.
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        why = f"it is not complete JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ResultFileError(
            f"{os.fspath(path)} is not a result that this version of cka_hooks saved: {why.rstrip('.')}. "
            "Save the result again with result.save(path)"
        ) from error


def _content(path: PathLike) -> bytes:
    # Check before opening: opening a pipe would wait for somebody to write into it.
    if os.stat(path).st_size > MAX_BYTES or not os.path.isfile(path):
        raise ValueError(f"it is not a file of at most {MAX_BYTES:,} bytes")
    with open(path, "rb") as file:
        content = file.read()
    if content.count(b",") > _MAX_COMMAS:
        raise ValueError(f"it has more than {_MAX_COMMAS:,} commas, which no result has")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of whose repeated keys one would be read and another shown by another program."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"its key {key!r:.40} is repeated")
        found[key] = value
    return found


def _result(document: Any) -> CKAResult:
    for key, expected in FORMAT.items():
        found = document.get(key) if isinstance(document, dict) else None
        if found != expected:
            raise ValueError(f"its {key} is {found!r:.40}, and this version of cka_hooks reads {expected!r}")
    if document.pop("sha256", None) != _digest(document):
        raise ValueError("its checksum does not match its content, so it was edited or damaged")
    fields = {key: value for key, value in document.items() if key not in FORMAT}
    for entry in dataclasses.fields(CKAResult):
        value = fields.get(entry.name)
        if value is not None and "Tensor" in str(entry.type):
            # None becomes NaN.
            fields[entry.name] = torch.from_numpy(np.array(value, dtype=np.float64))
        elif value is not None and "Influence" in str(entry.type):
            fields[entry.name] = {layer: _influence(**item) for layer, item in value.items()}
    return CKAResult(**fields)


def _influence(share: float | None, sample: int, identifier: int | str | None = None) -> Influence:
    return Influence(math.nan if share is None else share, sample, identifier)


def _digest(document: dict[str, Any]) -> str:
    """Of everything in JSON with sorted keys and without spaces, since another program may format the file anew."""
    text = json.dumps(document, allow_nan=False, separators=_COMPACT, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def fields_as_json(result: CKAResult) -> dict[str, Any]:
    """All fields in types that JSON has, None for NaN."""
    return {entry.name: _plain(getattr(result, entry.name)) for entry in dataclasses.fields(result)}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return np.where(value.isnan(), np.array(None), value.numpy()).tolist()
    if isinstance(value, Influence):
        return {name: None if it != it else it for name, it in vars(value).items() if it is not None}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
