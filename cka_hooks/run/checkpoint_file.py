"""Store a run's state as a safetensors file: read without pickle, refused if it is damaged or edited.

The tensors are the sums and the states of random generators. The metadata holds one JSON text with everything else,
and a SHA-256 of both, so that a damaged or edited file is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cka_hooks.errors import CheckpointError
from cka_hooks.files import replace_file

FORMAT = "cka_hooks.checkpoint"
VERSION = 2
# Larger files are refused unread: 4 GiB hold the sums of 11,000 layers.
MAX_BYTES = 1 << 32

# The errors that reading and restoring a forged file may raise.
WRONG = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, ArithmeticError)


def write(path: Path, content: Any) -> None:
    """Write nested plain values and tensors to a file, by replacing it.

    A reader finds either the old file or the new one, even after a power cut.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    whole = {"format": FORMAT, "version": VERSION, "content": content}
    text = json.dumps(_without_tensors(whole, tensors))
    metadata = {"cka_hooks": text, "sha256": _digest(text, tensors)}
    data = safetensors.torch.save(tensors, metadata)
    replace_file(path, lambda file: file.write(data))


def read(path: Path) -> dict[str, Any]:
    """Read what :func:`write` wrote.

    Raises:
        CheckpointError: the file is anything else. The message says what is wrong.
        OSError: it cannot be read.
    """

    def refused(reason: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is not a checkpoint that this version of cka_hooks wrote: {reason}. Delete it to start from the "
            "beginning"
        )

    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise refused("it is not a file")
    if status.st_size > MAX_BYTES:
        raise refused(f"it is larger than {MAX_BYTES:,} bytes")
    data = path.read_bytes()
    try:
        return _content(data)
    except CheckpointError as error:
        raise refused(str(error)) from None
    except SafetensorError as error:
        raise refused(f"it is not a complete safetensors file ({error})") from error
    except RecursionError as error:
        raise refused("it is nested too deeply") from error
    except WRONG as error:
        raise refused(f"its content is invalid ({type(error).__name__}: {error})") from error


def _content(data: bytes) -> dict[str, Any]:
    # Otherwise safetensors makes them on PyTorch's default device.
    with torch.device("cpu"):
        tensors = safetensors.torch.load(data)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    text = metadata["cka_hooks"]
    if metadata["sha256"] != _digest(text, tensors):
        raise CheckpointError("its checksum does not match its content, so it was edited or damaged")
    decoded = json.loads(text)
    if isinstance(decoded, list):
        raise CheckpointError("an earlier version wrote it, and its sums differ")
    whole = _joined(decoded, tensors)
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise CheckpointError(f"it is not of the format {FORMAT!r}")
    if whole["version"] != VERSION:
        raise CheckpointError(
            f"it is of version {whole['version']!r:.40}, and this version of cka_hooks reads version {VERSION}"
        )
    found = whole["content"]
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise CheckpointError("it has no settings")
    # Plain values only, because comparing tensors gives no truth value.
    json.dumps(found["settings"])
    return found


def is_plain(value: Any) -> bool:
    """Whether the file would give the value back as it was."""
    try:
        tensors: dict[str, Tensor] = {}
        return _same(_joined(json.loads(json.dumps(_without_tensors(value, tensors))), tensors), value)
    except (TypeError, ValueError, RecursionError):
        return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested lists and mappings in which each tensor is replaced by its name."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(value, dict):
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    return [_without_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        return {key: _joined(item, tensors) for key, item in value.items()}
    return [_joined(item, tensors) for item in value] if isinstance(value, list) else value


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
