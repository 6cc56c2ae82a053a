"""``cka-hooks diff``: two saved results, entry by entry."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cka_hooks.command import numbers
from cka_hooks.command.terminal import say
from cka_hooks.results.diff import diff
from cka_hooks.results.result import CKAResult

LINE = "compare two saved results"
DESCRIPTION = """\
Compare two saved results, entry by entry: which entries differ by more than the uncertainty of both, which
layers only one of them has, and which settings are not the same. The runs are taken as independent.

examples
  cka-hooks diff monday.json tuesday.json
  cka-hooks diff main.json branch.json --exit-code      exits with 1 if an entry differs"""


def words(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("first", type=Path, metavar="a.json")
    parser.add_argument("second", type=Path, metavar="b.json")
    parser.add_argument("--level", type=numbers.probability, default=0.95, metavar="P",
        help="probability of no false alarm in the whole matrix; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if an entry differs")


def run(arguments: argparse.Namespace) -> int:
    """Load both results and print how they differ. Return the exit code."""
    found = diff(CKAResult.load(arguments.first), CKAResult.load(arguments.second), level=arguments.level)
    say(json.dumps(found.as_json(), indent=2) if arguments.json else found)
    return 1 if arguments.exit_code and found.differing else 0
