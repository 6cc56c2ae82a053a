"""Hold a file for one run at a time."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from cka_hooks.errors import CheckpointError, OptionError

try:
    import fcntl
except ImportError:  # Windows, where two runs on one file are on their own
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """Holds a file for this run until it is released or the process ends, in whatever way.

    Raises:
        CheckpointError: another run holds it; the message says which.
        OptionError: the folder cannot be written to, and the file is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f".{path.name[:100]}.lock")
        self._descriptor: int | None = None
        while fcntl is not None and self._descriptor is None:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                if os.path.exists(path):
                    # What was saved can be read, if not written.
                    return
                raise OptionError(f"checkpoint={str(path)!r} cannot be written: {error}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 200).decode("utf-8", "replace") or "another process"
                os.close(descriptor)
                raise CheckpointError(
                    f"{path} is in use by {holder}: wait for that run, stop it, or name another file with checkpoint="
                ) from error
            except OSError:
                # Some file systems have no locks.
                pass
            # Between the two calls, the last holder may have removed it and somebody else made a new one.
            if self._is_still_there(descriptor):
                self._descriptor = descriptor
                # On a full disk, the file stays empty.
                with suppress(OSError):
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            else:
                os.close(descriptor)

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have the file."""
        if self._descriptor is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
