"""Printing what somebody else may have written: a label out of a file must not steer the terminal."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print a text as :func:`plain` has it, in characters that the stream can take.

    Args:
        text: printed as ``str`` has it.
        file: a stream, by default stdout.
    """
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(plain(str(text)).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def plain(text: str) -> str:
    r"""The text with its control characters spelled out, all but the end of a line.

    Those are the escapes that move the cursor or set the window's title, and the marks that turn the direction of
    writing, behind which one label can be shown as another.

    Example:
        >>> print(plain("conv1\x1b[2J"))
        conv1\x1b[2J
    """
    return "".join(
        character
        if character == "\n" or not unicodedata.category(character).startswith("C")
        else character.encode("ascii", "backslashreplace").decode("ascii")
        if ord(character) > 0x7F
        else f"\\x{ord(character):02x}"
        for character in text
    )
