"""Compare two results: which entries differ by more than chance, and which settings differ."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from scipy.special import ndtri

from cka_hooks.names import printable
from cka_hooks.results.result import CKAResult
from cka_hooks.results.words import listing

#: Settings that say how a run went, not what was measured.
_INCIDENTAL = frozenset({"seconds", "shapes", "sample_axes", "out", "stopped"})
_LISTED = 10


@dataclass(frozen=True)
class Entry:
    """One pair of layers in both results.

    Attributes:
        row: label of the one layer.
        column: label of the other.
        first: CKA in the first result.
        second: CKA in the second.
        stderr: standard error of the difference, NaN if either has none.
        z: second minus first, in standard errors.
    """

    row: str
    column: str
    first: float
    second: float
    stderr: float
    z: float

    def __str__(self) -> str:
        return (
            f"{self.row} and {self.column}: {self.first:.4f} -> {self.second:.4f} ({self.second - self.first:+.4f}, "
            f"standard error {self.stderr:#.2g}, z {self.z:+.1f})"
        )


@dataclass(frozen=True)
class ResultDiff:
    """What :func:`diff` found.

    Attributes:
        compared: number of pairs that are defined in both results.
        testable: how many of them have a standard error in both.
        threshold: number of standard errors beyond which an entry is in `differing`.
        differing: entries beyond the threshold, the largest z first.
        largest: the entry with the largest absolute difference, None if nothing was compared.
        only_first: layers that only the first result has.
        only_second: layers that only the second result has.
        settings: name -> (in the first, in the second) for settings that differ; None if a result lacks it.
    """

    compared: int
    testable: int
    threshold: float
    differing: tuple[Entry, ...]
    largest: Entry | None
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    settings: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        untested, differing = self.compared - self.testable, len(self.differing)
        lines = [
            f"{self.compared:,} pairs of layers in both, {untested:,} of them without standard errors; {differing:,} "
            f"differ by more than {self.threshold:.1f} standard errors of the difference"
        ]
        if self.largest is not None:
            lines.append(f"largest difference: {self.largest}")
        lines += [f"  {entry}" for entry in self.differing[:_LISTED]]
        if differing > _LISTED:
            lines.append(f"  and {differing - _LISTED:,} more")
        only = {"first": self.only_first, "second": self.only_second}
        lines += [f"only in the {which}: {listing(labels, most=_LISTED)}" for which, labels in only.items() if labels]
        lines += [f"setting {name}: {a!r:.100} -> {b!r:.100}" for name, (a, b) in self.settings.items()]
        return "\n".join(map(printable, lines))

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values, None for what is not finite."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        return found


def diff(first: CKAResult, second: CKAResult, *, level: float = 0.95) -> ResultDiff:
    """Compare two results entry by entry, as two independent runs.

    The standard error of a difference is sqrt(stderr1^2 + stderr2^2). If nothing is different, all entries of the
    matrix together stay below the threshold with probability `level` (Bonferroni), so that a large matrix is not full
    of false alarms. Runs over the same minibatches are not independent: their differences have smaller errors than
    these.

    Args:
        first: one result.
        second: another one. Only pairs of labels that both have are compared.
        level: probability that no entry is listed if nothing is different.

    Example:
        >>> result = CKAResult.example()
        >>> print(diff(result, result))
        3 pairs of layers in both, 0 of them without standard errors; 0 differ by more than 2.4 standard errors of
        the difference
        largest difference: conv1 and conv2: 0.9000 -> 0.9000 (+0.0000, standard error 0.028, z +0.0)
    """
    before, after = _values(first), _values(second)
    entries = [_entry(*before[pair], *after[pair][2:]) for pair in before if pair in after]
    tested = [entry for entry in entries if not math.isnan(entry.z)]
    threshold = float(-ndtri((1 - level) / (2 * max(1, len(tested)))))
    differing = sorted((e for e in tested if abs(e.z) > threshold), key=lambda e: abs(e.z), reverse=True)
    ours, theirs = (
        {**result.settings, "samples": result.samples, "minibatches": result.minibatches}
        for result in (first, second)
    )
    return ResultDiff(
        compared=len(entries),
        testable=len(tested),
        threshold=threshold,
        differing=tuple(differing),
        largest=max(entries, key=lambda e: abs(e.second - e.first), default=None),
        only_first=tuple(label for label in first.layers if label not in second.layers),
        only_second=tuple(label for label in second.layers if label not in first.layers),
        settings={
            name: (ours.get(name), theirs.get(name))
            for name in {**ours, **theirs}
            if name not in _INCIDENTAL and ours.get(name) != theirs.get(name)
        },
    )


def _values(result: CKAResult) -> dict[frozenset[str], tuple[str, str, float, float]]:
    """The labels, the value and the standard error of each pair of two layers that is defined."""
    found: dict[frozenset[str], tuple[str, str, float, float]] = {}
    pairs = product(result.rows, result.columns)
    numbers = zip(pairs, result.matrix.flatten().tolist(), result.stderr.flatten().tolist(), strict=True)
    for (row, column), value, error in numbers:
        if row != column and not math.isnan(value):
            found.setdefault(frozenset((row, column)), (row, column, value, error))
    return found


def _entry(row: str, column: str, a: float, error: float, b: float, other: float) -> Entry:
    stderr = math.hypot(error, other)
    z = (b - a) / stderr if stderr else (0.0 if a == b else math.copysign(math.inf, b - a))
    return Entry(row, column, a, b, stderr, z)
