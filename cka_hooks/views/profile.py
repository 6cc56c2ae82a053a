"""Draw each layer's CKA with the one that it follows, or with its best match in another network, as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cka_hooks.errors import OptionError
from cka_hooks.files import PathLike
from cka_hooks.results.order import steps
from cka_hooks.results.result import CKAResult
from cka_hooks.views import canvas
from cka_hooks.views.canvas import FONT, MISSING, Side, Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Floats = npt.NDArray[np.float64]

# With more lines than this, their names stand beside the axes.
_ABOVE = 3


def profile(
    result: CKAResult,
    path: PathLike | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    figsize: Size | None = None,
) -> tuple[Figure, Axes]:
    """Draw the similarity of consecutive layers, or of best matches; see :meth:`CKAResult.plot_profile`.

    Args:
        result: a square result, or one that :meth:`CKAResult.between` cut.
        path: also write the picture to this file. Its suffix sets the format.
        ax: draw into these axes instead of a new figure.
        title: replaces the default title.
        figsize: size of the figure, in inches.

    Returns:
        The figure and the axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: there are not two layers to compare, or ``figsize`` or the suffix of ``path`` cannot be used.

    Example:
        >>> from matplotlib.figure import Figure
        >>> _, axes = profile(CKAResult.example(), ax=Figure().add_subplot())
        >>> axes.get_ylabel()
        'CKA with the layer before'
    """
    lines = [line for line in (_steps(result) if result.square else [_best_matches(result)]) if line.labels]
    if not lines:
        raise OptionError("a profile needs at least two layers of one model, or one row and one column")
    if title is None:
        title = canvas.title_of(result, "CKA with the layer before" if result.square else "best matches by CKA")
    most = max(len(line.labels) for line in lines)

    def draw(axes: Axes) -> None:
        _draw(axes, lines, title)

    figure, axes = canvas.drawn(
        draw, path, ax, figsize, (min(canvas.SIDE, max(3.2, most * canvas.PITCH * 1.05)), 2.6)
    )
    canvas.written(figure, path)
    return figure, axes


class _Line(NamedTuple):
    """A line of a profile: label, meaning and values, half widths of their 95 % intervals, best matches."""

    name: str
    meaning: str
    labels: list[str]
    values: Floats
    half: Floats
    matches: list[str]


def _steps(result: CKAResult) -> list[_Line]:
    half = (result.interval()[1] - result.matrix).numpy()
    values = result.matrix.numpy()
    lines = []
    for model, pairs in steps(result).items():
        if pairs:
            before, after = np.array(pairs).T
            labels = [result.layer_of(result.rows[i]) for i in after]
            errors = np.nan_to_num(half[before, after])
            lines.append(_Line(model, "CKA with the layer before", labels, values[before, after], errors, []))
    return lines


def _best_matches(result: CKAResult) -> _Line:
    values = result.matrix.numpy()
    rows = np.arange(len(result.rows))
    best = np.argmax(np.where(np.isnan(values), -np.inf, values), axis=1)
    half = (result.interval()[1] - result.matrix).numpy()[rows, best]
    others = {result.model_of(label) for label in result.columns}
    other = f"in {others.pop()}" if len(others) == 1 and "" not in others else "among the columns"
    names = canvas.side_of(result, result.columns).names
    matches = ["" if np.isnan(values[i, j]) else names[j] for i, j in enumerate(best.tolist())]
    labels = canvas.side_of(result, result.rows).names
    return _Line("", f"CKA with the best match {other}", labels, values[rows, best], np.nan_to_num(half), matches)


def _draw(axes: Axes, lines: list[_Line], title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    most = max(len(line.labels) for line in lines)
    # Depth is the only thing that layers of different networks have in common on this axis.
    shared = all(line.labels == lines[0].labels for line in lines)
    # Ten colours are distinguishable. More models are usually checkpoints, which have an order.
    few = len(lines) <= 10
    colours = colormaps["tab10" if few else "viridis"](range(10) if few else np.linspace(0, 0.95, len(lines)))
    handles: list[Any] = []
    for line, colour in zip(lines, map(tuple, colours), strict=False):
        count = len(line.labels)
        at = np.arange(count, dtype=float) if shared else np.linspace(0, 1, count)
        handles.append(_draw_line(axes, line, at, colour))
    ends = [end for line in lines for end in (line.values - line.half, line.values + line.half)]
    # The fixed scale of the heatmap, extended only if an interval reaches beyond it.
    axes.set_ylim(
        min(float(np.nanmin(end, initial=0.0)) for end in ends),
        max(float(np.nanmax(end, initial=1.0)) for end in ends) + 0.02,
    )
    axes.set_yticks([step / 5 for step in range(6)])
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize=FONT)
    axes.set_ylabel(lines[0].meaning, fontsize=FONT + 1)
    handles = handles if len(handles) > 1 else []
    beside = len(handles) > _ABOVE
    if any(np.isnan(line.values).any() for line in lines):
        handles.append(Patch(facecolor=MISSING, label="undefined"))
    if beside:
        canvas.legend_beside(axes, handles)
    canvas.set_title(axes, title, 0 if beside else canvas.legend_above(axes, handles))
    if shared:
        axes.set_xlim(-0.5, most - 0.5)
        for _ in canvas.rounds(axes):
            canvas.write_side(axes, axes.xaxis, Side([""] * most, _with_matches(lines[0], canvas.inches(axes)[0])))
    else:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([step / 5 for step in range(6)])
        axes.set_xlabel("depth, first layer to last", fontsize=FONT + 1)
        axes.tick_params(axis="x", labelsize=FONT)


def _with_matches(line: _Line, width: float) -> list[str]:
    """The labels, each with its best match if all of them fit."""
    if not line.matches or len(line.labels) * canvas.PITCH > width:
        return line.labels
    both = zip(line.labels, line.matches, strict=True)
    return [f"{canvas.shortened(a)} → {canvas.shortened(b)}" if b else a for a, b in both]


def _draw_line(axes: Axes, line: _Line, at: Floats, colour: Any) -> Any:
    """Draw one line with its intervals, grey where it is undefined. Return it for the legend."""
    few = len(at) <= 60
    (handle,) = axes.plot(
        at, line.values, marker="o", markersize=3.5 if few else 1.5, linewidth=1.0, label=line.name, color=colour
    )
    if few:
        axes.errorbar(at, line.values, yerr=line.half, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2)
    else:
        axes.fill_between(at, line.values - line.half, line.values + line.half, color=colour, alpha=0.25, lw=0)
    half_step = (at[1] - at[0]) / 2 if len(at) > 1 else 0.5
    for place in at[np.isnan(line.values)]:
        axes.axvspan(place - half_step, place + half_step, color=MISSING, lw=0, zorder=0)
    return handle
