"""``cka-hooks show`` and ``cka-hooks diff``: results that were saved."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cka_hooks.command.shared import say
from cka_hooks.errors import OptionError
from cka_hooks.results.diff import diff as difference
from cka_hooks.results.result import FORMATS, CKAResult


def show(parser: argparse.ArgumentParser) -> None:
    """Print a saved result, and draw it again.

    With --out, the result is drawn again, or written as a table. An earlier file of that name is replaced.

    examples
      cka-hooks show cka/cka.json
      cka-hooks show cka/cka.json --between a b --out a-b.png --values
      cka-hooks show cka/cka.json --layers 'layer4.**' --html layer4.html
      cka-hooks show cka/cka.json --out cka.csv
    """
    add = parser.add_argument
    add("result", type=Path, metavar="cka.json")
    add("--between", nargs=2, metavar=("A", "B"), help="only model A against model B")
    add("--layers", nargs="+", metavar="L", help="only these labels, or globs of labels")
    formats = f"write this file, in the format of its suffix: {', '.join(FORMATS)}"
    add("--out", type=Path, metavar="FILE", help=formats)
    add("--values", action="store_true", help="write the values into the cells of the picture")
    add("--stderr", action="store_true", help="draw standard errors instead of CKA")
    add("--profile", action="store_true", help="draw the CKA of each layer with the next one instead")
    add("--html", type=Path, metavar="FILE", help="also write the interactive page")
    parser.set_defaults(command=_show)


def _show(arguments: argparse.Namespace) -> int:
    is_picture = arguments.values or arguments.stderr
    if arguments.out is None and (is_picture or arguments.profile):
        raise OptionError("--values, --stderr and --profile say how to draw a picture: name its file with --out")
    result = CKAResult.load(arguments.result)
    if arguments.between:
        result = result.between(*arguments.between)
    if arguments.layers:
        result = result.select(arguments.layers)
    wrote = ""
    for path in filter(None, (arguments.out, arguments.html)):
        replaced = ""
        if path.exists():
            if path.samefile(arguments.result):
                raise OptionError(f"{path} would replace the result that is shown: name another file")
            replaced = " (replaced the earlier file)"
        if path == arguments.html:
            result.to_html(path)
        elif arguments.profile:
            result.plot_profile(path)
        elif is_picture:
            result.plot(path, values=arguments.values, stderr=arguments.stderr)
        else:
            result.export(path)
        wrote += f"\n\nwrote {path}{replaced}"
    say(f"{result}\n\n{result.summary()}{wrote}")
    return 0


def diff(parser: argparse.ArgumentParser) -> None:
    """Compare two saved results.

    Entry by entry: which entries differ by more than the uncertainty of both, which layers only one of them has, and
    which settings are not the same. The runs are taken as independent.

    examples
      cka-hooks diff monday.json tuesday.json
      cka-hooks diff main.json branch.json --exit-code      exits with 1 if an entry differs
    """
    add = parser.add_argument
    add("first", type=Path, metavar="a.json")
    add("second", type=Path, metavar="b.json")
    level = "probability of no false alarm in the whole matrix; default: %(default)s"
    add("--level", type=float, default=0.95, metavar="P", help=level)
    add("--json", action="store_true", help="print JSON")
    add("--exit-code", action="store_true", help="exit with 1 if an entry differs")
    parser.set_defaults(command=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.level < 1:
        raise OptionError(f"--level {arguments.level}: expected a number between 0 and 1, such as 0.95")
    found = difference(CKAResult.load(arguments.first), CKAResult.load(arguments.second), level=arguments.level)
    say(json.dumps(found.as_json(), indent=2) if arguments.json else found)
    return 1 if arguments.exit_code and found.differing else 0
