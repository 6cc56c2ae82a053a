"""Measure which layers of PyTorch models represent the data alike, with centered kernel alignment (CKA).

start here
  cka-hooks demo --out demo                             train two small networks, compare them, draw
  cka-hooks run --model torchvision:resnet18 --data photos/
  cka-hooks layers --model torchvision:resnet18
  cka-hooks record --model torchvision:resnet18 --data photos/ --out resnet18.safetensors

cka-hooks COMMAND --help explains each command.

exit codes
  0    done
  1    a layer was not finite, and the result of all others was saved; or diff --exit-code found differences
  2    the arguments, or what they name, cannot be used
  130  interrupted
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from cka_hooks import __version__
from cka_hooks.command.demo import demo_words
from cka_hooks.command.record import layers, record
from cka_hooks.command.run import run
from cka_hooks.command.saved import diff, show
from cka_hooks.command.shared import say
from cka_hooks.errors import CKAError, CKAWarning

# Each adds its arguments to a parser, with a function `command` that takes them and returns the exit code. Its
# docstring is its help.
COMMANDS = {"demo": demo_words, "run": run, "layers": layers, "record": record, "show": show, "diff": diff}
BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: its arguments, by default those of the process.
    """
    if "matplotlib" not in sys.modules:
        # A notebook sets its own backend here, and matplotlib cannot be imported if that one is not installed.
        os.environ["MPLBACKEND"] = "agg"
    arguments = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", CKAWarning)
            warnings.showwarning = _warn
            code: int = arguments.command(arguments)
            print(end="", flush=True)
            return code
    except KeyboardInterrupt:
        say("cka-hooks: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has seen enough. Discard what is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, SystemExit) as error:  # a user's file may exit
        if arguments.debug:
            traceback.print_exc()
        kind, message = type(error).__name__, str(error)
        if "\nOriginal Traceback" in message:  # from a loader's worker, with the worker's whole traceback
            message = message.rpartition(f"{kind}: ")[2].strip()
        ours = isinstance(error, CKAError | OSError)
        if ours:
            message = _as_options(message, arguments)
        say(f"cka-hooks: {message if ours else f'{kind}: {message} (--debug shows where)'}", file=sys.stderr)
        return BAD_INPUT


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. ``parse_args(...).command`` runs the one that was given."""
    plain: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    top = argparse.ArgumentParser(prog="cka-hooks", description=__doc__, **plain)
    top.add_argument("--version", action="version", version=f"cka-hooks {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, words in COMMANDS.items():
        line, _, description = (inspect.getdoc(words) or "").partition("\n\n")
        own = commands.add_parser(name, help=line, description=f"{line}\n\n{description}", **plain)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        words(own)
    return top


def _as_options(message: str, arguments: argparse.Namespace) -> str:
    """A message that names arguments of functions, with the names of options in their place."""
    for name in (*vars(arguments), "max_samples"):
        option = f"--{name.removeprefix('max_').replace('_', '-')}"
        message = re.sub(rf"(?<![\w(]){name}=(?=[\w'\".-])", f"{option} ", message)
        message = re.sub(rf"(?<![\w(]){name}=", option, message)
    return message


def _warn(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    if issubclass(category, CKAWarning):
        say(f"cka-hooks: warning: {message}", file=sys.stderr)
