"""The pictures: the matrix as a heatmap, and the CKA of layers that follow one another, or match, as lines.

A heatmap has colours on a fixed scale, lines between models, and values in its cells if you ask for them. A profile
has for each layer its CKA with the one that it follows, or with its best match in another network.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cka_hooks.errors import OptionError, warn
from cka_hooks.files import PathLike
from cka_hooks.results.order import steps
from cka_hooks.results.words import UNRELATED, unrelated
from cka_hooks.views.canvas import FONT, MISSING, PITCH, SIDE, Canvas, Size, inches
from cka_hooks.views.labels import Side, runs, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from cka_hooks.results.result import CKAResult

    Floats = npt.NDArray[np.float64]
    End = float | Literal["data"] | None

_CELL = {0: 0.5, 1: 0.36, 2: 0.48}  # inches of a cell at most, or with one or two lines in it at least

# ---- the heatmap ----------------------------------------------------------------------------------


def plot(
    result: CKAResult,
    path: PathLike | None = None,
    *,
    ax: Axes | None = None,
    values: bool = False,
    stderr: bool = False,
    title: str | None = None,
    cmap: str | Colormap | None = None,
    vmin: float | Literal["data"] | None = None,
    vmax: float | Literal["data"] | None = None,
    figsize: tuple[float, float] | None = None,
) -> tuple[Figure, Axes]:
    """Draw the matrix as a heatmap, with a scale from 0 to 1 and depth increasing from the lower left corner.

    Without ``path`` and ``ax``, the figure is one of ``pyplot``, which a notebook shows by itself.

    Args:
        path: also write the picture to this file. Its suffix sets the format (``.png``, ``.svg``, ``.pdf``).
        ax: draw into these axes instead of a new figure.
        values: write each value into its cell, if cells are large enough to read it; otherwise a warning says so.
        stderr: colour by standard error instead; with ``values``, colour by CKA and write both.
        title: title of the picture; by default made from the names of the models and the number of samples.
        cmap: colour map, either a name that matplotlib knows or one of its objects.
        vmin: value of the first colour, 0 by default. ``"data"`` uses the smallest value in the matrix, so that you
            can distinguish values from 0.9 to 1. The scale then says where it begins.
        vmax: value of the last colour, 1 by default, or ``"data"``.
        figsize: width and height of the figure in inches; by default as large as the labels need.

    Returns:
        The matplotlib figure and axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: ``cmap``, ``vmin``, ``vmax``, ``figsize`` or the suffix of ``path`` cannot be used.

    Example:
        >>> from cka_hooks import CKAResult
        >>> from matplotlib.figure import Figure
        >>> _, axes = CKAResult.example().plot(ax=Figure().add_subplot())
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['conv1', 'conv2', 'fc']
    """
    by_error = stderr and not values
    shown = (result.stderr if by_error else result.matrix).numpy()
    rows, columns = shown.shape
    canvas = Canvas(path, ax, figsize, _size(rows, columns, values + (values and stderr)))
    axes = canvas.axes
    low, high = _ends(vmin, vmax, shown, by_error)
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        cmap=_colours(cmap, "magma" if by_error else "viridis"),
        vmin=low,
        vmax=high,
        origin="lower",
        interpolation="nearest",
        aspect="equal" if ax is not None and max(rows, columns) <= 3 * min(rows, columns) else "auto",
    )
    what = "standard error of CKA" if by_error else "CKA"
    label = f"{what}, colours from {low:.4g} to {high:.4g}" if "data" in (vmin, vmax) else what
    _colourbar(canvas, image, shown, label)
    legend = [] if by_error else _mark_unrelated(axes, unrelated(result), image.cmap(0.0))
    if np.isnan(shown).any():
        axes.patch.set(facecolor=MISSING, edgecolor="0.6", hatch="////", linewidth=0, label="undefined")
        legend.append(axes.patch)
    sides = {axes.yaxis: Side.of(result, result.rows), axes.xaxis: Side.of(result, result.columns)}
    for side, line in zip(sides.values(), (axes.axhline, axes.axvline), strict=True):
        for place in side.section_lines():
            line(place, color="white", linewidth=0.5, alpha=0.55)
        for place in side.model_lines():
            line(place, color="white", linewidth=2.0)
    canvas.label(title_of(result, what) if title is None else title, legend, sides)
    if values:
        _write_values(axes, image, result, stderr=stderr)
    return canvas.written()


def _size(rows: int, columns: int, lines: int) -> Size:
    """Width and height of the axes in inches."""
    cell = min(_CELL[0], SIDE / max(rows, columns))
    if lines and _CELL[lines] * max(rows, columns) <= 1.6 * SIDE:
        cell = max(cell, _CELL[lines])
    # Stretch a long narrow matrix, which would otherwise be a thread.
    return max(columns * cell, 1.5), max(rows * cell, 1.5)


def _ends(vmin: End, vmax: End, shown: Floats, by_error: bool) -> tuple[float, float]:
    """The values of the first and the last colour."""
    from matplotlib.ticker import MaxNLocator

    defined = shown[np.isfinite(shown)]
    lowest, highest = (defined.min(), defined.max()) if defined.size else (0.0, 1.0)
    if lowest == highest:
        lowest, highest = lowest - 0.01, highest + 0.01
    fitting = MaxNLocator(10).tick_values(lowest, highest)
    low = 0.0 if vmin is None else fitting[0] if vmin == "data" else vmin
    largest = fitting[-1] if by_error else 1.0
    high = largest if vmax is None else fitting[-1] if vmax == "data" else vmax
    with suppress(TypeError):
        if -math.inf < low < high < math.inf:
            return float(low), float(high)
    raise OptionError(
        f"vmin={vmin!r}, vmax={vmax!r} would be a scale from {low} to {high}: pass two numbers, the smaller one "
        'first, or "data" for a scale that fits the values'
    )


def _colours(cmap: str | Colormap | None, default: str) -> Colormap:
    from matplotlib import colormaps

    try:
        # Where it is undefined, the background shows through. Formats without transparency show the same grey.
        return colormaps.get_cmap(cmap or default).with_extremes(bad=(MISSING, 0.0))
    except (TypeError, ValueError) as error:
        raise OptionError(f"cmap is {cmap!r}: expected the name of a colour map, such as {default!r}") from error


def _colourbar(canvas: Canvas, image: AxesImage, shown: Floats, label: str) -> None:
    width, height = inches(canvas.axes)
    # Given axes lose some of their width. Otherwise the distance is fixed, whatever the labels elsewhere need.
    place: dict[str, Any] = {"ax": canvas.axes, "fraction": 0.05, "pad": 0.03}
    if not canvas.given:
        place = {"cax": canvas.axes.inset_axes((1 + 0.12 / width, 0.0, 0.16 / width, min(1.0, 3.2 / height)))}
    low, high = image.get_clim()
    slack = 0.005 * (high - low)
    # The ends of the scale are pointed if values beyond them are drawn in the last colour.
    beyond = bool((shown < low - slack).any()) + 2 * bool((shown > high + slack).any())
    bar = canvas.figure.colorbar(image, extend=("neither", "min", "max", "both")[beyond], **place)
    bar.ax.tick_params(labelsize=FONT)
    bar.set_label(label, fontsize=FONT + 1)


def _mark_unrelated(axes: Axes, found: npt.NDArray[np.bool_], colour: Any) -> list[Any]:
    """Hatch the entries that are indistinguishable from unrelated ones. Return the legend's entries for them."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    if not found.any():
        return []
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": "white", "hatch": "....", "linewidth": 0.0}
    cells = [
        Rectangle((start - 0.5, row - 0.5), stop - start, 1)
        for row, flags in enumerate(found.tolist())
        for start, stop, flag in runs(flags)
        if flag
    ]
    axes.add_collection(PatchCollection(cells, **style), autolim=False)
    style["facecolor"] = colour
    return [Patch(label=f"indistinguishable from unrelated (p > {UNRELATED})", **style)]


def _write_values(axes: Axes, image: AxesImage, result: CKAResult, *, stderr: bool) -> None:
    rows, columns = result.matrix.shape
    width, height = inches(axes)
    need = _CELL[2 if stderr else 1]
    if width / columns < 0.8 * need or height / rows < 0.5 * need:
        warn(
            f"the cells of {rows} x {columns} layers are too small to write values into, so they are left out: "
            "choose fewer layers with result.select(...), or larger axes"
        )
        return
    values, errors, hatched = result.matrix.numpy(), result.stderr.numpy(), unrelated(result)
    for i, j in np.argwhere(np.isfinite(values)):
        text = f"{values[i, j]:.2f}"
        if stderr and not math.isnan(errors[i, j]):
            text += f"\n±{errors[i, j]:.2g}"
        cell = image.cmap(image.norm(values[i, j]))
        bright = np.dot(cell[:3], (0.299, 0.587, 0.114)) > 0.5
        number = axes.text(j, i, text, ha="center", va="center", fontsize=6, color="black" if bright else "white")
        if hatched[i, j]:
            number.set_bbox({"facecolor": cell, "edgecolor": "none", "pad": 1.0})


# ---- the profile ----------------------------------------------------------------------------------


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
    heading = title_of(result, what) if title is None else title
    canvas.label(heading, handles, {axes.xaxis: lines[0].side} if shared else {})
    return canvas.written()


class _Line(NamedTuple):
    """A line of a profile: its name, its layers, and the rows and the columns of its entries in the matrix."""

    name: str
    side: Side
    entries: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]


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
