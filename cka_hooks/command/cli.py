"""``cka-hooks``: the table of commands, and the handling of their errors.

Exit codes: 0 done; 1 a layer was not finite and the result of all others was saved, or, with ``diff --exit-code``,
there are differences; 2 the arguments, or what they name, cannot be used; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from cka_hooks import __version__
from cka_hooks.command.terminal import say
from cka_hooks.errors import CKAError, CKAWarning

BAD_INPUT, INTERRUPTED = 2, 130

# Each is a file in this folder with LINE and DESCRIPTION for the help, `words`, which adds its arguments to a parser,
# and `run`, which takes the parsed arguments and returns the exit code.
COMMANDS = ("demo", "run", "layers", "record", "show", "diff")

DESCRIPTION = """\
Measure which layers of PyTorch models represent the data alike, with centered kernel alignment (CKA).

start here
  cka-hooks demo --out demo                             train two small networks, compare them, draw
  cka-hooks run --model torchvision:resnet18 --data photos/
  cka-hooks layers --model torchvision:resnet18 --weights none
  cka-hooks record --model torchvision:resnet18 --data photos/ --out resnet18.safetensors

cka-hooks COMMAND --help explains each command.

exit codes
  0    done
  1    a layer was not finite; the result of all other layers was saved
  2    the arguments, or what they name, cannot be used
  130  interrupted"""


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
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has seen enough. Discard what is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        if isinstance(error, CKAError | OSError):
            return _fail(_message(error), BAD_INPUT)
        return _fail(f"{type(error).__name__}: {_message(error)} (--debug shows where)", BAD_INPUT)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. ``parse_args(...).command`` is the `run` of the command that was given."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top = argparse.ArgumentParser(
        prog="cka-hooks", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"cka-hooks {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"cka_hooks.command.{name}")
        own = commands.add_parser(
            name,
            help=command.LINE,
            description=command.DESCRIPTION,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(command=command.run)
        command.words(own)
    return top


def _message(error: Exception) -> str:
    """The message of an error. An error from a loader's worker starts with the worker's whole traceback."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if "\nOriginal Traceback" in text else text


def _fail(message: str, code: int) -> int:
    say(f"cka-hooks: {message}", file=sys.stderr)
    return code


def _warn(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    if issubclass(category, CKAWarning):
        say(f"cka-hooks: warning: {message}", file=sys.stderr)
