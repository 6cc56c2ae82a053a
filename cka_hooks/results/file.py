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
import stat
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from cka_hooks.errors import OptionError, ResultFileError
from cka_hooks.files import PathLike, replace_file
from cka_hooks.results.result import CKAResult, Influence

FORMAT = "cka_hooks.result"
VERSION = 1

#: Larger files are refused unread, and never written.
MAX_BYTES = 1 << 30
# A float takes at most 24 characters and a separator, so this many stay below MAX_BYTES.
_MAX_NUMBERS = 40_000_000
# Python may need 30 times the memory of a text for what it makes of it. Files with more commas (numbers), brackets
# (lists) or quotation marks than a result can have are not parsed, so that 5 GB are enough for any file.
_MAX_MARKS = {b",": _MAX_NUMBERS + 10_000_000, b"[": 5_000_000, b"{": 1_000_000, b'"': 10_000_000}

_FIELDS = dataclasses.fields(CKAResult)
_REQUIRED = {"format", "format_version", "sha256"} | {
    entry.name
    for entry in _FIELDS
    if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
}


def write_result(result: CKAResult, path: PathLike) -> None:
    """Write ``result`` to ``path``; see :meth:`CKAResult.save`.

    Raises:
        OptionError: the result is larger than :func:`read_result` would read.
        OSError: the file cannot be written.
    """
    values = [getattr(result, entry.name) for entry in _FIELDS]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = sum(tensor.numel() for tensor in tensors)
    lists = sum(tensor.numel() // max(tensor.shape[-1], 1) + len(tensor) for tensor in tensors)
    if numbers > _MAX_NUMBERS or lists > _MAX_MARKS[b"["] - 1000:
        raise OptionError(
            f"{path}: the result holds {numbers:,} numbers in {lists:,} rows, and a result file at most "
            f"{_MAX_NUMBERS:,} in {_MAX_MARKS[b'['] - 1000:,}. "
            "save(path, minibatches=False) leaves out the values of single minibatches and permutations"
        )
    document: dict[str, Any] = {"format": FORMAT, "format_version": VERSION}
    for entry, value in zip(_FIELDS, values, strict=True):
        document[entry.name] = _plain(value)
    document["sha256"] = _digest(document)
    lines = ",\n".join(f"{json.dumps(key)}: {_text(value)}" for key, value in document.items())
    replace_file(path, lambda file: file.write(f"{{\n{lines}\n}}\n".encode("ascii")))


def read_result(path: PathLike) -> CKAResult:
    """Read what :func:`write_result` wrote; see :meth:`CKAResult.load`.

    Raises:
        ResultFileError: the file is anything else. The message has the path and the reason.
        FileNotFoundError: there is no such file.
    """

    def refuse(reason: str, cause: BaseException | None = None) -> NoReturn:
        raise ResultFileError(
            f"{os.fspath(path)} is not a result that this version of cka_hooks saved: {reason}. "
            "Save the result again with result.save(path)"
        ) from cause

    content = _read(path, refuse)
    try:
        document = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except UnicodeDecodeError as error:
        refuse("it is not UTF-8 text", error)
    except RecursionError as error:
        refuse("its lists or objects are nested too deeply", error)
    except ValueError as error:
        refuse(f"it is not complete, plain JSON ({error})", error)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        refuse(f'it has no "format": "{FORMAT}"')
    if type(document.get("format_version")) is not int or document["format_version"] != VERSION:
        refuse(
            f"its format_version is {document.get('format_version')!r:.40}, and this version of cka_hooks reads "
            f"version {VERSION}"
        )
    types = {entry.name: str(entry.type) for entry in _FIELDS}
    odd = sorted(_REQUIRED - document.keys() or document.keys() - types.keys() - _REQUIRED)
    if odd:
        refuse(f"the key {odd[0]!r:.60} is {'missing' if odd[0] in _REQUIRED else 'not one of its keys'}")
    try:
        if document["sha256"] != _digest(document):
            refuse("its checksum does not match its content, so it was edited or damaged")
        return CKAResult(
            **{name: _READERS[kind](name, document[name]) for name, kind in types.items() if name in document}
        )
    except RecursionError as error:
        refuse("its lists or objects are nested too deeply", error)
    except (OptionError, ValueError) as error:
        if isinstance(error, ResultFileError):
            raise
        refuse(str(error).rstrip("."), error)


def _read(path: PathLike, refuse: Callable[[str], NoReturn]) -> bytes:
    # Check before opening: opening a pipe would wait for somebody to write into it.
    if not stat.S_ISREG(os.stat(path).st_mode):
        refuse("it is not a file")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        refuse(f"it is larger than {MAX_BYTES:,} bytes")
    for mark, most in _MAX_MARKS.items():
        if content.count(mark) > most:
            refuse(f"it contains {mark.decode()!r} more than {most:,} times, which no result does")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object repeats a key")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def _text(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), sort_keys=False)


def _digest(document: dict[str, Any]) -> str:
    sha = hashlib.sha256()
    for piece in _canonical({key: value for key, value in document.items() if key != "sha256"}, 2):
        sha.update(piece.encode("ascii"))
    return sha.hexdigest()


def _canonical(value: object, depth: int) -> Iterator[str]:
    """JSON with sorted keys and without spaces, in pieces, since the whole would be as large as the file."""
    if not depth or not value or not isinstance(value, dict | list):
        yield json.dumps(value, allow_nan=False, separators=(",", ":"), sort_keys=True)
        return
    start, end = "{}" if isinstance(value, dict) else "[]"
    for item in sorted(value) if isinstance(value, dict) else value:
        yield start
        if isinstance(value, dict):
            yield f"{json.dumps(item)}:"
        yield from _canonical(value[item] if isinstance(value, dict) else item, depth - 1)
        start = ","
    yield end


def _plain(value: Any) -> Any:
    """A field of a result, in types that JSON has."""
    if isinstance(value, torch.Tensor):
        return _null_for_nan(value.tolist())
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Influence):
        named = {} if value.identifier is None else {"identifier": value.identifier}
        return {"share": None if math.isnan(value.share) else value.share, "sample": value.sample, **named}
    return value


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_null_for_nan(item) for item in value]
    return None if value != value else value


def _labels(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return tuple(value)
    raise ValueError(f"{name} is not a list of text")


def _count(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    raise ValueError(f"{name} is not a whole number")


def _object(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError(f"{name} is not an object")


def _reasons(name: str, value: Any) -> dict[str, str]:
    if all(isinstance(reason, str) for reason in _object(name, value).values()):
        return _object(name, value)
    raise ValueError(f"{name} gives a reason that is not text")


def _influences(name: str, value: Any) -> dict[str, Influence]:
    found = {}
    for layer, item in _object(name, value).items():
        if not (isinstance(item, dict) and item.keys() - {"identifier"} == {"share", "sample"}):
            raise ValueError(f"{name} is not {{layer: {{share, sample}}}}")
        share, sample = item["share"], item["sample"]
        if type(sample) is not int or not 0 <= sample <= (1 << 53) or not (share is None or type(share) is float):
            raise ValueError(f"{name} is not {{layer: {{share, sample}}}} with a number and a position")
        identifier = item.get("identifier")
        if type(identifier) not in (int, str, type(None)):
            raise ValueError(f"{name} has an identifier that is neither a whole number nor text")
        found[layer] = Influence(math.nan if share is None else share, sample, identifier)
    return found


def _tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor with as many dimensions as the lists are deep. The result checks whether they fit."""
    shape: list[int] = []
    level = [value]
    while level and isinstance(level[0], list) and len(shape) < 3:
        if len({len(item) if isinstance(item, list) else -1 for item in level}) > 1:
            raise ValueError(f"{name} has rows of different lengths")
        shape.append(len(level[0]))
        level = [item for part in level for item in part]
    if not all(item is None or type(item) is float for item in level):
        raise ValueError(f"{name} holds something that is neither a number with a fraction nor null")
    numbers = [math.nan if item is None else item for item in level]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(shape)


def _tensor_or_none(name: str, value: Any) -> torch.Tensor | None:
    return None if value is None else _tensor(name, value)


#: For each type of a field, a function of (its name, its JSON) that returns its value or raises ValueError.
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "tuple[str, ...]": _labels,
    "int": _count,
    "dict[str, Any]": _object,
    "dict[str, str]": _reasons,
    "dict[str, Influence]": _influences,
    "torch.Tensor": _tensor,
    "torch.Tensor | None": _tensor_or_none,
}
