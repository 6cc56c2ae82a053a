"""Compare two results: which entries differ by more than chance, and which settings differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from scipy.special import ndtri

from cka_hooks.names import printable
from cka_hooks.results.result import CKAResult
from cka_hooks.results.words import error_in_words

#: Settings that say how a run went, not what was measured.
_INCIDENTAL = frozenset({"seconds", "shapes", "sample_axes", "out", "stopped"})
_LISTED = 10


class Entry(NamedTuple):
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
        lines = []
        if self.largest is None:
            lines.append("no pair of layers is in both results")
        else:
            lines.append(
                f"{self.compared:,} pairs of layers in both; {len(self.differing):,} differ by more than "
                f"{self.threshold:.1f} standard errors of the difference"
            )
            if self.testable < self.compared:
                lines.append(f"{self.compared - self.testable:,} of them have no standard error and were not tested")
            lines.append(
                f"largest difference: {self.largest.row} and {self.largest.column}, "
                f"{self.largest.first:.4f} -> {self.largest.second:.4f}"
            )
        for entry in self.differing[:_LISTED]:
            error = error_in_words(entry.stderr)
            lines.append(
                f"  {entry.row} and {entry.column}: {entry.first:.4f} -> {entry.second:.4f} "
                f"({entry.second - entry.first:+.4f}, standard error {error}, z {entry.z:+.1f})"
            )
        if len(self.differing) > _LISTED:
            lines.append(f"  and {len(self.differing) - _LISTED:,} more")
        for which, labels in (("first", self.only_first), ("second", self.only_second)):
            if labels:
                more = f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else ""
                lines.append(f"only in the {which}: {', '.join(labels[:_LISTED])}{more}")
        for name, (first, second) in self.settings.items():
            lines.append(f"setting {name}: {_short(first)} -> {_short(second)}")
        return "\n".join(map(printable, lines))

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        largest = None if self.largest is None else _without_nan(self.largest._asdict())
        differing = [_without_nan(entry._asdict()) for entry in self.differing]
        return {**vars(self), "differing": differing, "largest": largest}


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
        3 pairs of layers in both; 0 differ by more than 2.4 standard errors of the difference
        largest difference: conv1 and conv2, 0.9000 -> 0.9000
    """
    entries = _entries(first, second)
    tested = [entry for entry in entries if not math.isnan(entry.z)]
    threshold = float(-ndtri((1 - level) / (2 * max(1, len(tested)))))
    differing = sorted((e for e in tested if abs(e.z) > threshold), key=lambda e: abs(e.z), reverse=True)
    return ResultDiff(
        compared=len(entries),
        testable=len(tested),
        threshold=threshold,
        differing=tuple(differing),
        largest=max(entries, key=lambda e: abs(e.second - e.first), default=None),
        only_first=tuple(label for label in first.layers if label not in second.layers),
        only_second=tuple(label for label in second.layers if label not in first.layers),
        settings=_settings(first, second),
    )


def _entries(first: CKAResult, second: CKAResult) -> list[Entry]:
    """Every unordered pair of two layers that is defined in both."""
    entries = []
    seen: set[frozenset[str]] = set()
    found = {pair: (value, error) for pair, value, error in _values(second)}
    for pair, a, error in _values(first):
        there = found.get(pair) or found.get(pair[::-1])
        if there is None or pair[0] == pair[1] or frozenset(pair) in seen:
            continue
        seen.add(frozenset(pair))
        b, stderr = there[0], math.hypot(error, there[1])
        if math.isnan(a) or math.isnan(b):
            continue
        z = (b - a) / stderr if stderr > 0 else (0.0 if a == b else math.copysign(math.inf, b - a))
        entries.append(Entry(*pair, a, b, stderr, z if not math.isnan(stderr) else math.nan))
    return entries


def _values(result: CKAResult) -> Iterator[tuple[tuple[str, str], float, float]]:
    """The labels, the value and the standard error of each entry."""
    pairs = product(result.rows, result.columns)
    return zip(pairs, result.matrix.flatten().tolist(), result.stderr.flatten().tolist(), strict=True)


def _settings(first: CKAResult, second: CKAResult) -> dict[str, tuple[Any, Any]]:
    ours, theirs = (
        {**result.settings, "samples": result.samples, "minibatches": result.minibatches}
        for result in (first, second)
    )
    return {
        name: (ours.get(name), theirs.get(name))
        for name in {**ours, **theirs}
        if name not in _INCIDENTAL and ours.get(name) != theirs.get(name)
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _without_nan(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
