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
    return _between_0_and(math.inf, text, "above 0")


def probability(text: str) -> float:
    """A number between 0 and 1."""
    return _between_0_and(1, text, "between 0 and 1")


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


def _between_0_and(most: float, text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < most:
        raise ArgumentTypeError(f"expected a number {where}, got {text:.40}")
    return number
