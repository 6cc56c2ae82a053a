"""Draw each layer's CKA with the one that it follows, or with its best match in another network, as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cka_hooks.errors import OptionError
from cka_hooks.files import PathLike
from cka_hooks.results.order import steps
from cka_hooks.views.canvas import FONT, MISSING, PITCH, SIDE, Canvas, write_side, write_title
from cka_hooks.views.labels import Side, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cka_hooks.results.result import CKAResult

    Ints = npt.NDArray[np.intp]


def plot_profile(
    result: CKAResult,
    path: PathLike | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    figsize: tuple[float, float] | None = None,
) -> tuple[Figure, Axes]:
    """Draw each layer's similarity to the one before, or its best match in the other network.

    For a square result, this shows for each model the CKA of every layer with the one that it follows: the
    representation changes at the dips. For a rectangular one, it shows for every row the largest CKA among the
    columns. Error bars are 95 % intervals.

    Args:
        path: also write the picture to this file.
        ax: draw into these axes instead of a new figure.
        title: title of the picture; by default a plain one.
        figsize: width and height of the figure in inches; by default as large as the labels need.

    Returns:
        The matplotlib figure and axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: there are not two layers to compare, or ``figsize`` or the suffix of ``path`` cannot be used.

    Example:
        >>> from cka_hooks import CKAResult
        >>> from matplotlib.figure import Figure
        >>> _, axes = CKAResult.example().plot_profile(ax=Figure().add_subplot())
        >>> axes.get_ylabel()
        'CKA with the layer before'
    """
    lines = _steps(result) if result.square else [_best_matches(result)]
    if not lines:
        raise OptionError("a profile needs at least two layers of one model, or one row and one column")
    most = max(len(line.side.names) for line in lines)
    canvas = Canvas(path, ax, figsize, (min(SIDE, max(3.2, most * PITCH * 1.05)), 2.6))
    axes = canvas.axes
    # Depth is the only thing that layers of different networks have in common on this axis.
    shared = all(line.side == lines[0].side for line in lines)
    handles = _draw(axes, result, lines, shared)
    what = "CKA with the layer before" if result.square else "CKA with the best match"
    axes.set_ylabel(what, fontsize=FONT + 1)
    if not shared:
        axes.set_xlabel("depth, first layer to last", fontsize=FONT + 1)
    for _ in canvas.rounds():
        write_title(axes, title_of(result, what) if title is None else title, handles)
        if shared:
            write_side(axes, axes.xaxis, lines[0].side)
    return canvas.written()


class _Line(NamedTuple):
    """A line of a profile: its name, its layers, and the rows and the columns of its entries in the matrix."""

    name: str
    side: Side
    entries: tuple[Ints, Ints]


def _steps(result: CKAResult) -> list[_Line]:
    lines = []
    for model, pairs in steps(result).items():
        if pairs:
            before, after = np.array(pairs).T
            labels = [result.layer_of(result.rows[i]) for i in after]
            lines.append(_Line(model, Side([""] * len(labels), labels, labels), (before, after)))
    return lines


def _best_matches(result: CKAResult) -> _Line:
    values = result.matrix.numpy()
    best = np.argmax(np.where(np.isnan(values), -np.inf, values), axis=1)
    names, columns = Side.of(result, result.rows).names, Side.of(result, result.columns).names
    texts = [
        name if np.isnan(values[i, j]) else f"{name} → {columns[j]}"
        for i, (name, j) in enumerate(zip(names, best, strict=True))
    ]
    return _Line("", Side([""] * len(best), names, texts), (np.arange(len(best)), best))


def _draw(axes: Axes, result: CKAResult, lines: list[_Line], shared: bool) -> list[Any]:
    """Draw lines with their 95 % intervals, grey where they are undefined. Return the legend's entries."""
    from matplotlib import colormaps

    halves = np.nan_to_num((result.interval()[1] - result.matrix).numpy())
    handles: list[Any] = []
    undefined: list[Any] = []
    for n, line in enumerate(lines):
        # Ten colours are distinguishable. More models are usually checkpoints, which have an order.
        colour = colormaps["tab10"](n) if len(lines) <= 10 else colormaps["viridis"](0.95 * n / len(lines))
        values, half, count = result.matrix.numpy()[line.entries], halves[line.entries], len(line.side.names)
        at = np.arange(count) if shared else np.linspace(0, 1, count)
        step = 1 if shared else 1 / max(count - 1, 1)
        size = min(3.5, 200 / count)
        handles += axes.plot(at, values, "o-", markersize=size, linewidth=1.0, label=line.name, color=colour)
        axes.errorbar(at, values, half, fmt="none", ecolor=colour, elinewidth=1.0, capsize=0.6 * size)
        for place in at[np.isnan(values)]:
            ends = place - step / 2, place + step / 2
            undefined = [axes.axvspan(*ends, color=MISSING, lw=0, zorder=0, label="undefined")]
    axes.set_xlim((-0.5, count - 0.5) if shared else (-0.02, 1.02))
    # The fixed scale of the heatmap, extended only if an interval reaches beyond it.
    axes.set_ymargin(0)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0), max(high, 1) + 0.02)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT)
    return (handles if len(handles) > 1 else []) + undefined
