"""Choose which of many layer labels to write along an axis, and where to draw lines between groups; titles.

A dotted label is a path in a tree: ``layer3`` holds ``layer3.22`` holds ``layer3.22.bn2``. If the labels of all
layers do not fit, all of a model's labels are cut to the same number of parts. A run of layers that are then called
alike gets one label, at its middle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from cka_hooks.names import printable

if TYPE_CHECKING:
    from cka_hooks.results.result import CKAResult


class Side(NamedTuple):
    """What is written along one side of a matrix, one entry per layer.

    Attributes:
        models: names of the models, ``""`` to write none.
        names: labels of the layers within their models.
        texts: what to write if there is room for every layer.
    """

    models: list[str]
    names: list[str]
    texts: list[str]

    @classmethod
    def of(cls, result: CKAResult, labels: Sequence[str]) -> Side:
        """Models and layers of these labels; models alone if each has one layer, the same in all."""
        models = [result.model_of(label) for label in labels]
        names = [result.layer_of(label) for label in labels]
        if 1 < len(models) == len(set(models)):
            models, names = [""] * len(models), models if len(set(names)) == 1 else list(labels)
        return cls(models, names, names)

    def thinned(self, gap: float) -> list[Span]:
        """The labels to write, in order, no two closer together than ``gap`` positions, none for two models.

        Example:
            >>> labels = ["conv1", "layer1.0.a", "layer1.0.b", "layer1.1.a", "layer1.1.b", "fc"]
            >>> [span.name for span in Side([""] * 6, labels, labels).thinned(gap=1.5)]
            ['conv1', 'layer1.0', 'layer1.1', 'fc']
        """
        spans: list[Span] = []
        for divisions in self._divisions():
            # Of each depth, the labels that fit: the best depth has many of them, which name many layers.
            fitting = [_spaced(division, gap) for division in divisions]
            best = max(fitting, key=lambda kept: len(kept) * sum(span.length for span in kept))
            spans += best
        return _spaced(spans, gap)

    def section_lines(self) -> list[float]:
        """Where to draw lines between the few large parts of each model.

        Example:
            >>> labels = ["conv1", *(f"layer{i}.{j}" for i in (1, 2) for j in range(4))]
            >>> Side([""] * 9, labels, labels).section_lines()
            [0.5, 4.5]
        """
        lines = []
        for divisions in self._divisions():
            size = sum(span.length for span in divisions[0])
            # A container that holds nearly all of the model, such as "features", says nothing.
            parts = next((it for it in divisions if max(span.length for span in it) < 0.8 * size), divisions[-1])
            # A line between two single layers would only say that they are two.
            lines += [b.start - 0.5 for a, b in pairwise(parts) if a.length > 1 or b.length > 1]
        return lines

    def model_lines(self) -> list[float]:
        """Where to draw lines between models."""
        return [start - 0.5 for start, _, _ in runs(self.models)][1:]

    def _divisions(self) -> Iterator[list[list[Span]]]:
        """For each model its layers in runs with the same first part, the same first two parts and so on."""
        paths = [name.split(".") for name in self.names]
        for first, last, _ in runs(self.models):
            yield [
                [
                    Span(start, stop, ".".join(path) if stop - start > 1 else self.texts[start])
                    for start, stop, path in runs((path[:depth] for path in paths[first:last]), first)
                ]
                for depth in range(1, max(map(len, paths[first:last])) + 1)
            ]


class Span(NamedTuple):
    """Consecutive positions with something in common.

    Attributes:
        start: the first position.
        stop: one past the last position.
        name: what they have in common, such as the beginning of their labels.
    """

    start: int
    stop: int
    name: Any

    @property
    def middle(self) -> float:
        """The position at which to write the name."""
        return (self.start + self.stop - 1) / 2

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.stop - self.start


def runs(values: Iterable[Any], start: int = 0) -> Iterator[Span]:
    """Runs of equal values, by which they are named. The first position is `start`.

    Example:
        >>> list(runs("aab"))
        [Span(start=0, stop=2, name='a'), Span(start=2, stop=3, name='b')]
    """
    for value, run in groupby(values):
        stop = start + len(list(run))
        yield Span(start, stop, value)
        start = stop


def _spaced(spans: list[Span], gap: float) -> list[Span]:
    """The spans that fit: the longest first, and of equally long ones those at the two ends of the axis."""
    kept: list[Span] = []
    ends = spans[0], spans[-1]
    for span in sorted(spans, key=lambda span: (-span.length, span not in ends)):
        if all(abs(span.middle - other.middle) >= gap for other in kept):
            kept.append(span)
    return sorted(kept)


def shortened(labels: Iterable[str], most: int = 36) -> dict[str, str]:
    """Each label on one line. Long ones lose their middle, because layers differ at the ends.

    If different labels would become the same text, they lose most of what all of them begin with. If that is not
    enough, they keep more.

    Example:
        >>> shortened(["layer1.conv", "features.denseblock1.conv"], most=16)
        {'layer1.conv': 'layer1.conv', 'features.denseblock1.conv': 'featu…lock1.conv'}
        >>> list(shortened([f"run/of/july/{day}/at/night/epoch.pt" for day in (1, 2)], most=22).values())
        ['…uly/1/…night/epoch.pt', '…uly/2/…night/epoch.pt']
    """
    lines = {label: printable(label) for label in labels}
    while True:
        front = (most - 1) // 3
        texts = {
            label: line if len(line) <= most else f"{line[:front]}…{line[front + 1 - most :]}"
            for label, line in lines.items()
        }
        if len(set(texts.values())) == len(set(lines.values())):
            return texts
        shared = len(os.path.commonprefix(list(lines.values()))) - 4  # noqa: RUF071 - characters, not folders
        if shared > 1:
            lines = {label: f"…{line[shared:]}" for label, line in lines.items()}
        else:
            most += most // 2


def title_of(result: CKAResult, what: str) -> str:
    """The default title: the models, what is shown of them, and the number of samples."""
    names = list(shortened(result.models).values())
    layers = {result.layer_of(label) for label in result.layers}
    joined = " against " if len(names) == 2 and not result.square else ", "
    models = joined.join(names) if len(names) <= 3 else f"{len(names)} models"
    if len(names) > 1 and len(layers) == 1:
        models = f"{', '.join(shortened(layers).values())} of {models}"
    return f"{models and f'{models}: '}{what}, {result.samples:,} samples"
