"""Draw the matrix with matplotlib: colours, scale, lines between models, values in cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cka_hooks.errors import OptionError, warn
from cka_hooks.files import PathLike
from cka_hooks.results.result import CKAResult
from cka_hooks.results.words import UNRELATED, unrelated
from cka_hooks.views import canvas
from cka_hooks.views.canvas import FONT, MISSING, Side, Size
from cka_hooks.views.labels import runs, section_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    Floats = npt.NDArray[np.float64]

#: Colours of CKA values and of standard errors.
VALUE_COLOURS, ERROR_COLOURS = "viridis", "magma"

_CELL = {0: 0.5, 1: 0.36, 2: 0.48}  # inches of a cell at most, or with one or two lines in it at least


class Scale(NamedTuple):
    """Colours and their values, as :meth:`CKAResult.plot` takes them; None is the default for what is drawn."""

    cmap: str | Colormap | None = None
    vmin: float | Literal["data"] | None = None
    vmax: float | Literal["data"] | None = None


def heatmap(
    result: CKAResult,
    path: PathLike | None = None,
    *,
    ax: Axes | None = None,
    values: bool = False,
    stderr: bool = False,
    title: str | None = None,
    scale: Scale | None = None,
    figsize: Size | None = None,
) -> tuple[Figure, Axes]:
    """Draw the matrix; see :meth:`CKAResult.plot`.

    Without ``path`` and ``ax``, the figure is one of ``pyplot``, which a notebook shows by itself.

    Args:
        result: what to draw, R rows by C columns.
        path: also write the picture to this file. Its suffix sets the format.
        ax: draw into these axes instead of a new figure.
        values: write each value into its cell. If cells are too small, a warning says so.
        stderr: colour by standard error; with ``values``, colour by CKA and write both.
        title: replaces the default title.
        scale: colours, and the values of the first and the last one.
        figsize: size of the figure, in inches.

    Returns:
        The figure and the axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the suffix of ``path`` is not a picture format, or ``scale`` or ``figsize`` cannot be used.

    Example:
        >>> from matplotlib.figure import Figure
        >>> _, axes = heatmap(CKAResult.example(), ax=Figure().add_subplot())
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['conv1', 'conv2', 'fc']
    """
    lines = (2 if stderr else 1) if values else 0
    by_error = stderr and not values

    def draw(axes: Axes) -> None:
        _draw(result, axes, by_error, scale or Scale(), title, given=ax is not None)

    figure, axes = canvas.drawn(draw, path, ax, figsize, _size(len(result.rows), len(result.columns), lines))
    if lines:
        _write_values(axes, result, stderr=stderr)
    canvas.written(figure, path)
    return figure, axes


def _size(rows: int, columns: int, lines: int) -> Size:
    """Width and height of the axes in inches."""
    cell = min(_CELL[0], canvas.SIDE / max(rows, columns))
    if lines and _CELL[lines] * max(rows, columns) <= 1.6 * canvas.SIDE:
        cell = max(cell, _CELL[lines])
    # Stretch a long narrow matrix, which would otherwise be a thread.
    return max(columns * cell, 1.5), max(rows * cell, 1.5)


def _draw(result: CKAResult, axes: Axes, by_error: bool, scale: Scale, title: str | None, *, given: bool) -> None:
    rows, columns = result.matrix.shape
    shown = (result.stderr if by_error else result.matrix).numpy()
    low, high = _ends(scale, shown, by_error)
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        cmap=_colours(scale.cmap, ERROR_COLOURS if by_error else VALUE_COLOURS),
        vmin=low,
        vmax=high,
        origin="lower",
        interpolation="nearest",
        aspect="equal" if given and max(rows, columns) <= 3 * min(rows, columns) else "auto",
    )
    what = "standard error of CKA" if by_error else "CKA"
    if "data" in (scale.vmin, scale.vmax):
        what += f", colours from {low:.4g} to {high:.4g}"
    _colourbar(axes, image, what, _beyond(shown, low, high), given)
    legend = _mark_missing(axes, shown)
    if not by_error:
        legend += _mark_unrelated(axes, unrelated(result))
    row_side, column_side = canvas.side_of(result, result.rows), canvas.side_of(result, result.columns)
    _separate(row_side, axes.axhline)
    _separate(column_side, axes.axvline)
    if title is None:
        title = canvas.title_of(result, "standard errors of CKA" if by_error else "CKA")
    canvas.set_title(axes, title, canvas.legend_above(axes, legend))
    for _ in canvas.rounds(axes):
        canvas.write_side(axes, axes.yaxis, row_side)
        canvas.write_side(axes, axes.xaxis, column_side)
    canvas.write_models(axes, axes.yaxis, row_side.models)
    canvas.write_models(axes, axes.xaxis, column_side.models)


# ---- colours --------------------------------------------------------------------------------------


def _ends(scale: Scale, shown: Floats, by_error: bool) -> tuple[float, float]:
    """The values of the first and the last colour."""
    ends = []
    defined = shown[np.isfinite(shown)]
    lowest, highest = (float(defined.min()), float(defined.max())) if defined.size else (0.0, 1.0)
    step = 10.0 ** (math.floor(math.log10(highest - lowest or 0.1)) - 1)
    defaults = 0.0, _round_up(highest) if by_error and defined.size else 1.0
    fitting = math.floor(lowest / step + 1e-9) * step, math.ceil(highest / step - 1e-9) * step
    for name, end, default, fit in zip(("vmin", "vmax"), scale[1:], defaults, fitting, strict=True):
        if end is not None and end != "data" and not (isinstance(end, int | float) and math.isfinite(end)):
            raise OptionError(f'{name} is {end!r}: expected a number, or "data" for a scale that fits the values')
        ends.append(default if end is None else fit if end == "data" else float(end))
    low, high = ends
    if not low < high:
        if "data" not in scale[1:]:
            raise OptionError(f"vmin={low:g} is not below vmax={high:g}: swap them, or leave one out")
        low, high = (low - step, high) if scale.vmin == "data" else (low, low + step)
    return low, high


def _colours(cmap: str | Colormap | None, default: str) -> Any:
    import matplotlib
    from matplotlib.colors import Colormap

    if isinstance(cmap, Colormap):
        return cmap.with_extremes(bad=MISSING)
    try:
        return matplotlib.colormaps[cmap or default].with_extremes(bad=MISSING)
    except (KeyError, TypeError) as error:
        raise OptionError(f"cmap is {cmap!r}: expected the name of a colour map, such as {default!r}") from error


def _colourbar(axes: Axes, image: AxesImage, what: str, beyond: str, given: bool) -> None:
    figure = axes.figure.figure
    if given:
        colourbar = figure.colorbar(image, ax=axes, extend=beyond, fraction=0.05, pad=0.03)
    else:
        # At a fixed distance from the axes, whatever the labels on the other side need.
        width, height = canvas.inches(axes)
        bar = axes.inset_axes((1 + 0.12 / width, 0.0, 0.16 / width, min(1.0, 3.2 / height)))
        colourbar = figure.colorbar(image, cax=bar, extend=beyond)
    low, high = image.get_clim()
    if low == 0:
        colourbar.set_ticks([high * step / 5 for step in range(6)])
    colourbar.ax.tick_params(labelsize=FONT)
    colourbar.set_label(what, fontsize=FONT + 1)


def _beyond(values: Floats, low: float, high: float) -> str:
    """The ends of the scale with values beyond them, which are drawn in the last colour."""
    slack = 0.005 * (high - low)
    ends = bool((values < low - slack).any()), bool((values > high + slack).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[ends]


def _round_up(value: float) -> float:
    """The next number with one digit that is not smaller, for the end of a colour scale."""
    if not value > 0:
        return 0.01
    digit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / digit - 1e-9) * digit


# ---- cells ----------------------------------------------------------------------------------------


def _mark_missing(axes: Axes, shown: Floats) -> list[Any]:
    """Hatch the rows and columns without a value. Return the legend's entries for them."""
    from matplotlib.patches import Patch, Rectangle

    missing: npt.NDArray[np.bool_] = np.isnan(shown)
    if not missing.any():
        return []
    rows, columns = missing.shape
    style: dict[str, Any] = {"facecolor": MISSING, "edgecolor": "0.6", "hatch": "////", "linewidth": 0.0}
    if not missing.all():
        for start, stop in _marked(missing.all(1)):
            axes.add_patch(Rectangle((-0.5, start - 0.5), columns, stop - start, **style))
        for start, stop in _marked(missing.all(0)):
            axes.add_patch(Rectangle((start - 0.5, -0.5), stop - start, rows, **style))
    return [Patch(label="undefined", **style)]


def _mark_unrelated(axes: Axes, found: npt.NDArray[np.bool_]) -> list[Any]:
    """Hatch the entries that are indistinguishable from unrelated ones. Return the legend's entries for them."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    if not found.any():
        return []
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": "white", "hatch": "....", "linewidth": 0.0}
    cells = [
        Rectangle((start - 0.5, row - 0.5), stop - start, 1)
        for row, flags in enumerate(found)
        for start, stop in _marked(flags)
    ]
    axes.add_collection(PatchCollection(cells, **style), autolim=False)
    colour = axes.images[-1].cmap(0.0)
    return [Patch(label=f"indistinguishable from unrelated (p > {UNRELATED})", **{**style, "facecolor": colour})]


def _marked(flags: npt.ArrayLike) -> list[tuple[int, int]]:
    """Runs of True: their first positions, and one past their last ones."""
    return [(start, stop) for start, stop, flag in runs(np.asarray(flags).tolist()) if flag]


def _separate(side: Side, line: Any) -> None:
    """Draw fine lines between the large parts of a model, and strong ones between models."""
    models = side.models
    between = {i - 0.5 for i in range(1, len(models)) if models[i] != models[i - 1]}
    for place in section_lines(models, side.names):
        if place not in between:
            line(place, color="white", linewidth=0.5, alpha=0.55)
    for place in between:
        line(place, color="white", linewidth=2.0)


def _write_values(axes: Axes, result: CKAResult, *, stderr: bool) -> None:
    rows, columns = result.matrix.shape
    width, height = canvas.inches(axes)
    need = _CELL[2 if stderr else 1]
    if width / columns < 0.8 * need or height / rows < 0.5 * need:
        warn(
            f"the cells of {rows} x {columns} layers are too small to write values into, so they are left out: "
            "choose fewer layers with result.select(...), or larger axes"
        )
        return
    image = axes.images[-1]
    values, errors, hatched = result.matrix.tolist(), result.stderr.tolist(), unrelated(result)
    for i in range(rows):
        for j in range(columns):
            if math.isnan(values[i][j]):
                continue
            text = f"{values[i][j]:.2f}"
            if stderr and not math.isnan(errors[i][j]):
                text += f"\n±{_short_error(errors[i][j])}"
            # Black or white, whichever contrasts more with the colour of the cell.
            cell = image.cmap(image.norm(values[i][j]))
            bright = (
                sum(share * part**2.2 for share, part in zip((0.2126, 0.7152, 0.0722), cell, strict=False)) > 0.25
            )
            number = axes.text(j, i, text, ha="center", va="center", fontsize=6, color="black" if bright else "white")
            if hatched[i, j]:
                number.set_bbox({"facecolor": cell, "edgecolor": "none", "pad": 1.0})


def _short_error(error: float) -> str:
    if 0 < error < 0.0005:
        return f"{error:.0e}".replace("e-0", "e-")
    return f"{error:.3f}".lstrip("0") if error else "0"
