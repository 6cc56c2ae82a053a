"""Describe a result in a few words: how large it is, what is alike, where it changes, and what is missing.

The words claim no more than the matrix holds. "Alike" means CKA, which ignores rotations and a common scale of the
features. Which layer follows which is up to :mod:`cka_hooks.results.order`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cka_hooks.names import printable
from cka_hooks.results.order import by_model, followers
from cka_hooks.results.result import CKAResult

#: Consecutive layers whose CKA with each other is above this are near-identical.
NEAR = 0.95
#: Pairs this close to 1 are the same representation up to rotation and scale: a flatten, a dropout in eval mode.
SAME = 1 - 1e-6
#: Name a layer in which one sample has more than this share of its HSIC.
SHARE = 0.5
#: Entries whose p-value is above this are indistinguishable from those of unrelated layers.
UNRELATED = 0.05

_LISTED = 3
# Up to this many models get a line each. With more, only the extremes are named.
_FEW = 3

Positions = list[int]


def summary(result: CKAResult) -> str:
    """A few plain lines about ``result``; see :meth:`CKAResult.summary`.

    Example:
        >>> print(summary(CKAResult.example()))
        3 layers, 640 samples in 20 minibatches; largest standard error 0.020.
        Most alike: conv1 and conv2, CKA 0.900 (standard error 0.020).
        Changes most from one layer to the next at conv2 -> fc, CKA 0.600 (standard error 0.020).
    """
    lines = [*_size(result)]
    if result.square:
        groups = by_model(result)
        lines += _most_alike(result, groups)
        lines += _largest_changes(result, groups)
        lines += _near_identical(result, groups)
        lines += _same_depth([_depth(result, *pair) for pair in combinations(groups.items(), 2)])
    else:
        lines += _alike_across(result)
        if not set(result.rows) & set(result.columns):
            sides = [(_one_model(result, labels), [*range(len(labels))]) for labels in (result.rows, result.columns)]
            lines += _same_depth([_depth(result, *sides)])
    lines += _unrelated(result)
    lines += _left_out(result)
    return "\n".join(map(printable, lines))


def value_in_words(value: float, error: float = math.nan) -> str:
    """A CKA value with its standard error, in enough digits to distinguish the value from 1 and the error from 0.

    Example:
        >>> value_in_words(0.99995, 0.000021)
        'CKA 0.99995 (standard error 0.000021)'
        >>> value_in_words(0.5, 0.0), value_in_words(math.nan)
        ('CKA 0.500 (standard error 0)', 'CKA is undefined')
    """
    if math.isnan(value):
        return "CKA is undefined"
    # A value just below 1 must not read as 1.
    digits = max(3, _leading_zeros(1 - value) + 1 if abs(1 - value) < 5e-4 else 0)
    return f"CKA {value:.{digits}f}" + ("" if math.isnan(error) else f" (standard error {error_in_words(error)})")


def error_in_words(error: float) -> str:
    """A standard error in 3 digits after the point, or in as many as distinguish it from 0."""
    if not error > 0:
        return f"{error:.3g}"
    return f"{error:.{max(3, _leading_zeros(error) + 2)}f}" if error >= 1e-5 else f"{error:.1e}"


def pvalue_in_words(pvalue: float) -> str:
    """A p-value in two digits, or that it is below 1e-4.

    Example:
        >>> pvalue_in_words(0.0312), pvalue_in_words(1e-30)
        ('p = 0.031', 'p < 1e-4')
    """
    return f"p = {pvalue:.2g}" if pvalue >= 1e-4 else "p < 1e-4"


def _leading_zeros(value: float) -> int:
    """The number of zeros after the point and before the first digit."""
    return min(12, -math.floor(math.log10(abs(value))) - 1) if value else 0


def _size(result: CKAResult) -> Iterator[str]:
    count = _count(len(result.rows), "layer")
    if not result.square:
        count = f"{count} against {len(result.columns)}"
    elif len(result.models) > 1:
        groups = by_model(result)
        each = ", ".join(f"{name}: {len(positions)}" for name, positions in groups.items())
        if len(groups) > _FEW:
            least, most = (of(map(len, groups.values())) for of in (min, max))
            each = f"{least} each" if least == most else f"{least} to {most} each"
            count += f" of {len(groups)} models"
        count += f" ({each})"
    line = f"{count}, {_count(result.samples, 'sample')} in {_count(result.minibatches, 'minibatch', 'es')}"
    if result.passes > 1:
        line += f" over {result.passes} passes"
    errors = result.stderr.numpy()
    if np.isfinite(errors).any() and result.degrees_of_freedom >= 2:
        yield f"{line}; largest standard error {error_in_words(float(np.nanmax(errors)))}."
    else:
        yield f"{line}."
        per_pass = result.degrees_of_freedom + 1
        yield f"No standard errors: they need 3 minibatches in a pass, and this run had {per_pass}."


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
                f"Identical up to rotation and scale{words}: {_count(len(same), 'pair')}, "
                f"such as {result.rows[first]} and {result.columns[second]}."
            )


def _alike_across(result: CKAResult) -> Iterator[str]:
    different = np.array([[row != column for column in result.columns] for row in result.rows])
    best = _largest(np.where(different, result.matrix.numpy(), np.nan))
    if best is not None:
        yield f"Most alike: {_pair(result, *best)}."


def _largest_changes(result: CKAResult, groups: dict[str, Positions]) -> Iterator[str]:
    """The two consecutive layers of each model that are least alike."""
    start, found = "Changes most from one layer to the next", []
    for model, positions in groups.items():
        defined = _defined(result, positions)
        pairs = [(defined[a], defined[b]) for a, b in followers([result.layer_of(result.rows[i]) for i in defined])]
        if len(defined) >= 3 and pairs:
            before, after = min(pairs, key=lambda pair: float(result.matrix[pair]))
            where = f"{result.layer_of(result.rows[before])} -> {result.layer_of(result.rows[after])}"
            found.append((float(result.matrix[before, after]), where, _value(result, before, after), model))
    if len(found) <= _FEW:
        yield from (f"{start}{model and f' in {model}'} at {where}, {words}." for _, where, words, model in found)
    else:
        places = [f"{where}{_of(model)}, {words}" for _, where, words, model in sorted(found)]
        yield f"{start} at {_listing(places, '; ', most=2)}."


def _near_identical(result: CKAResult, groups: dict[str, Positions]) -> Iterator[str]:
    is_few = len(groups) <= _FEW
    names: dict[str, list[str]] = {_of(model) if is_few else "": [] for model in groups}
    runs = [(run, model) for model, positions in groups.items() for run in near_identical(result, positions)]
    for run, model in sorted(runs, key=lambda found: len(found[0]), reverse=True):
        first, last = (result.layer_of(result.rows[position]) for position in (run[0], run[-1]))
        name = f"{first} to {last} ({len(run)} layers)"
        names[_of(model) if is_few else ""].append(name if is_few else name + _of(model))
    for of, found in names.items():
        if found:
            yield f"Runs of near-identical layers (CKA above {NEAR} with each other){of}: {_listing(found)}."


def near_identical(result: CKAResult, positions: Positions) -> list[Positions]:
    """Runs of 3 or more consecutive layers, all of whose pairs have CKA above :data:`NEAR`.

    Args:
        result: a square result.
        positions: row numbers of one model's layers, in order. Undefined layers are skipped.

    Example:
        >>> near_identical(CKAResult.example(), [0, 1, 2])
        []
    """
    values = result.matrix.numpy()
    runs: list[Positions] = []
    run: Positions = []
    for position in _defined(result, positions):
        # Against all of the run and not only the last one, because similarity fades over many small steps.
        if run and not (values[position, run] > NEAR).all():
            runs.append(run)
            run = []
        run = [*run, position]
    return [run for run in [*runs, run] if len(run) >= 3]


class _Depth(NamedTuple):
    """How many rows of one model are most similar to a column of another at about their own depth."""

    share: float
    words: str
    short: str


def _depth(result: CKAResult, one: tuple[str, Positions], other: tuple[str, Positions]) -> _Depth | None:
    """Count them beside what chance would give; None if there is too little to count."""
    (first, rows), (second, columns) = one, other
    values = result.matrix.numpy()
    rows = [i for i in rows if np.isfinite(values[i, columns]).any()]
    columns = [j for j in columns if np.isfinite(values[rows, j]).any()]
    if min(len(rows), len(columns)) < 3:
        return None
    values = values[np.ix_(rows, columns)]
    depth = np.linspace(0, 1, len(rows))[:, None] - np.linspace(0, 1, len(columns))[None, :]
    # One position in the network with fewer layers. Rounding must not decide at exactly one position.
    near = np.abs(depth) <= 1 / (min(values.shape) - 1) + 1e-9
    best = np.nanargmax(values, axis=1)
    hits = int(near[np.arange(len(rows)), best].sum())
    chance = float(near.mean(axis=1).sum())
    where = "position" if len(rows) == len(columns) else "relative depth"
    words = (
        f"{hits} of {_count(len(rows), 'layer')}{_of(first)} are most similar to a layer{_of(second)} at the "
        f"same or a neighbouring {where} (chance: {chance:.1f})"
    )
    if [result.layer_of(result.columns[j]) for j in columns] == [result.layer_of(result.rows[i]) for i in rows]:
        words += f"; {int((best == np.arange(len(rows))).sum())} to the layer of the same name"
    return _Depth(hits / len(rows), words, f"{hits} of {len(rows)} (chance: {chance:.1f}), {first} with {second}")


def _same_depth(pairs: list[_Depth | None]) -> Iterator[str]:
    found = sorted((pair for pair in pairs if pair is not None), key=lambda pair: pair.share)
    if len(found) <= _FEW:
        yield from (f"{pair.words}." for pair in pairs if pair is not None)
    else:
        yield (
            "Layers that are most similar to one at the same or a neighbouring depth of another model, over "
            f"{len(found)} pairs of models: from {found[0].short}, to {found[-1].short}."
        )


def unrelated(result: CKAResult) -> npt.NDArray[np.bool_]:
    """(R, C): entries that are indistinguishable from those of unrelated layers, p > 0.05; none if not known."""
    if result.null_unknown is not None:
        return np.zeros(result.matrix.shape, dtype=bool)
    return np.asarray(result.pvalue().numpy() > UNRELATED)


def _unrelated(result: CKAResult) -> Iterator[str]:
    found = unrelated(result)
    pairs = [(i, j) for i, j in np.argwhere(found).tolist() if not (result.square and j <= i)]
    if pairs:
        pvalues = result.pvalue()
        i, j = max(pairs, key=lambda pair: float(pvalues[pair]))
        yield (
            f"Indistinguishable from unrelated (p > {UNRELATED}): {_count(len(pairs), 'pair')}, such as "
            f"{_pair(result, i, j)}, {pvalue_in_words(float(pvalues[i, j]))}."
        )


def _left_out(result: CKAResult) -> Iterator[str]:
    for word, reasons in (("Undefined", result.degenerate), ("Left out", result.skipped)):
        by_reason: dict[str, list[str]] = {}
        for label, reason in reasons.items():
            by_reason.setdefault(reason.strip().rstrip("."), []).append(label)
        groups = [f"{_listing(labels)} ({reason})" for reason, labels in by_reason.items()]
        if groups:
            yield f"{word}: {_count(len(reasons), 'layer')}. {_listing(groups, '; ')}."
    shares = [(value.share, label) for label, value in result.influence.items() if value.share > SHARE]
    if shares:
        share, label = max(shares)
        sample = result.influence[label].spelled
        others = f", and more than half in {_count(len(shares) - 1, 'other layer')}" if len(shares) > 1 else ""
        yield (
            f"One sample dominates: {sample} alone accounts for {share:.0%} of HSIC(layer, layer) of {label}{others}."
        )


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
    return value_in_words(float(result.matrix[row, column]), float(result.stderr[row, column]))


def _of(model: str) -> str:
    return f" of {model}" if model else ""


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _listing(words: Sequence[str], separator: str = ", ", most: int = _LISTED) -> str:
    more = len(words) - most
    return separator.join(words[:most]) + (f"{separator}and {more} more" if more > 0 else "")
