"""``cka-hooks show``: print a saved result in words, and draw it again."""

from __future__ import annotations

import argparse
from pathlib import Path

from cka_hooks.command.outputs import check_file
from cka_hooks.command.terminal import say
from cka_hooks.errors import OptionError
from cka_hooks.results.result import CKAResult
from cka_hooks.views.formats import FORMATS, format_of

LINE = "print a saved result, and draw it again"
DESCRIPTION = """\
Print a saved result in words. With --out, draw it again, or write it as a table.

examples
  cka-hooks show cka/cka.json
  cka-hooks show cka/cka.json --between a b --out a-b.png --values
  cka-hooks show cka/cka.json --layers 'layer4.**' --html layer4.html
  cka-hooks show cka/cka.json --out cka.csv"""


def words(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("result", type=Path, metavar="cka.json")
    parser.add_argument("--between", nargs=2, metavar=("A", "B"), help="only model A against model B")
    parser.add_argument("--layers", nargs="+", metavar="L", help="only these labels, or globs of labels")
    parser.add_argument("--out", type=Path, metavar="FILE",
        help="write this file, in the format of its suffix: " + ", ".join(one.suffixes[0] for one in FORMATS)
        + " and others; an earlier file is replaced")  # fmt: skip
    parser.add_argument("--values", action="store_true", help="write the values into the cells of the picture")
    parser.add_argument("--stderr", action="store_true", help="draw standard errors instead of CKA")
    parser.add_argument("--profile", action="store_true", help="draw the CKA of each layer with the next one instead")
    parser.add_argument("--html", type=Path, metavar="FILE",
        help="also write the interactive page; an earlier file is replaced")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Load, print and draw. Return the exit code."""
    if arguments.out is None:
        for option in ("values", "stderr", "profile"):
            if getattr(arguments, option):
                raise OptionError(f"--{option} says how to draw a picture: name its file with --out")
    else:
        format_of(arguments.out)
    for path, option in ((arguments.out, "--out"), (arguments.html, "--html")):
        check_file(path, option)
        if path is not None and path.exists() and path.samefile(arguments.result):
            raise OptionError(f"{option} {path} would replace the result that is shown: name another file")
    result = CKAResult.load(arguments.result)
    if arguments.between:
        result = result.between(*arguments.between)
    if arguments.layers:
        result = result.select(arguments.layers)
    say(result)
    say(f"\n{result.summary()}")
    for path in filter(None, (arguments.out, arguments.html)):
        replaced = " (replaced the earlier file)" if path.exists() else ""
        _write(result, path, arguments)
        say(f"\nwrote {path}{replaced}")
    return 0


def _write(result: CKAResult, path: Path, arguments: argparse.Namespace) -> None:
    if path == arguments.html:
        result.to_html(path)
    elif arguments.profile:
        result.plot_profile(path)
    elif arguments.values or arguments.stderr:
        result.plot(path, values=arguments.values, stderr=arguments.stderr)
    else:
        result.export(path)
