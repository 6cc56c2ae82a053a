"""Write a file whole or not at all; everything in this package writes files this way."""

from __future__ import annotations

import glob
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

PathLike = str | os.PathLike[str]


def replace_file(path: PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then move it there.

    A reader finds the old file or the new one, even after a power cut. The new file has the mode of the old one, and
    a symbolic link stays a link.

    Raises:
        OSError: the file cannot be written. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write {target.name!r} into")
    if target.exists() and not target.is_file():
        raise OSError(f"{os.fspath(path)!r} is a folder, a device or a pipe: name a file")
    unfinished = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        with open(unfinished, "xb") as file:
            if target.exists():
                os.chmod(unfinished, stat.S_IMODE(target.stat().st_mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process left of :func:`replace_file`."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name[:100])}.*.part"):
        with suppress(OSError):
            unfinished.unlink()
