"""Keep the progress of a run in a file, so that the same call continues from there."""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cka_hooks.errors import CheckpointError, OptionError, warn
from cka_hooks.files import unfinished_prefix
from cka_hooks.options import above_zero
from cka_hooks.run import replay
from cka_hooks.run.checkpoint_file import WRONG, is_plain, read, write
from cka_hooks.run.drawn import Drawn
from cka_hooks.run.lock import FileLock
from cka_hooks.run.ranks import Ranks

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

    Raises:
        OptionError: the loader's order cannot be repeated, or `every` is not positive.
        CheckpointError: the file is not a checkpoint, or belongs to another run.
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
        self.drawn = loader if isinstance(loader, Drawn) else Drawn(loader)
        self._settings = json.loads(json.dumps(settings))
        self._saved: dict[str, Any] | None = None
        self._place: dict[str, Any] | None = None
        self._outer: dict[str, Any] | None = None
        self._current = ""
        self._lock: FileLock | None = None
        self._every = above_zero("checkpoint_every", every, "a number of seconds") or 0.0
        if self.path is None:
            return
        self._stateful = _is_stateful(loader)
        if not self._stateful:
            self._check_order()
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise OptionError(f"checkpoint={str(self.path)!r}: there is no folder {str(folder)!r}")
        self._randomness = replay.Randomness(loader)
        self._next_save = time.monotonic() + self._every
        self._lock = FileLock(self.path)
        try:
            self._open(folder)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, folder: Path) -> None:
        assert self.path is not None
        for left in folder.glob(f"{glob.escape(unfinished_prefix(self.path))}*.part"):
            with suppress(OSError):
                left.unlink()
        if self.path.exists():
            self._saved = self._read(self.path)

    def _check_order(self) -> None:
        if replay.shuffles_unseeded(self._loader):
            raise OptionError(
                "checkpoint= needs a loader that can be iterated again, and this one shuffles without a seeded "
                "generator: DataLoader(..., shuffle=True, generator=torch.Generator().manual_seed(0))"
            )

    # Resuming

    def resume(self, restore: Callable[[dict[str, Any]], None]) -> bool:
        """Hand the saved state of the run to `restore`. Return whether there was one.

        Raises:
            CheckpointError: the file does not hold the state of a run.
        """
        if self._saved is None:
            return False
        try:
            self.finished = bool(self._saved["finished"])
            _check_place(self._saved["place"])
            restore(self._saved["run"])
        except WRONG as error:
            raise self._refused(f"its content is not that of a run ({error})") from error
        return True

    def batches(self) -> Iterator[Any]:
        """The batches of one pass over the loader; in an interrupted pass, only those that were not seen yet.

        Raises:
            CheckpointError: the loader brings other batches than before.
        """
        if self.path is None:
            return iter(self.drawn)
        saved, self._saved = self._saved, None
        if saved is not None and saved["place"] is not None:
            stream = self._again(saved["place"])
        else:
            start = self._randomness.state()
            stream = iter(self.drawn)
            self._place = self._place_now(start, 0, "")
        return self._watched(stream)

    def _watched(self, stream: Iterator[Any]) -> Iterator[Any]:
        for batch in stream:
            # Before the model gets the batch, which may change it in place.
            self._current = replay.fingerprint(batch)
            yield batch

    def _place_now(self, start: dict[str, Any], batches: int, fingerprint: str) -> dict[str, Any]:
        """The loader's position. Taken after each batch, because a loader that has gone on no longer knows it."""
        loader = None
        if self._stateful:
            try:
                loader = copy.deepcopy(self._loader.state_dict())  # type: ignore[attr-defined]
            except (AttributeError, NotImplementedError):
                # Some wrappers have the method, but pass it on to a loader that may not.
                self._stateful = False
                self._check_order()
        return {
            "start": start,
            "batches": batches,
            # Fingerprints of all of them: every batch that is repeated has to be the same as before.
            "fingerprint": fingerprint,
            "now": self._randomness.state(),
            "loader": loader if is_plain(loader) else None,
        }

    def _again(self, place: dict[str, Any]) -> Iterator[Any]:
        if self._outer is None:
            self._outer = self._randomness.state()
        try:
            self._randomness.restore(place["start"])
            if place["loader"] is not None:
                self._loader.load_state_dict(place["loader"])  # type: ignore[attr-defined]
            stream = iter(self.drawn)
            if place["loader"] is None:
                self._skip(stream, int(place["batches"]), place["fingerprint"])
            self._randomness.restore(place["now"])
        except WRONG as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._refused(f"its place in the loader does not fit this loader ({error})") from error
        self._place = place
        return stream

    def _skip(self, stream: Iterator[Any], batches: int, fingerprint: str) -> None:
        found = ""
        for number in range(batches):
            try:
                found = _chained(found, replay.fingerprint(next(stream)))
            except StopIteration:
                raise self._refused(
                    f"the run has seen {batches} batches and the loader ended after {number}: it is another loader"
                ) from None
        if found != fingerprint:
            raise self._refused(
                f"the first {batches} batches of the loader are not the same as before: the data, their order or a "
                "random augmentation changed"
            )

    # Saving

    def seen(self) -> None:
        """Note that a batch is in the sums."""
        if self._place is not None:
            place = self._place
            chained = _chained(place["fingerprint"], self._current)
            self._place = self._place_now(place["start"], place["batches"] + 1, chained)

    def save_if_due(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save if it is time to."""
        if self.path is not None and time.monotonic() >= self._next_save:
            self.save(state())

    def save(self, state: dict[str, Any], *, finished: bool = False) -> None:
        """Write this state of the run to the file. If that fails, warn; the run continues."""
        if self.path is None or self.finished:
            return
        try:
            self._write(state, finished)
        except OSError as error:
            warn(
                f"the checkpoint {self.path} could not be written ({error}); the run continues, and tries again later"
            )
        self._next_save = time.monotonic() + self._every

    def _write(self, state: dict[str, Any], finished: bool) -> None:
        assert self.path is not None
        place = None if finished else self._place
        write(self.path, {"settings": self._settings, "finished": finished, "place": place, "run": state})
        self.finished = finished

    def broke_off(self, error: BaseException, state: Callable[[], dict[str, Any]]) -> None:
        """Save a run that an error or Ctrl-C ended, and add to the error how to continue."""
        if self.path is None or self._place is None or self.finished:
            return
        try:
            self._write(state(), False)
        except OSError as failure:
            note = f"the checkpoint {self.path} could not be written ({failure}); it holds the last save"
        else:
            note = f"saved to {self.path} up to here: the same call continues from there"
        _log.warning("run ended by %s; %s", type(error).__name__, note)
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (note,)
        elif hasattr(error, "add_note"):
            error.add_note(note)

    def done(self) -> None:
        """Release the file, and restore Python's and NumPy's random states if resuming has changed them."""
        if self._lock is not None:
            self._lock.release()
        if self._outer is not None:
            generators = self._randomness.state()["generators"]
            self._randomness.restore({**self._outer, "generators": generators})
            self._outer = None

    def announce(self, samples: int, progress: bool) -> None:
        """Log that the run continues, or had already finished."""
        where = "is finished: its saved result" if self.finished else "continues from there"
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


def path_of_rank(path: str | os.PathLike[str], ranks: Ranks | None) -> Path:
    """The file of one rank.

    Raises:
        CheckpointError: there are files of a run on another number of ranks.
        OptionError: it is not the path of a file.
    """
    given = path
    try:
        path = Path(os.fsdecode(given))
    except TypeError:
        path = Path()
    if not path.name or "\0" in str(path):
        raise OptionError(f"checkpoint={given!r}: expected the path of a file")
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


@contextmanager
def undisturbed(needed: bool = True) -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, so that sums never hold part of a minibatch."""
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


def _check_place(place: Any) -> None:
    """Raise :class:`ValueError` unless the place is None, or one that :meth:`Keeper.seen` can continue from."""
    if place is None:
        return
    if place.keys() != {"start", "batches", "fingerprint", "now", "loader"}:
        raise ValueError("its place in the loader is invalid")
    if type(place["batches"]) is not int or type(place["fingerprint"]) is not str:
        raise ValueError("its number of batches is invalid")


def _is_stateful(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _chained(before: str, fingerprint: str) -> str:
    return hashlib.blake2b(f"{before} {fingerprint}".encode(), digest_size=16).hexdigest()


def _difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, str, str]:
    """The name of the first setting that differs, and both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in (*ours, *theirs):
            if theirs.get(key, _difference) != ours.get(key, _difference):
                return _difference(theirs.get(key), ours.get(key), f"{name} {key}".strip())
    return name, f"{theirs!r:.200}", f"{ours!r:.200}"
