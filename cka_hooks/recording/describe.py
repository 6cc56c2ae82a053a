"""`LayerRecorder.describe`: a table of the layers, and of what each would cost in a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cka_hooks.recording.routes import Tap

WIDTH = 80
_HEADER = ("layer", "type", "calls", "output", "features", "cost")


@dataclass(frozen=True)
class LayerRow:
    """One layer of a model, as seen in one forward pass.

    Attributes:
        layer: label of the layer, ``name#2`` for the second call.
        type: class name of its module.
        calls: how often the module ran in the forward pass.
        shape: shape of the recorded activation, after the reduction that `features` asks for, samples in front.
        features: number of features per sample.
        cost: share of the cost of all Gram matrices, which grows with the number of features.
    """

    layer: str
    type: str
    calls: int
    shape: tuple[int, ...]
    features: int
    cost: float


@dataclass(frozen=True)
class Description:
    """A table of layers in order of execution. ``print`` shows it in 80 columns.

    Attributes:
        rows: the layers that would be compared.
        samples: number of samples in the batch.
        skipped: for each layer that would be left out, the reason.
    """

    rows: tuple[LayerRow, ...]
    samples: int
    skipped: dict[str, str]

    @property
    def features(self) -> int:
        """Number of features per sample in all layers together."""
        return sum(row.features for row in self.rows)

    def __str__(self) -> str:
        cells = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
        # What gives way where the table is too wide: long names lose their beginning, long types their end.
        widths[1] = min(widths[1], 16)
        widths[3] = min(widths[3], 18)
        spare = WIDTH - sum(widths[1:]) - 2 * (len(_HEADER) - 1)
        widths[0] = min(widths[0], max(spare, 12))
        lines = ["  ".join(map(_fitted, line, widths, range(len(line)))) for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{len(self.rows)} layers, {_short(self.features)} features per sample, {self.samples} samples")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left out, see `.skipped`")
        return "\n".join(line.rstrip() for line in lines)


def _cells(row: LayerRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape))
    cost = f"{row.cost:.1%}" if row.cost >= 0.0005 else "<0.1%"
    return row.layer, row.type, str(row.calls), shape, _short(row.features), cost


def _fitted(cell: str, width: int, column: int) -> str:
    if column >= 2 and len(cell) <= width:
        return cell.rjust(width)
    if len(cell) > width:
        cell = "…" + cell[len(cell) - width + 1 :] if column == 0 else cell[: width - 1] + "…"
    return cell.ljust(width)


def _short(number: int) -> str:
    """A number in at most four digits: 802,816 is 803 k."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor * 0.9995:
            value = number / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return str(number)


def described(shapes: dict[str, tuple[int, ...]], taps: dict[str, Tap], skipped: dict[str, str]) -> Description:
    """The table of recorded shapes, given by label in order of execution, with the taps of their modules."""
    features = {layer: math.prod(shape[1:]) for layer, shape in shapes.items()}
    total = sum(features.values()) or 1
    rows = []
    for layer, shape in shapes.items():
        kind, count = type(taps[layer].module).__name__, features[layer]
        rows.append(LayerRow(layer, kind, taps[layer].calls, shape, count, count / total))
    return Description(tuple(rows), rows[0].shape[0], skipped)
