"""A result as a JSON file: written whole or not at all, read back only if it is exactly what was written.

The file is one JSON object with one key to a line, in plain ASCII:

    format, format_version   "cka_hooks.result", 1
    rows, columns            labels
    matrix, stderr           lists of rows; null where undefined
    minibatch_hsic           null, or (B, L, L) nested lists
    influence                {layer: {"share": number, "sample": index}}
    sha256                   of the other keys, so that an edited number does not pass for a measured one

Floats are written in the shortest form that gives the same 64 bits back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from cka_hooks.errors import OptionError, ResultFileError
from cka_hooks.files import PathLike, replace_file
from cka_hooks.results.result import CKAResult, Influence

FORMAT = "cka_hooks.result"
VERSION = 1

#: Files beyond this are refused unread, and never written.
MAX_BYTES = 1 << 30
# A float takes at most 24 characters and a separator, so this many stay below MAX_BYTES.
_MAX_NUMBERS = 40_000_000

_TENSORS = {"matrix": 2, "stderr": 2, "minibatch_hsic": 3}
_LABELS = ("rows", "columns", "models", "minibatch_layers")
_COUNTS = ("samples", "minibatches", "degrees_of_freedom", "passes")
_REASONS = ("degenerate", "skipped")


def write_result(result: CKAResult, path: PathLike) -> None:
    """Write ``result`` to ``path``; see :meth:`CKAResult.save`.

    Raises:
        OptionError: the result is larger than :func:`read_result` would read.
        OSError: the file cannot be written.
    """
    numbers = 2 * result.matrix.numel()
    if result.minibatch_hsic is not None:
        numbers += result.minibatch_hsic.numel()
    if numbers > _MAX_NUMBERS:
        raise OptionError(
            f"{path}: the result holds {numbers:,} numbers and a result file at most {_MAX_NUMBERS:,}. "
            "save(path, minibatches=False) leaves the values of the single minibatches out."
        )
    document: dict[str, Any] = {"format": FORMAT, "format_version": VERSION}
    for entry in dataclasses.fields(result):
        document[entry.name] = _plain(getattr(result, entry.name))
    document["sha256"] = _digest(document)
    lines = ",\n".join(f"{json.dumps(key)}: {_text(value)}" for key, value in document.items())
    replace_file(path, lambda file: file.write(f"{{\n{lines}\n}}\n".encode("ascii")))


def read_result(path: PathLike) -> CKAResult:
    """Read what :func:`write_result` wrote; see :meth:`CKAResult.load`.

    Raises:
        ResultFileError: the file is anything else; the message has the path and the reason.
        FileNotFoundError: there is no such file.
    """

    def refuse(reason: str, cause: BaseException | None = None) -> NoReturn:
        raise ResultFileError(
            f"{os.fspath(path)} is not a result that this version of cka_hooks saved: {reason}. "
            "Save the result again with result.save(path)."
        ) from cause

    try:
        document = json.loads(
            _read(path, refuse).decode("utf-8"),
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
        refuse(f"its format_version is {document.get('format_version')!r:.40}, and {VERSION} is the one known")
    names = {entry.name for entry in dataclasses.fields(CKAResult)}
    expected = names | {"format", "format_version", "sha256"}
    if document.keys() != expected:
        odd = sorted(document.keys() ^ expected)[0]
        refuse(f"the key {odd!r:.60} is {'missing' if odd in expected else 'not one of its keys'}")
    try:
        if document["sha256"] != _digest(document):
            refuse("its checksum does not fit its content, so it was edited or damaged")
        return CKAResult(**{name: _field(name, document[name]) for name in names})
    except RecursionError as error:
        refuse("its lists or objects are nested too deeply", error)
    except (OptionError, ValueError) as error:
        if isinstance(error, ResultFileError):
            raise
        refuse(str(error).rstrip("."), error)


def _read(path: PathLike, refuse: Callable[[str], NoReturn]) -> bytes:
    # Looked at before it is opened: opening a pipe would wait for somebody to write into it.
    if not stat.S_ISREG(os.stat(path).st_mode):
        refuse("it is not a file")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        refuse(f"it is larger than {MAX_BYTES:,} bytes")
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
    content = {key: value for key, value in document.items() if key != "sha256"}
    canonical = json.dumps(content, allow_nan=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _plain(value: Any) -> Any:
    """A field of a result in the types JSON has."""
    if isinstance(value, torch.Tensor):
        return _null_for_nan(value.tolist())
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Influence):
        return {"share": None if math.isnan(value.share) else value.share, "sample": value.sample}
    return value


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_null_for_nan(item) for item in value]
    return None if value != value else value


def _field(name: str, value: Any) -> Any:
    """The value of one field from its JSON, or a ValueError that says what is wrong with it."""
    if name in _TENSORS:
        if value is None and name == "minibatch_hsic":
            return None
        return _tensor(name, value, _TENSORS[name])
    if name in _LABELS:
        if not (isinstance(value, list) and all(isinstance(label, str) for label in value)):
            raise ValueError(f"{name} is not a list of text")
        return tuple(value)
    if name in _COUNTS:
        if type(value) is not int:
            raise ValueError(f"{name} is not a whole number")
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    if name in _REASONS and not all(isinstance(reason, str) for reason in value.values()):
        raise ValueError(f"{name} gives a reason that is not text")
    if name == "influence":
        return {layer: _influence(item) for layer, item in value.items()}
    return value


def _influence(value: Any) -> Influence:
    if isinstance(value, dict) and value.keys() == {"share", "sample"}:
        share, sample = value["share"], value["sample"]
        if type(sample) is int and (share is None or type(share) is float):
            return Influence(math.nan if share is None else share, sample)
    raise ValueError("influence is not {layer: {share, sample}}")


def _tensor(name: str, value: Any, dimensions: int) -> torch.Tensor:
    shape: list[int] = []
    level = [value]
    for _ in range(dimensions):
        if not all(isinstance(item, list) for item in level):
            raise ValueError(f"{name} is not a list nested {dimensions} deep")
        lengths = {len(item) for item in level}
        if len(lengths) > 1:
            raise ValueError(f"{name} has rows of different lengths")
        # Nothing further in where a list is empty; its inner lengths are then 0 too.
        shape.append(lengths.pop() if lengths else 0)
        level = [item for part in level for item in part]
    if not all(item is None or type(item) is float for item in level):
        raise ValueError(f"{name} holds something that is neither a number with a fraction nor null")
    numbers = [math.nan if item is None else item for item in level]
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)
