"""Store a run's state as a safetensors file for one run at a time: read without pickle, refused if it is damaged.

The tensors are the sums and the states of random generators. The metadata holds one JSON text with everything else,
and a SHA-256 of both, so that a damaged or edited file is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cka_hooks.errors import CheckpointError, OptionError
from cka_hooks.files import replace_file

try:
    import fcntl
except ImportError:  # Windows, where two runs on one file are on their own
    fcntl = None  # type: ignore[assignment]

FORMAT = "cka_hooks.checkpoint"
VERSION = 2
_TENSOR = "__tensor__"
# Larger files are refused unread: 4 GiB hold the sums of 11,000 layers.
MAX_BYTES = 1 << 32

# The errors that reading and restoring something else may raise.
UNEXPECTED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, SafetensorError)


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turn every error of unexpected content into one that names the file.

    Raises:
        CheckpointError: something in the block did not find what it expected.
    """
    try:
        yield
    except CheckpointError:
        raise
    except UNEXPECTED as error:
        why = str(error) if isinstance(error, ValueError) else f"its content is invalid ({error!r:.200})"
        raise CheckpointError(
            f"{path} cannot be resumed: {why}. Name another file with checkpoint=, or delete it to start from the "
            "beginning"
        ) from error


def write(path: Path, content: Any) -> None:
    """Write nested plain values and tensors to a file, by replacing it.

    A reader finds either the old file or the new one, even after a power cut.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}

    def name_of(tensor: Tensor) -> dict[str, str]:
        name = f"t{len(tensors)}"
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return {_TENSOR: name}

    text = json.dumps({"format": FORMAT, "version": VERSION, "content": content}, default=name_of)
    metadata = {"cka_hooks": text, "sha256": _digest(text, tensors)}
    data = safetensors.torch.save(tensors, metadata)
    replace_file(path, lambda file: file.write(data))


def read(path: Path) -> Any:
    """Read what :func:`write` wrote.

    Raises:
        CheckpointError: the file is anything else. The message says what is wrong.
        OSError: it cannot be read.
    """
    with refused(path):
        if not path.is_file():
            raise ValueError("it is not a file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        data = path.read_bytes()
        # Otherwise safetensors makes them on PyTorch's default device.
        with torch.device("cpu"):
            tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        text = metadata["cka_hooks"]
        if metadata["sha256"] != _digest(text, tensors):
            raise ValueError("its checksum does not match its content, so it was edited or damaged")
        whole = json.loads(text, object_hook=lambda value: tensors[value[_TENSOR]] if _TENSOR in value else value)
        if not isinstance(whole, dict) or (whole["format"], whole["version"]) != (FORMAT, VERSION):
            raise ValueError(f"another version of cka_hooks wrote it, and this one reads version {VERSION}")
        return whole["content"]


def is_plain(value: Any) -> bool:
    """Whether the file would give a value back as it was."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | Tensor)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    hasher = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


class FileLock:
    """Holds a file for this run until it is released or the process ends, in whatever way.

    Raises:
        CheckpointError: another run holds it; the message says which.
        OptionError: the folder cannot be written to, and the file is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f".{path.name[:100]}.lock")
        # When nothing refers to it any more, it closes, which ends the lock: after Ctrl-C, too.
        self._file: FileIO | None = None
        if fcntl is None:
            return
        try:
            file = FileIO(self._path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
        except (OSError, ValueError) as error:
            if path.exists():
                # What was saved can be read, if not written.
                return
            raise OptionError(f"checkpoint={str(path)!r} cannot be written: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file.fileno(), 200, 0).decode(errors="replace") or "another process"
            file.close()
            raise CheckpointError(
                f"{path} is in use by {holder}: wait for that run, stop it, or name another file with checkpoint="
            ) from error
        except OSError:
            # Some file systems have no locks.
            pass
        self._file = file
        # On a full disk, the file stays empty.
        with suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
