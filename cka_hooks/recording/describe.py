"""`LayerRecorder.describe`: a table of the layers and of what each would cost; and why layers are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cka_hooks.recording.layers import ROOT, Selection
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
    """A table of layers in order of execution. ``print`` shows it in 80 columns if types and shapes are not too long.

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
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        # Where the table is too wide, long names lose their beginning, which many layers share.
        widths[0] = min(widths[0], max(12, WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
        cells.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(map(_fitted, line, widths, "<<>>>>")) for line in cells]
        lines.append(f"{len(self.rows)} layers, {_short(self.features)} features per sample, {self.samples} samples")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left out, see `.skipped`")
        return "\n".join(line.rstrip() for line in lines)


def _cells(row: LayerRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape))
    cost = f"{row.cost:.1%}" if row.cost >= 0.0005 else "<0.1%"
    return row.layer, row.type, str(row.calls), shape, _short(row.features), cost


def _fitted(cell: str, width: int, sign: str) -> str:
    cell = cell if len(cell) <= width else "…" + cell[len(cell) - width + 1 :]
    return f"{cell:{sign}{width}}"


def _short(number: int) -> str:
    """A number in at most three digits: 802,816 is 803 k."""
    rounded = float(f"{number:.3g}")
    power = min(len(str(int(rounded))) - 1, 9) // 3
    return f"{rounded / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}"


def described(shapes: dict[str, tuple[int, ...]], taps: dict[str, Tap], skipped: dict[str, str]) -> Description:
    """The table of recorded shapes, given by label in order of execution, with the taps of their modules."""
    rows, total = [], sum(math.prod(shape[1:]) for shape in shapes.values()) or 1
    for layer, shape in shapes.items():
        tap, count = taps[layer], math.prod(shape[1:])
        rows.append(LayerRow(layer, type(tap.module).__name__, tap.calls, shape, count, count / total))
    return Description(tuple(rows), rows[0].shape[0], skipped)


def left_out(taps: Mapping[int, Tap], *, by_default: bool) -> dict[str, str]:
    """Layers of which no forward hook could say why they are not recorded, and the reason for each.

    Args:
        taps: a tap for each module, by the module's id.
        by_default: whether nobody asked for these layers. Modules that contain others are then not expected to run.
    """
    skipped = {}
    for tap in taps.values():
        for selection in tap.selections:
            same = f"is the same module as {selection.name!r}"
            skipped.update({selection.label(1, other): same for other in selection.also})
            if tap.ran:
                if selection.call is not None and selection.call > tap.calls:
                    skipped[selection.label(selection.call)] = f"was called {tap.calls} time(s)"
            elif not by_default or (next(tap.module.children(), None) is None and selection.name != ROOT):
                skipped[selection.label(1)] = _why(selection, tap, taps)
    return skipped


def _why(selection: Selection, tap: Tap, taps: Mapping[int, Tap]) -> str:
    if tap.elsewhere:
        return (
            "ran in a different thread from the one that entered the recorder, which records its own calls only "
            "(nn.DataParallel runs its replicas in threads: call model.module)"
        )
    above = [other for other in taps.values() if other.ran and any(it is tap.module for it in other.module.modules())]
    names = [other.selections[0].name for other in above]
    if isinstance(tap.module, NonDynamicallyQuantizableLinear):
        # The `out_proj` of an `nn.MultiheadAttention`.
        names.append(selection.name.rpartition(".")[0])
    name = max((name for name in names if name != ROOT), key=len, default="")
    return f"did not run: {name!r} did its work without calling it" if name else "did not run in the forward pass"
