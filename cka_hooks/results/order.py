"""Find out which layer follows which, as far as the labels, in order of execution, show it.

A label does not say what its layer reads. Two things are known: the layers ran one after another, and names such as
``downsample``, ``branch3x3`` or ``q_proj`` show that a layer is on a branch, beside others. A layer follows the last
one on its own branch. The first layer of a branch follows the last one before all branches of the block. A way around
the block (``downsample``) follows nothing, because its input comes from long before.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cka_hooks.results.result import CKAResult

_BYPASS = r"(?:downsample|shortcut|skip|identity|residual)\w*"
# Parts of dotted names of layers beside others: ways around a block, Inception's and SqueezeNet's branches, the
# projections of attention, both halves of a gated feed-forward, the towers of CLIP.
_BRANCH = re.compile(
    rf"{_BYPASS}"
    r"|(branch\w+?)(?:_\d+([a-z]?))?|branch"
    r"|(expand_?\dx\d)(?:_\w+)?"
    r"|(?:to_|w|c_)?[qkv](?:_?(?:proj|lin|norm|attn|layer))?|query|key|value"
    r"|(?:query|key|value|gate|up)_(?:proj|layer|norm)|wi_[01]"
    r"|(?:text|vision|visual|image|audio)_(?:model|encoder|tower)",
    re.IGNORECASE,
)


_TRUNK = ("", "")


def steps(result: CKAResult) -> dict[str, list[tuple[int, int]]]:
    """For each model, the rows of pairs (a layer, the one that follows it).

    Args:
        result: a square result.

    Example:
        >>> from cka_hooks import CKAResult
        >>> steps(CKAResult.example())
        {'': [(0, 1), (1, 2)]}
    """
    found = {}
    for model, rows in by_model(result, result.rows).items():
        names = [result.layer_of(result.rows[row]) for row in rows]
        found[model] = [(rows[a], rows[b]) for a, b in followers(names)]
    return found


def by_model(result: CKAResult, labels: tuple[str, ...]) -> dict[str, list[int]]:
    """The positions of each model's layers among the labels."""
    groups: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        groups.setdefault(result.model_of(label), []).append(position)
    return groups


def followers(names: list[str]) -> list[tuple[int, int]]:
    """Positions of pairs (a layer, the one that follows it) of one model's layers in order of execution.

    Example:
        >>> names = ["block.conv", "block.downsample.0", "block.downsample.1", "block.relu", "fc"]
        >>> [(names[a], names[b]) for a, b in followers(names)]  # doctest: +NORMALIZE_WHITESPACE
        [('block.downsample.0', 'block.downsample.1'), ('block.conv', 'block.relu'), ('block.relu', 'fc')]
    """
    places = [_branch(name) for name in names]
    last: dict[tuple[str, str], int] = {}
    forks: dict[str, int | None] = {}
    pairs = []
    for here, (name, place) in enumerate(zip(names, places, strict=True)):
        before = last.get(place)
        if before is not None:
            if not all(_around(other, names[before], name) for other in places[before + 1 : here]):
                before = None
        elif place != _TRUNK:
            fork = forks.setdefault(place[0], here - 1 if here and places[here - 1] == _TRUNK else None)
            before = None if re.match(_BYPASS, place[1], re.IGNORECASE) else fork
        if before is not None:
            pairs.append((before, here))
        last[place] = here
    return pairs


def _branch(name: str) -> tuple[str, str]:
    """The block that a layer's branch belongs to, and the name of the branch, ``_TRUNK`` if it is on none."""
    parts = name.split("#")[0].split(".")
    for depth, part in enumerate(parts):
        match = _BRANCH.fullmatch(part)
        # In a model with layers "u", "v" and "w", "v" is not the value of an attention.
        if match and (depth or len(part) > 1):
            return ".".join(parts[:depth]), "".join(filter(None, match.groups())) or part
    return _TRUNK


def _around(place: tuple[str, str], before: str, after: str) -> bool:
    """Whether a branch leads around two layers: all three belong to one block."""
    inside = f"{place[0]}." if place[0] else ""
    return place != _TRUNK and before.startswith(inside) and after.startswith(inside)
