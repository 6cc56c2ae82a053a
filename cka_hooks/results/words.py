"""Describe a result in a few words: how large it is, what is alike, where it changes, and what is missing.

The words claim no more than the matrix holds. "Alike" means CKA, which ignores rotations and a common scale of the
features. Which layer follows which is up to :mod:`cka_hooks.results.order`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cka_hooks.names import printable
from cka_hooks.results.order import by_model, steps

if TYPE_CHECKING:
    from cka_hooks.results.result import CKAResult

#: Consecutive layers whose CKA with each other is above this are near-identical.
NEAR = 0.95
#: Pairs this close to 1 are the same representation up to rotation and scale: a flatten, a dropout in eval mode.
SAME = 1 - 1e-6
#: Name a layer in which one sample has more than this share of its HSIC.
SHARE = 0.5
#: Entries whose p-value is above this are indistinguishable from those of unrelated layers.
UNRELATED = 0.05

Mask = npt.NDArray[np.bool_]


def summary(result: CKAResult) -> str:
    """The matrix in words, a few lines: what is alike, where it changes most, what was left out.

    Example:
        >>> from cka_hooks import CKAResult
        >>> print(CKAResult.example().summary())
        3 layers, 640 samples in 20 minibatches; largest standard error 0.020.
        Most alike: conv1 and conv2, CKA 0.900 (standard error 0.020).
        Changes most from one layer to the next at conv2 -> fc, CKA 0.600 (standard error 0.020).
    """
    parts = (_size, _most_alike, _largest_changes, _near_identical, _same_depth, _unrelated, _left_out)
    return "\n".join(printable(line) for part in parts for line in part(result))


def value_in_words(value: float, error: float = math.nan) -> str:
    """A CKA value with its standard error, in enough digits to distinguish the value from 1 and the error from 0.

    Example:
        >>> value_in_words(0.99995, 0.000021)
        'CKA 0.99995 (standard error 2.1e-05)'
        >>> value_in_words(0.5, 0.02), value_in_words(math.nan)
        ('CKA 0.500 (standard error 0.020)', 'CKA is undefined')
    """
    if math.isnan(value):
        return "CKA is undefined"
    words = f"{value:.3f}"
    if words == "1.000" and value != 1:
        words = repr(1 - float(f"{1 - value:.1g}"))
    return f"CKA {words}" + ("" if math.isnan(error) else f" (standard error {error:#.2g})")


def _size(result: CKAResult) -> Iterator[str]:
    count = _count(len(result.rows), "layer")
    if not result.square:
        count = f"{count} against {len(result.columns)}"
    elif len(result.models) > 1:
        each = listing([f"{name}: {len(rows)}" for name, rows in by_model(result, result.rows).items()])
        count += f" of {len(result.models)} models ({each})"
    line = f"{count}, {_count(result.samples, 'sample')} in {_count(result.minibatches, 'minibatch', 'es')}"
    if result.passes > 1:
        line += f" over {result.passes} passes"
    errors = f"largest standard error {result.stderr.nan_to_num().max():#.2g}"
    if result.degrees_of_freedom < 2:
        per_pass = result.degrees_of_freedom + 1
        errors = f"no standard errors, which need 3 minibatches in a pass: this run had {per_pass}"
    yield f"{line}; {errors}."


def _most_alike(result: CKAResult) -> Iterator[str]:
    values, pairs = result.matrix.numpy(), _pairs(result)
    models = [[result.model_of(label) for label in labels] for labels in (result.rows, result.columns)]
    within = _different(*models) == 0
    scopes = {" within one model": pairs & within, " across models": pairs & ~within}
    has_both = all(where.any() for where in scopes.values())
    for scope, where in scopes.items():
        words = scope if has_both else ""
        other, same = where & (values < SAME), where & (values >= SAME)
        if other.any():
            yield f"Most alike{words}: {_pair(result, *_largest(values, other))}."
        if same.any():
            first, second = np.argwhere(same)[0]
            yield (
                f"Identical up to rotation and scale{words}: {_count(int(same.sum()), 'pair')}, "
                f"such as {result.rows[first]} and {result.columns[second]}."
            )


def _largest_changes(result: CKAResult) -> Iterator[str]:
    """The two consecutive layers of each model that are least alike."""
    found = []
    for model, pairs in steps(result).items() if result.square else ():
        known = {pair: value for pair in pairs if not math.isnan(value := float(result.matrix[pair]))}
        # With two layers, there is nothing to compare the one step with.
        if len(known) > 1:
            before, after = min(known, key=known.__getitem__)
            where = f"{result.layer_of(result.rows[before])} -> {result.layer_of(result.rows[after])}"
            found.append((known[before, after], f"{where}{_of(model)}, {_value(result, before, after)}"))
    if found:
        yield f"Changes most from one layer to the next at {listing([words for _, words in sorted(found)], '; ')}."


def _near_identical(result: CKAResult) -> Iterator[str]:
    """Runs of 3 or more consecutive layers of a model, all of whose pairs have CKA above `NEAR`."""
    values, found = result.matrix.numpy(), []
    for model, rows in by_model(result, result.rows).items() if result.square else ():
        runs: list[list[int]] = [[]]
        for row in rows:
            # With all of the run and not only the last one, because similarity fades over many small steps.
            if not (values[row, runs[-1]] > NEAR).all():
                runs.append([])
            if not math.isnan(values[row, row]):
                runs[-1].append(row)
        for run in runs:
            if len(run) > 2:
                first, last = (result.layer_of(result.rows[row]) for row in (run[0], run[-1]))
                found.append((-len(run), f"{first} to {last} ({len(run)} layers){_of(model)}"))
    if found:
        listed = listing([words for _, words in sorted(found, key=lambda run: run[0])])
        yield f"Runs of near-identical layers (CKA above {NEAR} with each other): {listed}."


def _same_depth(result: CKAResult) -> Iterator[str]:
    """How many rows of one model are most similar to a column of another at about their own depth, beside chance."""
    groups = [by_model(result, labels).items() for labels in (result.rows, result.columns)]
    defined = np.isfinite(result.matrix.numpy())
    found = []
    for (first, rows), (second, columns) in combinations(groups[0], 2) if result.square else product(*groups):
        rows, columns = [i for i in rows if defined[i].any()], [j for j in columns if defined[:, j].any()]
        if first == second or min(len(rows), len(columns)) < 3:
            continue
        values = result.matrix.numpy()[np.ix_(rows, columns)]
        depth = np.linspace(0, 1, len(rows))[:, None] - np.linspace(0, 1, len(columns))
        # One position in the network with fewer layers. Rounding must not decide at exactly one position.
        near = np.abs(depth) <= 1 / (min(values.shape) - 1) + 1e-9
        best = np.nanargmax(values, axis=1)
        hits, chance = near[np.arange(len(rows)), best].sum(), near.mean(axis=1).sum()
        found.append((hits / len(rows), f"{hits} of {len(rows)}{_of(first)} with {second} (chance: {chance:.1f})"))
    if found:
        listed = listing([words for _, words in sorted(found)], "; ")
        yield f"Layers most similar to one at the same or a neighbouring depth of the other model: {listed}."


def unrelated(result: CKAResult) -> Mask:
    """(R, C): entries that are indistinguishable from those of unrelated layers, p > 0.05; none if not known."""
    if result.null_unknown is not None:
        return np.zeros(result.matrix.shape, dtype=bool)
    return np.asarray(result.pvalue().numpy() > UNRELATED)


def _unrelated(result: CKAResult) -> Iterator[str]:
    found = unrelated(result) & _pairs(result)
    if found.any():
        pvalues = result.pvalue().numpy()
        row, column = _largest(pvalues, found)
        yield (
            f"Indistinguishable from unrelated (p > {UNRELATED}): {_count(int(found.sum()), 'pair')}, such as "
            f"{_pair(result, row, column)}, p = {pvalues[row, column]:.2g}."
        )


def _left_out(result: CKAResult) -> Iterator[str]:
    for word, reasons in (("Undefined", result.degenerate), ("Left out", result.skipped)):
        by_reason: dict[str, list[str]] = {}
        for label, reason in reasons.items():
            by_reason.setdefault(reason.strip().rstrip("."), []).append(label)
        groups = [f"{listing(labels)} ({reason})" for reason, labels in by_reason.items()]
        if groups:
            yield f"{word}: {_count(len(reasons), 'layer')}. {listing(groups, '; ')}."
    heavy = {label: found for label, found in result.influence.items() if found.share > SHARE}
    if heavy:
        label, found = max(heavy.items(), key=lambda item: item[1].share)
        others = f", and more than half in {_count(len(heavy) - 1, 'other layer')}" if len(heavy) > 1 else ""
        yield (
            f"One sample dominates: {found.spelled} alone accounts for {found.share:.0%} of HSIC(layer, layer) of "
            f"{label}{others}."
        )


def _different(rows: Sequence[str], columns: Sequence[str]) -> Mask:
    return np.array([[row != column for column in columns] for row in rows])


def _pairs(result: CKAResult) -> Mask:
    """(R, C): the entries of two different layers, each pair once."""
    different = _different(result.rows, result.columns)
    return np.triu(different) if result.square else different


def _largest(values: npt.NDArray[np.float64], where: Mask) -> tuple[int, int]:
    row, column = np.unravel_index(int(np.where(where, values, -np.inf).argmax()), values.shape)
    return int(row), int(column)


def _pair(result: CKAResult, row: int, column: int) -> str:
    return f"{result.rows[row]} and {result.columns[column]}, {_value(result, row, column)}"


def _value(result: CKAResult, row: int, column: int) -> str:
    return value_in_words(float(result.matrix[row, column]), float(result.stderr[row, column]))


def _of(model: str) -> str:
    return f" of {model}" if model else ""


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def listing(words: Sequence[str], separator: str = ", ", most: int = 3) -> str:
    """The first words, and how many more there are."""
    more = [f"and {len(words) - most:,} more"] if len(words) > most else []
    return separator.join([*words[:most], *more])
