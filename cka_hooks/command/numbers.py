"""Numbers on the command line: the ``type=`` of arguments."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

# The seed of a second model is one more, and torch takes 64 bits.
MAX_SEED = 2**63 - 1


def count(text: str) -> int:
    """A whole number, 1 or more."""
    return _whole(text, 1)


def count_or_none(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, 0)


def samples(text: str) -> int | None:
    """A whole number, 1 or more; None for "all"."""
    return None if text == "all" else _whole(text, 1, ' or "all"')


def seed(text: str) -> int:
    """A whole number that torch takes as a seed."""
    number = _whole(text, 0)
    if number > MAX_SEED:
        raise ArgumentTypeError(f"{text} is too large: a seed is at most {MAX_SEED}")
    return number


def positive(text: str) -> float:
    """A finite number above 0."""
    number = _real(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def probability(text: str) -> float:
    """A number between 0 and 1."""
    number = _real(text)
    if not 0 < number < 1:
        raise ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return number


def shape(text: str) -> tuple[int, ...]:
    """Sizes separated by commas."""
    try:
        return tuple(_whole(size, 1) for size in text.split(","))
    except ArgumentTypeError:
        raise ArgumentTypeError(f"expected sizes with commas, such as 3,224,224, got {text!r}") from None


def _whole(text: str, least: int, alternative: str = "") -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ArgumentTypeError(f"expected a whole number of at least {least}{alternative}, got {text:.40}")
    return number


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number, got {text:.40}") from None
