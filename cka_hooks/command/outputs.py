"""The files that a command writes: problems show before the run, and no earlier result is lost."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from cka_hooks.command.terminal import say
from cka_hooks.errors import OptionError
from cka_hooks.results.result import CKAResult
from cka_hooks.views.formats import export_all, files_of_a_run


def folder_words(parser: Any, default: str) -> None:
    """Add ``--out`` and ``--overwrite`` to the arguments of a command that writes a result and its pictures."""
    parser.add_argument("--out", type=Path, default=Path(default), metavar="DIR",
        help=f"folder for {', '.join(files_of_a_run().values())}; default: %(default)s")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true",
        help="replace the files of an earlier run in that folder; without it they are kept")  # fmt: skip


def check_folder(arguments: argparse.Namespace) -> None:
    """Check that files can be written into ``--out``, which need not exist yet.

    Raises:
        OptionError: they cannot, or those of an earlier run exist and ``--overwrite`` was not given.
    """
    out: Path = arguments.out
    earlier = [name for name in files_of_a_run().values() if (out / name).exists()]
    if earlier and not arguments.overwrite:
        raise OptionError(
            f"{out} already holds {', '.join(earlier)}: pass --overwrite to replace the files of the earlier run, "
            "or name another folder with --out"
        )
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise OptionError(f"--out {out}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OptionError(f"--out {out}: the folder {there} is read-only")


def check_file(path: Path | None, option: str) -> None:
    """Check that a file can be written at ``path``.

    Raises:
        OptionError: the folder does not exist or is read-only, or ``path`` is itself a folder.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise OptionError(f"{option} {path}: this is a folder; name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OptionError(f"{option} {path}: the folder {path.parent} is read-only")


def write_all(result: CKAResult, out: Path) -> dict[str, Path]:
    """Write a result into the folder ``out``, and every picture that can be drawn of it.

    If a picture cannot be drawn, stderr says so; the result and the other pictures are written all the same.

    Returns:
        A short name and the path of each file that was written.
    """
    paths, failed = export_all(result, out)
    for name, reason in failed.items():
        say(f"cka-hooks: could not write the {name} ({files_of_a_run()[name]}): {reason}", file=sys.stderr)
    return paths
