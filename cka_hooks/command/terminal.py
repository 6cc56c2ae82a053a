"""Print text that somebody else may have written, so that a label from a file cannot steer the terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from cka_hooks.names import printable


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print a text as :func:`plain` spells it, in characters that the stream can take.

    Args:
        text: printed as by ``str``.
        file: a stream, by default stdout.
    """
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(plain(str(text)).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def plain(text: str) -> str:
    r"""The text with all control characters spelled out, except for the end of a line.

    Example:
        >>> print(plain("conv1\x1b[2J"))
        conv1\x1b[2J
    """
    return "\n".join(map(printable, text.split("\n")))
