"""What the commands share: printing, whole numbers as arguments, and the files that a command writes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from cka_hooks.errors import OptionError
from cka_hooks.names import printable
from cka_hooks.results.result import CKAResult

#: What ``run`` and ``demo`` call their files, and their names; ``between`` is written only for two models.
FILES = {"result": "cka.json", "heatmap": "cka.png", "page": "cka.html", "between": "between.png"}

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


def check_output(arguments: argparse.Namespace, file: Path | None = None) -> None:
    """Check before a run that its file, or all of `FILES`, can be written into a folder, which need not exist yet.

    Raises:
        OptionError: they cannot, or an earlier run wrote some of them and ``--overwrite`` was not given.
    """
    folder, files = (arguments.out, FILES.values()) if file is None else (file.parent, [file.name])
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

    The result itself is first. If a picture cannot be drawn, stderr says so, and the others are written all the same.

    Returns:
        A short name and the path of each file that was written.

    Raises:
        OSError: ``cka.json``, the result itself, cannot be written.
    """
    written: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, file in FILES.items():
        if name == "between" and len(result.models) != 2:
            continue
        try:
            (result.between(*result.models) if name == "between" else result).export(out / file)
        except Exception as error:  # matplotlib's, too: its settings come from the environment
            if name == "result":
                raise
            failed[name] = str(error) or type(error).__name__
        else:
            written[name] = str(out / file)
    for name, reason in failed.items():
        say(f"cka-hooks: could not write the {name} ({FILES[name]}): {reason}", file=sys.stderr)
    if printed:
        say("\n".join(["", result.summary(), "", *(f"{name:<10}{path}" for name, path in written.items())]))
    return written
