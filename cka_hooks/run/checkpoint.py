"""Where a run is, in a file: written whole or not at all, read without pickle, refused where it does not fit.

A checkpoint is a safetensors file. Its tensors are the sums of the accumulator and the states of random
generators; its metadata has one JSON text with all the rest, and a SHA-256 of both, so that a damaged or
edited file is told from a good one.
"""

from __future__ import annotations

import base64
import copy
import glob
import hashlib
import json
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cka_hooks.errors import CheckpointError, OptionError
from cka_hooks.files import replace_file, unfinished_prefix
from cka_hooks.run import replay
from cka_hooks.run.ranks import Ranks

FORMAT = "cka_hooks.checkpoint"
VERSION = 1
# Larger files are refused unread: 4 GiB are the sums of 11,000 layers.
MAX_BYTES = 1 << 32

_log = logging.getLogger("cka_hooks")
# What reading, decoding and restoring a file that somebody made up may raise.
_WRONG = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, ArithmeticError)


class Keeper:
    """Keeps a run in a file: puts it back where it was, and saves it every so many seconds.

    Args:
        path: the file, None to keep nothing.
        every: seconds between two saves.
        loader: what the run goes over.
        settings: what has to be the same for a run to go on, text and numbers by name.

    Raises:
        OptionError: the loader's order cannot be had again, or `every` is not positive.
        CheckpointError: the file is no checkpoint, or one of another run.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        every: float,
        loader: Iterable[Any],
        settings: Mapping[str, Any],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.finished = False
        self._loader = loader
        self._settings = json.loads(json.dumps(settings))
        self._saved: dict[str, Any] | None = None
        self._place: dict[str, Any] | None = None
        self._outer: dict[str, Any] | None = None
        self._current: str | None = None
        if self.path is None:
            return
        if not every > 0:
            raise OptionError(f"checkpoint_every={every!r} must be above 0: it is a number of seconds")
        self._stateful = _is_stateful(loader)
        if not self._stateful:
            self._check_order()
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise OptionError(f"checkpoint={str(self.path)!r}: there is no folder {str(folder)!r}")
        self._randomness = replay.Randomness(loader)
        self._every = every
        self._next_save = time.monotonic() + every
        for left in folder.glob(f"{glob.escape(unfinished_prefix(self.path))}*.part"):
            left.unlink(missing_ok=True)
        if self.path.exists():
            self._saved = self._read(self.path)

    def _check_order(self) -> None:
        if replay.shuffles_unseeded(self._loader):
            raise OptionError(
                "checkpoint= needs a loader that can be gone over again, and this one shuffles without a seeded "
                "generator: DataLoader(..., shuffle=True, generator=torch.Generator().manual_seed(0))"
            )

    # Going on

    def resume(self, restore: Callable[[dict[str, Any]], None]) -> bool:
        """Hand the saved state of the run to `restore`; whether there was one.

        Raises:
            CheckpointError: the state is not one that a run has.
        """
        if self._saved is None:
            return False
        try:
            self.finished = bool(self._saved["finished"])
            restore(self._saved["run"])
        except _WRONG as error:
            raise self._refused(f"its content is not that of a run ({error})") from error
        return True

    def batches(self) -> Iterator[Any]:
        """The batches of one pass over the loader; of the pass that broke off, those that were not seen yet.

        Raises:
            CheckpointError: the loader brings other batches than it did.
        """
        if self.path is None:
            return iter(self._loader)
        saved, self._saved = self._saved, None
        if saved is not None and saved["place"] is not None:
            stream = self._again(saved["place"])
        else:
            start = self._randomness.state()
            stream = iter(self._loader)
            self._place = self._place_now(start, 0, None)
        return self._watched(stream)

    def _watched(self, stream: Iterator[Any]) -> Iterator[Any]:
        for batch in stream:
            # Before the model has it, which may change it in place.
            self._current = replay.fingerprint(batch)
            yield batch

    def _place_now(self, start: dict[str, Any], batches: int, fingerprint: str | None) -> dict[str, Any]:
        """Where the loader is; taken after each batch, since a loader that has gone on cannot tell."""
        loader = None
        if self._stateful:
            try:
                loader = copy.deepcopy(self._loader.state_dict())  # type: ignore[attr-defined]
            except (AttributeError, NotImplementedError):
                # Some wrappers have the method and only pass it on to a loader that may not.
                self._stateful = False
                self._check_order()
        return {
            "start": start,
            "batches": batches,
            "fingerprint": fingerprint,
            "now": self._randomness.state(),
            "loader": loader if _is_plain(loader) else None,
        }

    def _again(self, place: dict[str, Any]) -> Iterator[Any]:
        if self._outer is None:
            self._outer = self._randomness.state()
        try:
            self._randomness.restore(place["start"])
            if place["loader"] is not None:
                self._loader.load_state_dict(place["loader"])  # type: ignore[attr-defined]
            stream = iter(self._loader)
            if place["loader"] is None:
                self._skip(stream, int(place["batches"]), place["fingerprint"])
            self._randomness.restore(place["now"])
        except _WRONG as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._refused(f"its place in the loader does not fit this loader ({error})") from error
        self._place = place
        return stream

    def _skip(self, stream: Iterator[Any], batches: int, fingerprint: str | None) -> None:
        for number in range(batches):
            try:
                batch = next(stream)
            except StopIteration:
                raise self._refused(
                    f"it has seen {batches} batches and the loader ended after {number}: it is another loader"
                ) from None
            if number == batches - 1 and replay.fingerprint(batch) != fingerprint:
                raise self._refused(
                    f"batch {number} (counted from 0) of the loader is another one than it was: the data, their "
                    "order or a random augmentation changed"
                )

    # Saving

    def seen(self) -> None:
        """A batch is in the sums."""
        if self._place is not None:
            place = self._place
            self._place = self._place_now(place["start"], place["batches"] + 1, self._current)

    def save_if_due(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save where it is time to.

        Raises:
            OSError: the file cannot be written; the one before it is still there.
        """
        if self.path is not None and time.monotonic() >= self._next_save:
            self.save(state())

    def save(self, state: dict[str, Any], *, finished: bool = False) -> None:
        """Replace the file by one with this state of the run.

        Raises:
            OSError: it cannot be written; the file before it is still there.
        """
        if self.path is None or self.finished:
            return
        place = None if finished else self._place
        write(self.path, {"settings": self._settings, "finished": finished, "place": place, "run": state})
        self.finished = finished
        self._next_save = time.monotonic() + self._every

    def broke_off(self, error: BaseException, state: Callable[[], dict[str, Any]]) -> None:
        """Save what an error or Ctrl-C ended, and say in it how to go on."""
        if self.path is None or self._place is None or self.finished:
            return
        try:
            self.save(state())
        except OSError as failure:
            note = f"the checkpoint {self.path} could not be written ({failure}); it is as old as its last save"
        else:
            note = f"saved in {self.path} up to here: the same call goes on from there"
        _log.warning("run ended by %s; %s", type(error).__name__, note)
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (note,)
        elif hasattr(error, "add_note"):
            error.add_note(note)

    def done(self) -> None:
        """Give Python's and NumPy's random state back, where resuming has changed it."""
        if self._outer is not None:
            generators = self._randomness.state()["generators"]
            self._randomness.restore({**self._outer, "generators": generators})
            self._outer = None

    def tell(self, samples: int, progress: bool) -> None:
        """Say that the run goes on, or had ended already."""
        where = "is finished: its saved result" if self.finished else "goes on from there"
        note = f"{self.path} has {samples} samples and {where}"
        _log.info(note)
        if progress:
            print(f"cka: {note}", file=sys.stderr)

    # Reading

    def _read(self, path: Path) -> dict[str, Any]:
        content = read(path)
        settings = content["settings"]
        if settings != self._settings:
            name, theirs, ours = _difference(settings, self._settings)
            raise CheckpointError(
                f"{path} is the checkpoint of another run: {name} is {theirs} there and {ours} here. Name another "
                "file with checkpoint=, or delete this one to start from the beginning"
            )
        return content

    def _refused(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be resumed: {reason}. Delete it to start from the beginning")


def write(path: Path, content: Any) -> None:
    """Write nested plain values and tensors to a file, by replacing it.

    A reader, and whoever comes after a power cut, finds the file before or the one after.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    whole = {"format": FORMAT, "version": VERSION, "content": content}
    text = json.dumps(_encoded(whole, tensors), allow_nan=False)
    metadata = {"cka_hooks": text, "sha256": _digest(text, tensors)}
    data = safetensors.torch.save(tensors, metadata)
    replace_file(path, lambda file: file.write(data))


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` has written.

    Raises:
        CheckpointError: the file is anything else; the message says what.
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
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        text = metadata["cka_hooks"]
        if metadata["sha256"] != _digest(text, tensors):
            raise refused("its checksum does not fit its content, so it was edited or damaged")
        content = _decoded(json.loads(text), tensors)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise refused(f"it is not of the format {FORMAT!r}")
        if content["version"] != VERSION:
            raise refused(f"it is of version {content['version']!r:.40}, and {VERSION} is the one known")
        found: dict[str, Any] = content["content"]
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise refused("it has no settings")
    except SafetensorError as error:
        raise refused(f"it is no complete safetensors file ({error})") from error
    except RecursionError as error:
        raise refused("it is nested too deeply") from error
    except _WRONG as error:
        if isinstance(error, CheckpointError):
            raise
        raise refused(f"its content is none ({type(error).__name__}: {error})") from error
    return found


def of_model(model: nn.Module) -> dict[str, Any]:
    """What tells a model from another: its type, and names, shapes and some numbers of parameters and buffers."""
    names: list[str] = []
    some: list[Tensor] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach()
        if local.numel() and local.device.type != "meta" and local.layout is torch.strided and not local.is_quantized:
            numbers = local.reshape(-1)[:: max(1, local.numel() // 64)][:65]
            some.append(numbers.to(torch.float64 if local.device.type != "mps" else torch.float32))
    hasher = hashlib.blake2b(digest_size=16)
    for device in dict.fromkeys(tensor.device for tensor in some):
        # One copy from each device, not one a tensor.
        hasher.update(torch.cat([t for t in some if t.device == device]).cpu().numpy().tobytes())
    shapes = hashlib.blake2b("\0".join(names).encode(), digest_size=16)
    return {
        "type": type(model).__qualname__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "names and shapes": shapes.hexdigest(),
        "values": hasher.hexdigest(),
    }


def path_of_rank(path: str | os.PathLike[str], ranks: Ranks | None) -> Path:
    """Each rank's own file.

    Raises:
        CheckpointError: there are files of a run on another number of ranks.
    """
    path = Path(path)
    own = path if ranks is None else path.with_name(f"{path.name}.rank{ranks.rank}-of-{ranks.size}")
    others = list(path.parent.glob(f"{glob.escape(path.name)}.rank*-of-*"))
    others = [found for found in others if ranks is None or not found.name.endswith(f"-of-{ranks.size}")]
    if ranks is not None and path.exists():
        others.append(path)
    if others:
        raise CheckpointError(
            f"{others[0]} is the checkpoint of a run on another number of ranks, and this one is on "
            f"{1 if ranks is None else ranks.size}: start as many, name another file with checkpoint=, or delete it"
        )
    return own


def of_loader(loader: Any) -> dict[str, Any]:
    """What tells a loader from another without asking it for a batch."""
    found: dict[str, Any] = {"batch_size": getattr(loader, "batch_size", None)}
    try:
        found["length"] = len(loader)
        found["samples"] = len(loader.dataset)
    except (TypeError, AttributeError):
        pass
    return {key: value for key, value in found.items() if isinstance(value, int)}


@contextmanager
def undisturbed(needed: bool = True) -> Iterator[None]:
    """Ctrl-C inside takes effect at the end: sums that are kept must not have a part of a minibatch."""
    if not needed or threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[Any] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            before(*arrived[0])


def _is_stateful(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _is_plain(value: Any) -> bool:
    try:
        _encoded(value, {})
    except TypeError:
        return False
    return True


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain values as JSON has them; what JSON has not is a list that begins with its kind."""
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        # As text: NaN and infinity have no place in JSON.
        return ["float", value.hex()]
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return ["tensor", name]
    if type(value) is bytes:
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, tuple | list):
        return ["tuple" if isinstance(value, tuple) else "list", *(_encoded(item, tensors) for item in value)]
    if isinstance(value, Mapping):
        pairs = [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in value.items()]
        return ["dict", *pairs]
    raise TypeError(f"a {type(value).__name__} has no place in a checkpoint")


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        if isinstance(value, float | dict):
            raise ValueError("it has a value of a kind that is never written")
        return value
    kind, *items = value
    if kind == "float":
        return float.fromhex(items[0])
    if kind == "tensor":
        return tensors[items[0]]
    if kind == "bytes":
        return base64.b64decode(items[0], validate=True)
    if kind in ("tuple", "list"):
        decoded = [_decoded(item, tensors) for item in items]
        return tuple(decoded) if kind == "tuple" else decoded
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in items}
    raise ValueError(f"it has a value of the unknown kind {kind!r:.40}")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, str, str]:
    """The first setting that differs, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in (*ours, *theirs):
            if theirs.get(key, _difference) != ours.get(key, _difference):
                return _difference(theirs.get(key), ours.get(key), f"{name} {key}".strip())
    return name, f"{theirs!r:.200}", f"{ours!r:.200}"
