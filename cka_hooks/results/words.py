"""A short reading of a result in words: how large, what is alike, where it changes, what is missing.

The words claim no more than the matrix holds. "Alike" is CKA, which does not see rotations and a
common scale of the features; "next" is the order of execution, also where a network branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cka_hooks.results.result import CKAResult

#: Consecutive layers whose CKA with each other is above this are called a block.
BLOCK = 0.95
#: Pairs this close to 1 are the same representation but for rotation and scale: a flatten, a dropout in eval.
SAME = 1 - 1e-6
#: A layer in which one sample has more than this share of its HSIC is named.
SHARE = 0.5

_LISTED = 3

Positions = list[int]


def summary(result: CKAResult) -> str:
    """A few plain lines about ``result``; see :meth:`CKAResult.summary`.

    Example:
        >>> print(summary(CKAResult.example()))
        3 layers, 640 samples in 20 minibatches; largest standard error 0.020.
        Most alike: conv1 and conv2, CKA 0.900 (standard error 0.020).
        Changes most from one layer to the next at conv2 -> fc, CKA 0.600 (standard error 0.020).
    """
    lines = [_size(result)]
    if result.square:
        groups = _by_model(result, result.rows)
        lines += _most_alike(result, groups)
        for model, positions in groups.items():
            lines += _largest_change(result, model, positions)
            lines += _blocks(result, model, positions)
        names = list(groups)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                lines += _matches(result.between(first, second), first, second)
    else:
        lines += _alike_across(result)
        if not set(result.rows) & set(result.columns):
            lines += _matches(result, _one_model(result, result.rows), _one_model(result, result.columns))
    lines += _left_out(result)
    return "\n".join(lines)


def _size(result: CKAResult) -> str:
    count = _count(len(result.rows), "layer")
    if not result.square:
        count = f"{count} against {len(result.columns)}"
    elif len(result.models) > 1:
        groups = _by_model(result, result.rows)
        count += " (" + ", ".join(f"{name} {len(positions)}" for name, positions in groups.items()) + ")"
    line = f"{count}, {_count(result.samples, 'sample')} in {_count(result.minibatches, 'minibatch', 'es')}"
    if result.passes > 1:
        line += f" over {result.passes} passes"
    errors = result.stderr.numpy()
    if np.isfinite(errors).any() and result.degrees_of_freedom >= 2:
        return f"{line}; largest standard error {np.nanmax(errors):.3f}."
    per_pass = result.degrees_of_freedom + 1
    return f"{line}.\nNo standard errors: they need 3 minibatches in a pass, and this run had {per_pass}."


def _most_alike(result: CKAResult, groups: dict[str, Positions]) -> Iterator[str]:
    values = result.matrix.numpy()
    model_at = np.empty(len(result.rows), dtype=int)
    for number, positions in enumerate(groups.values()):
        model_at[positions] = number
    above = np.triu(np.ones(values.shape, dtype=bool), 1)
    within = model_at[:, None] == model_at[None, :]
    for scope, where in ((" within one model", above & within), (" across models", above & ~within)):
        words = scope if len(groups) > 1 else ""
        same = np.argwhere(where & (values >= SAME))
        best = _largest(np.where(where & (values < SAME), values, np.nan))
        if best is not None:
            yield f"Most alike{words}: {_pair(result, *best)}."
        if len(same):
            first, second = same[0]
            yield (
                f"The same but for rotation and scale{words}: {_count(len(same), 'pair')}, "
                f"such as {result.rows[first]} and {result.columns[second]}."
            )


def _alike_across(result: CKAResult) -> Iterator[str]:
    different = np.array([[row != column for column in result.columns] for row in result.rows])
    best = _largest(np.where(different, result.matrix.numpy(), np.nan))
    if best is not None:
        yield f"Most alike: {_pair(result, *best)}."


def _largest_change(result: CKAResult, model: str, positions: Positions) -> Iterator[str]:
    defined = _defined(result, positions)
    if len(defined) < 3:
        return
    steps = [float(result.matrix[i, j]) for i, j in pairwise(defined)]
    at = int(np.argmin(steps))
    before, after = defined[at], defined[at + 1]
    yield (
        f"Changes most from one layer to the next{_of(model)} at {result.layer_of(result.rows[before])} "
        f"-> {result.layer_of(result.rows[after])}, {_value(result, before, after)}."
    )


def _blocks(result: CKAResult, model: str, positions: Positions) -> Iterator[str]:
    found = near_identical(result, positions)
    if not found:
        return
    found.sort(key=len, reverse=True)
    words = [
        f"{result.layer_of(result.rows[block[0]])} to {result.layer_of(result.rows[block[-1]])} ({len(block)} layers)"
        for block in found
    ]
    yield f"Near-identical in a row{_of(model)} (CKA above {BLOCK} with each other): {_thinned(words)}."


def near_identical(result: CKAResult, positions: Positions) -> list[Positions]:
    """Runs of 3 or more consecutive layers, all of whose pairs have CKA above :data:`BLOCK`.

    Args:
        result: a square result.
        positions: row numbers of one model's layers, in order. Undefined ones are passed over.

    Example:
        >>> near_identical(CKAResult.example(), [0, 1, 2])
        []
    """
    values = result.matrix.numpy()
    blocks: list[Positions] = []
    block: Positions = []
    for position in _defined(result, positions):
        # Against all of the block and not only the last: similarity fades over many small steps.
        if block and not (values[position, block] > BLOCK).all():
            blocks.append(block)
            block = []
        block = [*block, position]
    return [block for block in [*blocks, block] if len(block) >= 3]


def _matches(block: CKAResult, first: str, second: str) -> Iterator[str]:
    """How many rows are most alike to a column at about their own depth, beside what chance would give."""
    values = block.matrix.numpy()
    rows = [i for i in range(len(block.rows)) if np.isfinite(values[i]).any()]
    columns = [j for j in range(len(block.columns)) if np.isfinite(values[:, j]).any()]
    if min(len(rows), len(columns)) < 3:
        return
    values = values[np.ix_(rows, columns)]
    depth = np.linspace(0, 1, len(rows))[:, None] - np.linspace(0, 1, len(columns))[None, :]
    # One place in the network with fewer layers; rounding must not decide at exactly one place.
    near = np.abs(depth) <= 1 / (min(values.shape) - 1) + 1e-9
    best = np.nanargmax(values, axis=1)
    hits = int(near[np.arange(len(rows)), best].sum())
    where = "position" if len(rows) == len(columns) else "relative depth"
    line = (
        f"{hits} of {_count(len(rows), 'layer')}{_of(first)} are most alike to a layer{_of(second)} at the "
        f"same or a neighbouring {where} (chance: {near.mean(axis=1).sum():.1f})"
    )
    names = [block.layer_of(block.columns[j]) for j in columns]
    if names == [block.layer_of(block.rows[i]) for i in rows]:
        line += f"; {int((best == np.arange(len(rows))).sum())} to the layer of the same name"
    yield line + "."


def _left_out(result: CKAResult) -> Iterator[str]:
    for word, reasons in (("Undefined", result.degenerate), ("Left out", result.skipped)):
        by_reason: dict[str, list[str]] = {}
        for label, reason in reasons.items():
            by_reason.setdefault(reason.strip().rstrip("."), []).append(label)
        groups = [f"{_thinned(labels)} ({reason})" for reason, labels in by_reason.items()]
        if groups:
            yield f"{word}: {_count(len(reasons), 'layer')}. {_thinned(groups, '; ')}."
    shares = [(value.share, label) for label, value in result.influence.items() if value.share > SHARE]
    if shares:
        share, label = max(shares)
        others = f", and in {_count(len(shares) - 1, 'other layer')} more than half" if len(shares) > 1 else ""
        yield (
            f"One sample decides much: number {result.influence[label].sample} has {share:.0%} of the HSIC "
            f"of {label}{others}."
        )


def _by_model(result: CKAResult, labels: tuple[str, ...]) -> dict[str, Positions]:
    groups: dict[str, Positions] = {}
    for position, label in enumerate(labels):
        groups.setdefault(result.model_of(label), []).append(position)
    return groups


def _one_model(result: CKAResult, labels: Iterable[str]) -> str:
    names = {result.model_of(label) for label in labels}
    return names.pop() if len(names) == 1 else ""


def _defined(result: CKAResult, positions: Positions) -> Positions:
    diagonal = result.matrix.diagonal().numpy()
    return [position for position in positions if np.isfinite(diagonal[position])]


def _largest(values: npt.NDArray[np.float64]) -> tuple[int, int] | None:
    if not np.isfinite(values).any():
        return None
    row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return int(row), int(column)


def _pair(result: CKAResult, row: int, column: int) -> str:
    return f"{result.rows[row]} and {result.columns[column]}, {_value(result, row, column)}"


def _value(result: CKAResult, row: int, column: int) -> str:
    value, error = float(result.matrix[row, column]), float(result.stderr[row, column])
    # A value just below 1 must not read as 1.
    digits = 3 if abs(1 - value) >= 5e-4 else 6
    return f"CKA {value:.{digits}f}" + ("" if np.isnan(error) else f" (standard error {error:.{digits}f})")


def _of(model: str) -> str:
    return f" of {model}" if model else ""


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _thinned(words: list[str], separator: str = ", ") -> str:
    more = len(words) - _LISTED
    return separator.join(words[:_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")
