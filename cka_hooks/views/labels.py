"""Choose which of many layer labels to write along an axis: thinned so that none overlap, grouped by section.

A dotted label is a path in a tree: ``layer3`` holds ``layer3.22`` holds ``layer3.22.bn2``. If the labels of all
layers do not fit, a run of layers with a common beginning gets one label, that beginning, at its middle. Runs with
room to spare are divided further.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

T = TypeVar("T")

#: A run this many labels long is too long for a single name, so some of its layers are named instead.
_LONG = 8


class Span(NamedTuple):
    """Consecutive layers whose labels have a common beginning.

    Attributes:
        start: position of the first layer.
        stop: one past the last layer.
        name: the common beginning; the whole label for a single layer.
        depth: number of parts of the path in ``name``.
    """

    start: int
    stop: int
    name: str
    depth: int

    @property
    def middle(self) -> float:
        """The position at which to write the name."""
        return (self.start + self.stop - 1) / 2


def thinned(models: Sequence[str], labels: Sequence[str], gap: float) -> list[Span]:
    """The labels to write, no two closer together than ``gap``.

    Args:
        models: name of the model at each position. A written name never covers two models.
        labels: label at each position, without its model.
        gap: least distance between two written labels, in positions.

    Returns:
        Spans in order. With ``gap <= 1``, one for each label.

    Example:
        >>> labels = ["conv1", "layer1.0.a", "layer1.0.b", "layer1.1.a", "layer1.1.b", "fc"]
        >>> [span.name for span in thinned([""] * 6, labels, gap=1.5)]
        ['conv1', 'layer1.0', 'layer1.1', 'fc']
    """
    spans: list[Span] = []
    for run in _models(models):
        if gap <= 1:
            spans += [Span(i, i + 1, labels[i], 0) for i in range(run.start, run.stop)]
        else:
            spans += [kept for span in _divide(labels, run) for kept in _refine(labels, span, gap)]
    return _spaced(spans, gap)


def sections(models: Sequence[str], labels: Sequence[str]) -> list[Span]:
    """The few large parts of each model, such as ``layer1`` to ``layer4``. Layers outside of them stay single.

    Args:
        models: name of the model of each position.
        labels: label of each position, without its model.

    Example:
        >>> labels = ["features.conv0", "features.block1.a", "features.block1.b", "features.block2.a",
        ...           "features.block2.b", "fc"]
        >>> [span.name for span in sections([""] * 6, labels)]
        ['features.conv0', 'features.block1', 'features.block2', 'fc']
    """
    found: list[Span] = []
    for run in _models(models):
        spans = _divide(labels, run)
        while True:
            # A container that holds nearly all of the model, such as "features", says nothing.
            largest = max(spans, key=lambda span: span.stop - span.start)
            children = _divide(labels, largest)
            share = (largest.stop - largest.start) / (run.stop - run.start)
            if share < 0.8 or len(children) < 2 or len(children) > (largest.stop - largest.start) / 1.5:
                break
            at = spans.index(largest)
            spans[at : at + 1] = children
        found += spans
    return found


def section_lines(models: Sequence[str], labels: Sequence[str]) -> list[float]:
    """Where to draw lines between sections: half way between two positions; nowhere in a small or busy matrix.

    Example:
        >>> labels = ["conv1", *(f"layer{i}.{j}" for i in (1, 2) for j in range(4))]
        >>> section_lines([""] * 9, labels)
        [0.5, 4.5]
    """
    if len(labels) <= 8 or len(set(models)) > 4:
        return []
    return [
        after.start - 0.5
        for before, after in pairwise(sections(models, labels))
        # A line between two single layers would only say that they are two.
        if max(before.stop - before.start, after.stop - after.start) > 1
    ]


def runs(values: Iterable[T], start: int = 0) -> Iterator[tuple[int, int, T]]:
    """Runs of equal values: the position of the first, counted from `start`, one past the last, and the value.

    Example:
        >>> list(runs("aab"))
        [(0, 2, 'a'), (2, 3, 'b')]
    """
    for value, run in groupby(values):
        stop = start + len(list(run))
        yield start, stop, value
        start = stop


def _models(models: Sequence[str]) -> list[Span]:
    return [Span(start, stop, model, 0) for start, stop, model in runs(models)]


def _divide(labels: Sequence[str], span: Span) -> list[Span]:
    """The runs inside a span that share one more part of their path; the span itself if it is one layer."""
    if span.stop - span.start == 1:
        return [span]
    depth = span.depth + 1
    paths = (label.split(".")[:depth] for label in labels[span.start : span.stop])
    parts = [
        Span(start, stop, ".".join(path) if stop - start > 1 else labels[start], depth)
        for start, stop, path in runs(paths, span.start)
    ]
    # An only child is a container in a container and divides nothing, so look inside it.
    return parts if len(parts) > 1 else _divide(labels, parts[0])


def _refine(labels: Sequence[str], span: Span, gap: float) -> list[Span]:
    if span.stop - span.start == 1:
        return [span]
    children = _divide(labels, span)
    if all(b.middle - a.middle >= gap for a, b in pairwise(children)):
        return [kept for child in children for kept in _refine(labels, child, gap)]
    if span.stop - span.start >= _LONG * gap:
        refined = [kept for child in children for kept in _refine(labels, child, gap)]
        return _every(refined, gap)
    return [span]


def _every(spans: list[Span], gap: float) -> list[Span]:
    """As many spans as fit, from the first one on."""
    kept: list[Span] = []
    last = -math.inf
    for span in spans:
        if span.middle - last >= gap:
            kept.append(span)
            last = span.middle
    return kept


def _spaced(spans: list[Span], gap: float) -> list[Span]:
    """The spans that fit: the longest first, and of equally long ones those at the two ends of the axis."""
    kept: list[Span] = []
    end = max((span.stop for span in spans), default=0)
    for span in sorted(spans, key=lambda s: (s.start - s.stop, s.start > 0 and s.stop < end, s.start)):
        if all(abs(span.middle - other.middle) >= gap for other in kept):
            kept.append(span)
    return sorted(kept)
