"""What the commands share: printing, whole numbers as arguments, and the files that a command writes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from cka_hooks.errors import OptionError
from cka_hooks.names import printable
from cka_hooks.results.result import CKAResult
from cka_hooks.views.formats import FILES, export_all

# The seed of a second model is one more, and torch takes 64 bits.
MOST = 2**63 - 1


def say(text: object, *, file: TextIO | None = None) -> None:
    r"""Print a text that somebody else may have written, so that it cannot steer the terminal.

    Control characters are spelled out, and so are characters that the stream cannot take.

    Args:
        text: printed as by ``str``.
        file: a stream, by default stdout.

    Example:
        >>> say("conv1\x1b[2J")
        conv1\x1b[2J
    """
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    plain = "\n".join(map(printable, str(text).split("\n")))
    print(plain.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def whole(least: int) -> Callable[[str], int]:
    """The ``type=`` of an argument that is a whole number."""

    def number(text: str) -> int:
        if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= MOST):
            most = f" to {MOST}" if text.isdecimal() and len(text) > 18 else ""
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}{most}, got {text:.40}")
        return int(text)

    return number


def output_words(parser: Any, default: str | None) -> None:
    """Add ``--out``, a folder by default or else a required file, ``--overwrite`` and ``--quiet``."""
    names, kind = ", ".join(FILES.values()), "DIR" if default else "FILE"
    what = f"folder for {names}; default: {default}" if default else "the file to write"
    parser.add_argument("--out", type=Path, default=default, required=not default, metavar=kind, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    parser.add_argument("--quiet", action="store_true", help="show neither what is run nor the progress")


def check_output(arguments: argparse.Namespace, folder: Path, files: Iterable[str]) -> None:
    """Check before a run that its files can be written into a folder, which need not exist yet.

    Raises:
        OptionError: they cannot, or an earlier run wrote some of them and ``--overwrite`` was not given.
    """
    earlier = [name for name in files if (folder / name).exists()]
    if earlier and not arguments.overwrite:
        raise OptionError(
            f"{folder} already holds {', '.join(earlier)}: pass --overwrite to replace what an earlier run wrote, or "
            "another --out"
        )
    there = next(it for it in (folder, *folder.absolute().parents) if it.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise OptionError(f"--out {arguments.out}: {there} is not a folder that can be written to")


def write_all(result: CKAResult, out: Path, *, printed: bool = True) -> dict[str, str]:
    """Write a result into the folder ``out``, and every picture that can be drawn of it. Print its summary.

    If a picture cannot be drawn, stderr says so; the result and the other pictures are written all the same.

    Returns:
        A short name and the path of each file that was written.
    """
    paths, failed = export_all(result, out)
    for name, reason in failed.items():
        say(f"cka-hooks: could not write the {name} ({FILES[name]}): {reason}", file=sys.stderr)
    if printed:
        say("\n".join(["", result.summary(), "", *(f"{name:<10}{path}" for name, path in paths.items())]))
    return {name: str(path) for name, path in paths.items()}
