"""Match globs to dotted names, find the closest names to one that does not exist, and print names safely."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from cka_hooks.errors import OptionError


@lru_cache(maxsize=1024)
def glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob over layer names and labels, to be matched in full.

    ``*`` and ``?`` stop at dots and slashes, ``**`` crosses them. ``[abc]`` is one of several characters, and
    ``[!abc]`` any other one.

    Example:
        >>> bool(glob_regex("layer[!1].*").fullmatch("layer2.relu"))
        True
    """
    try:
        return re.compile(re.sub(r"(?s)\*\*|\[.[^]]*\]|.", _as_regex, pattern), re.DOTALL)
    except re.error:  # a bracket such as [z-a]
        return re.compile(re.escape(pattern))


def _as_regex(part: re.Match[str]) -> str:
    sign = part[0]
    if len(sign) > 1 and sign[0] == "[":
        inner = sign[1:-1].replace("\\", r"\\")
        return f"[{'^' + inner[1:] if inner[0] == '!' else inner}]"
    return {"**": ".*", "*": "[^./]*", "?": "[^./]"}.get(sign) or re.escape(sign)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern chooses: itself if it is one of them, else those that it matches as a glob."""
    names = list(names)
    return [pattern] if pattern in names else list(filter(glob_regex(pattern).fullmatch, names))


def closest(name: str, names: Sequence[str], count: int = 5) -> list[str]:
    """Up to `count` of `names` that are most like `name`; the first ones if none is."""
    return difflib.get_close_matches(name, names, n=count, cutoff=0.4) or list(names[:count])


def labelled(name: str, layer: str) -> str:
    """The label of a model's layer among those of several models; the other one if either is empty."""
    return "/".join(filter(None, (name, layer)))


def printable(text: str) -> str:
    r"""Text on one line, with control characters spelled out.

    Control characters include escapes that move the cursor or set the window's title, and the marks that change the
    direction of writing, which can make one label look like another.

    Example:
        >>> print(printable("conv1\x1b[2J\n"))
        conv1\x1b[2J\n
    """
    odd = {c for c in text if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"}
    return "".join(c.encode("unicode_escape").decode() if c in odd else c for c in text)


class PerLayer:
    """One value for all layers, or one per layer pattern: an exact name decides, else the first glob that matches.

    Raises:
        OptionError: a pattern matches no layer.
    """

    def __init__(self, value: Any, names: Iterable[str], option: str) -> None:
        self._chosen = dict(value) if isinstance(value, Mapping) else {"**": value}
        self.values = list(self._chosen.values())
        for pattern in value if isinstance(value, Mapping) else ():
            if not matching(pattern, names):
                raise OptionError(f"{option}= has the layer pattern {pattern!r}, which matches no layer of the model")

    def of(self, name: str, default: Any) -> Any:
        """The value for the layer `name`, or the default if no pattern matches it."""
        matches = (chosen for pattern, chosen in self._chosen.items() if glob_regex(pattern).fullmatch(name))
        return self._chosen[name] if name in self._chosen else next(matches, default)


def first_few(words: Sequence[str], more: str = "more") -> str:
    """The first five words, and how many more there are.

    Example:
        >>> first_few(list("abcdefg"))
        'a, b, c, d, e and 2 more'
    """
    return ", ".join(words[:5]) + (f" and {len(words) - 5} {more}" if len(words) > 5 else "")
