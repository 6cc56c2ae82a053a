"""Keep the progress of a run in a file, so that the same call continues from there.

It is a safetensors file for one run at a time, read without pickle, and refused if it is damaged. The tensors are the
sums and the states of random generators. The metadata holds one JSON text with everything else, and a SHA-256 of
both, so that a damaged or edited file is recognised.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cka_hooks.errors import CheckpointError, OptionError, warn
from cka_hooks.files import remove_unfinished, replace_file
from cka_hooks.options import above_zero, difference
from cka_hooks.run import replay
from cka_hooks.run.ranks import Ranks

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
_log = logging.getLogger("cka_hooks")


class Keeper:
    """Keeps a run in a file: restores it, and saves it every so many seconds.

    Args:
        path: the file, None to keep nothing.
        every: seconds between two saves.
        loader: the loader of the run.
        settings: what has to be the same to continue a run, text and numbers by name.

    Attributes:
        drawn: the loader, as it is iterated.
        finished: whether the file has the whole run.

    Raises:
        OptionError: the loader's order cannot be repeated, or an argument is invalid.
    """

    def __init__(self, path: Path | None, every: float, loader: Iterable[Any], settings: Mapping[str, Any]) -> None:
        self.finished = False
        self.drawn = loader if isinstance(loader, replay.Drawn) else replay.Drawn(loader)
        self._loader: Any = loader
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        # Where the pass was interrupted, and where it is now.
        self._interrupted: dict[str, Any] | None = None
        self._place: dict[str, Any] | None = None
        self._lock: FileIO | None = None
        # The random states of the caller, if resuming has changed them.
        self._outer: dict[str, Any] | None = None
        self._every = above_zero("checkpoint_every", every) or 0.0
        self._next_save = time.monotonic() + self._every
        self._randomness = replay.Randomness(loader if path is not None else None)
        if path is not None and not hasattr(loader, "load_state_dict"):
            self._check_order()

    def _check_order(self) -> None:
        if replay.shuffles_unseeded(self._loader):
            raise OptionError(
                "checkpoint= needs an order that can be repeated, and this loader shuffles without a seed: "
                "DataLoader(..., shuffle=True, generator=torch.Generator().manual_seed(0))"
            )

    def resume(self, restore: Callable[[dict[str, Any]], int], *, progress: bool) -> None:
        """Hand the saved state of the run, if there is one, to `restore`, which returns how many samples it has.

        Raises:
            CheckpointError: the file is not a checkpoint, or another run uses it, or it belongs to one.
            OptionError: the file cannot be written.
            OSError: the file cannot be read.
        """
        if self._path is None:
            return
        # In the run that ends with `done`, so that Ctrl-C never leaves the file held.
        with undisturbed():
            self._lock = locked(self._path)
        remove_unfinished(self._path)
        if not self._path.exists():
            return
        content = read(self._path)
        with refused(self._path):
            if content["settings"] != self._settings:
                found = difference(self._settings, content["settings"])
                raise CheckpointError(
                    f"{self._path} is the checkpoint of another run: {found}. "
                    "Name another file with checkpoint=, or delete this one to start from the beginning"
                )
            samples = restore(content["run"])
            self.finished, self._interrupted = bool(content["finished"]), content["place"]
        note = f"{self._path} has {samples} samples and {'is finished' if self.finished else 'continues from there'}"
        _log.info(note)
        if progress:
            print(f"cka: {note}", file=sys.stderr)

    def batches(self) -> Iterator[Any]:
        """The batches of one pass over the loader; in an interrupted pass, only those that were not seen yet.

        Raises:
            CheckpointError: the loader brings other batches than before.
        """
        if self._path is None:
            return iter(self.drawn)
        with refused(self._path):
            # The fingerprint is one of all batches: every one that is repeated has to be the same as before.
            place = self._interrupted or {"start": self._randomness.state(), "batches": 0, "fingerprint": ""}
            batches, found = int(place["batches"]), ""
            if self._interrupted and self._outer is None:
                self._outer = self._randomness.state()
            self._randomness.restore(place["start"])
            if place.get("loader") is not None:
                self._loader.load_state_dict(place["loader"])
                batches, found = 0, place["fingerprint"]
            stream = iter(self.drawn)
        for _, batch in zip(range(batches), stream, strict=False):
            found = _chained(found, replay.fingerprint(batch))
        if found != place["fingerprint"]:
            raise CheckpointError(
                f"{self._path} cannot be resumed: the first {place['batches']} batches of the loader are not as "
                "before, since the data, their number, their order or a random augmentation changed. Delete it to "
                "start from the beginning"
            )
        if "now" in place:
            # Models may draw from Python and NumPy, too.
            with refused(self._path):
                self._randomness.restore(place["now"])
        self._interrupted, self._place = None, place
        return stream

    def seen(self, fingerprint: str) -> None:
        """Note that a batch is in the sums, by its fingerprint."""
        if self._place is None:
            return
        self._place["batches"] += 1
        self._place["fingerprint"] = _chained(self._place["fingerprint"], fingerprint)
        self._place["now"] = self._randomness.state()
        self._place.pop("loader", None)
        try:
            # Where a `StatefulDataLoader` is. Once it has gone on, it no longer knows.
            state = copy.deepcopy(self._loader.state_dict())
        except (AttributeError, NotImplementedError):
            # A wrapper may pass these methods on to a loader that does not have them.
            self._check_order()
            return
        if is_plain(state):
            self._place["loader"] = state

    def save_if_due(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save if it is time to."""
        if self._path is not None and time.monotonic() >= self._next_save:
            self.save(state)

    def save(self, state: Callable[[], dict[str, Any]], *, finished: bool = False) -> bool:
        """Write this state of the run to the file. If that fails, warn; the run continues.

        Returns:
            Whether it was written.
        """
        self._next_save = time.monotonic() + self._every
        if self._path is None or self.finished:
            return True
        place = None if finished else self._place
        try:
            write(self._path, {"settings": self._settings, "finished": finished, "place": place, "run": state()})
        except OSError as error:
            warn(f"the checkpoint {self._path} could not be written ({error}); the run goes on, with the last save")
            return False
        self.finished = finished
        return True

    def broke_off(self, error: BaseException, state: Callable[[], dict[str, Any]]) -> None:
        """Save a run that an error or Ctrl-C ended, and add to the error how to continue."""
        if self._place is None or self.finished:
            return
        note = f"saved to {self._path} up to here: the same call continues from there"
        if not self.save(state):
            note = f"the checkpoint {self._path} holds the last save"
        _log.warning("run ended by %s; %s", type(error).__name__, note)
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (note,)
        elif hasattr(error, "add_note"):
            error.add_note(note)

    def done(self) -> None:
        """Let others have the file, and the caller its random states of Python and NumPy."""
        if self._outer is not None:
            self._randomness.restore({**self._outer, "generators": self._randomness.state()["generators"]})
            self._outer = None
        if self._lock is not None:
            released(self._lock)
            self._lock = None


def path_of_rank(given: str | os.PathLike[str], ranks: Ranks) -> Path:
    """The file of one rank.

    Raises:
        CheckpointError: there are files of a run on another number of ranks.
        OptionError: it is not the path of a file.
    """
    try:
        path = Path(given)
        suffixes = [f".rank{rank}-of-{ranks.size}" for rank in range(ranks.size)] if ranks.size > 1 else [""]
        own = [path.with_name(path.name + suffix) for suffix in suffixes]
    except (TypeError, ValueError):
        raise OptionError(f"checkpoint={given!r}: expected the path of a file") from None
    if path.is_dir():
        raise OptionError(f"checkpoint={str(path)!r}: this is a folder, name a file in it")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"checkpoint={str(path)!r}: there is no folder {str(path.parent)!r}")
    for other in (path, *path.parent.glob(f"{glob.escape(path.name)}.rank*-of-*")):
        if other not in own and other.exists():
            raise CheckpointError(
                f"{other} is the checkpoint of a run on another number of ranks, and this one is on {len(own)}: "
                "start as many, name another file with checkpoint=, or delete it"
            )
    return own[ranks.rank]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, so that sums never hold part of a minibatch."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    arrived: list[Any] = []
    signal.signal(signal.SIGINT, lambda *caught: arrived.append(caught))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            before(*arrived[0])


def _chained(before: str, fingerprint: str) -> str:
    """The fingerprint of one more batch and all before it."""
    return hashlib.blake2b(f"{before} {fingerprint}".encode(), digest_size=16).hexdigest()


# The file


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


def locked(path: Path) -> FileIO | None:
    """Hold a file for this run, until :func:`released` or the end of the process.

    Returns:
        What holds it; None if this machine has no locks, or if the folder cannot be written to. When nothing refers
        to it any more, it closes, which ends the lock: after Ctrl-C, too.

    Raises:
        CheckpointError: another run holds it; the message says which.
        OptionError: the folder cannot be written to, and the file is not there.
    """
    if fcntl is None:
        return None
    beside = path.with_name(f".{path.name[:100]}.lock")
    try:
        file = FileIO(beside, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    except (OSError, ValueError) as error:
        if path.exists():
            # What was saved can be read, if not written.
            return None
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
    # On a full disk, the file stays empty.
    with suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def released(lock: FileIO) -> None:
    """Let others have the file."""
    with suppress(OSError):
        os.unlink(lock.name)
    lock.close()
