"""``cka-hooks show``: a saved result in words, and drawn again."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cka_hooks.command.outputs import check_file
from cka_hooks.command.terminal import say
from cka_hooks.errors import OptionError
from cka_hooks.results.result import CKAResult

LINE = "print a saved result, and draw it again"
DESCRIPTION = """\
Print a saved result in words. With --out or --html, draw it again.

examples
  cka-hooks show cka/cka.json
  cka-hooks show cka/cka.json --between a b --out a-b.png --values
  cka-hooks show cka/cka.json --layers 'layer4.**' --html layer4.html"""


def words(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("result", type=Path, metavar="cka.json")
    parser.add_argument("--between", nargs=2, metavar=("A", "B"), help="only model A against model B")
    parser.add_argument("--layers", nargs="+", metavar="L", help="only these labels, or globs of labels")
    parser.add_argument("--out", type=Path, metavar="FILE",
        help="write this file, a picture or a table as its suffix says, and replace an earlier one")  # fmt: skip
    parser.add_argument("--values", action="store_true", help="write the values into the cells of the picture")
    parser.add_argument("--stderr", action="store_true", help="draw standard errors instead of CKA")
    parser.add_argument("--profile", action="store_true", help="draw the CKA of each layer with the next one instead")
    parser.add_argument("--html", type=Path, metavar="FILE",
        help="write the interactive page into this file, and replace an earlier one")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Load, print, draw; the exit code."""
    if arguments.out is None:
        for option in ("values", "stderr", "profile"):
            if getattr(arguments, option):
                raise OptionError(f"--{option} says how to draw a picture: name its file with --out")
    check_file(arguments.out, "--out")
    check_file(arguments.html, "--html")
    result = CKAResult.load(arguments.result)
    if arguments.between:
        result = result.between(*arguments.between)
    if arguments.layers:
        result = result.select(arguments.layers)
    say(result)
    say(f"\n{result.summary()}")
    if arguments.out is not None:
        _write("picture", arguments.out, lambda path: _draw(result, path, arguments))
    if arguments.html is not None:
        _write("page", arguments.html, result.to_html)
    return 0


def _draw(result: CKAResult, path: Path, arguments: argparse.Namespace) -> None:
    if arguments.profile:
        result.plot_profile(path)
    elif arguments.values or arguments.stderr:
        result.plot(path, values=arguments.values, stderr=arguments.stderr)
    else:
        result.export(path)


def _write(name: str, path: Path, write: Callable[[Path], Any]) -> None:
    replaced = " (replaced the earlier file)" if path.exists() else ""
    write(path)
    say(f"{name:<10}{path}{replaced}")
