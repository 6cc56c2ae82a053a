"""Pictures of a result with matplotlib: the heatmap, and the profile along the layers.

Sizes are in inches and fixed before anything is drawn, because the labels are thinned to the room
there is: a figure of our own is grown around its axes, and axes that were handed in are measured.
A figure that goes to a file is made without ``pyplot``, so that no window system is touched.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cka_hooks.errors import CKAWarning, MissingExtraError, OptionError
from cka_hooks.files import PathLike, replace_file
from cka_hooks.results.result import CKAResult
from cka_hooks.views.labels import boundaries, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    Floats = npt.NDArray[np.float64]

#: Colours of CKA values from 0 to 1, of standard errors from 0 up, and of what is undefined.
VALUE_COLOURS, ERROR_COLOURS, MISSING = "viridis", "magma", "0.85"

_FONT = 7.0
_PITCH = _FONT * 1.3 / 72  # inches from one line of labels to the next
_SIDE = 7.8  # inches, the longest side of the axes: 60 labels
_CELL = {0: 0.5, 1: 0.36, 2: 0.48}  # inches of a cell at most, or with one or two lines in it at least
_LONGEST = 36  # characters of a label


def heatmap(
    result: CKAResult,
    path: PathLike | None = None,
    *,
    ax: Axes | None = None,
    values: bool = False,
    stderr: bool = False,
    title: str | None = None,
) -> tuple[Figure, Axes]:
    """Draw the matrix; see :meth:`CKAResult.plot`.

    Without ``path`` and ``ax`` the figure is one of ``pyplot``, which a notebook shows by itself.

    Args:
        result: what to draw, R rows by C columns.
        path: also write the picture there; the suffix says the format.
        ax: draw into these axes instead of a new figure.
        values: write each value into its cell. Where cells are too small, a warning says so.
        stderr: colour by standard error; with ``values``, colour by CKA and write both.
        title: instead of the default title.

    Returns:
        The figure and the axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the suffix of ``path`` is no picture format.

    Example:
        >>> from matplotlib.figure import Figure
        >>> _, axes = heatmap(CKAResult.example(), ax=Figure().add_subplot())
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['conv1', 'conv2', 'fc']
    """
    _require_matplotlib()
    rows, columns = result.matrix.shape
    lines = (2 if stderr else 1) if values else 0
    by_error = stderr and not values
    figure, axes = _canvas(path, ax, *_sides(rows, columns, lines))
    shown = (result.stderr if by_error else result.matrix).numpy()
    most = _round_up(float(np.nanmax(shown, initial=0.0))) if by_error else 1.0
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        cmap=_colours(ERROR_COLOURS if by_error else VALUE_COLOURS),
        vmin=0.0,
        vmax=most,
        origin="lower",
        interpolation="nearest",
        aspect="equal" if ax is not None and max(rows, columns) <= 3 * min(rows, columns) else "auto",
    )
    beyond = "neither" if by_error else _beyond(shown)
    if ax is None:
        # Beside the axes by a fixed length, whatever the labels on the other side will take.
        width, height = _inches(axes)
        bar = axes.inset_axes((1 + 0.12 / width, 0.0, 0.16 / width, min(1.0, 3.2 / height)))
        colourbar = figure.colorbar(image, cax=bar, extend=beyond)
    else:
        colourbar = figure.colorbar(image, ax=axes, extend=beyond, fraction=0.05, pad=0.03)
    colourbar.set_ticks([most * step / 5 for step in range(6)])
    colourbar.ax.tick_params(labelsize=_FONT)
    colourbar.set_label("standard error of CKA" if by_error else "CKA", fontsize=_FONT + 1)

    noted = _mark_missing(axes, shown)
    what = "standard errors of CKA" if by_error else "CKA"
    _set_title(axes, _title(result, what) if title is None else title, noted)
    row_models = [result.model_of(label) for label in result.rows]
    column_models = [result.model_of(label) for label in result.columns]
    row_names = [result.layer_of(label) for label in result.rows]
    column_names = [result.layer_of(label) for label in result.columns]
    _separate(axes, row_models, row_names, column_models, column_names)
    for _ in _rounds(figure, ax):
        _write_labels(axes, axes.yaxis, row_models, row_names)
        _write_labels(axes, axes.xaxis, column_models, column_names)
    _write_models(axes, axes.yaxis, row_models)
    _write_models(axes, axes.xaxis, column_models)
    if lines:
        _write_values(axes, result, stderr=stderr)
    return _finish(figure, axes, path, grow=ax is None)


def profile(
    result: CKAResult, path: PathLike | None = None, *, ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw the similarity of consecutive layers, or of best matches; see :meth:`CKAResult.plot_profile`.

    Args:
        result: a square result, or one that :meth:`CKAResult.between` cut.
        path: also write the picture there; the suffix says the format.
        ax: draw into these axes instead of a new figure.
        title: instead of the default title.

    Returns:
        The figure and the axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: there are not two layers to compare, or the suffix of ``path`` is no picture format.

    Example:
        >>> from matplotlib.figure import Figure
        >>> _, axes = profile(CKAResult.example(), ax=Figure().add_subplot())
        >>> axes.get_ylabel()
        'CKA with the next layer'
    """
    _require_matplotlib()
    from matplotlib.patches import Patch

    lines = _steps(result) if result.square else [_best_matches(result)]
    lines = [line for line in lines if line.labels]
    if not lines:
        raise OptionError("a profile needs at least two layers of one model, or one row and one column")
    most = max(len(line.labels) for line in lines)
    figure, axes = _canvas(path, ax, min(_SIDE, max(3.2, most * _PITCH * 1.05)), 2.6)
    # Layers of different networks have no common place on the axis but their depth.
    shared = all(line.labels == lines[0].labels for line in lines)
    handles: list[Any] = []
    for line in lines:
        count = len(line.labels)
        at = np.arange(count, dtype=float) if shared else np.linspace(0, 1, count)
        handles.append(_draw_line(axes, line, at))
    ends = [end for line in lines for end in (line.values - line.half, line.values + line.half)]
    # The fixed scale of the heatmap, and more only where an interval reaches beyond it.
    axes.set_ylim(
        min(float(np.nanmin(end, initial=0.0)) for end in ends),
        max(float(np.nanmax(end, initial=1.0)) for end in ends) + 0.02,
    )
    axes.set_yticks([step / 5 for step in range(6)])
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize=_FONT)
    axes.set_ylabel(lines[0].meaning, fontsize=_FONT + 1)
    if shared:
        axes.set_xlim(-0.5, most - 0.5)
        for _ in _rounds(figure, ax):
            labels = lines[0].labels
            if lines[0].matches and most * _PITCH <= _inches(axes)[0]:
                both = zip(labels, lines[0].matches, strict=True)
                labels = [f"{_shortened(a)} → {_shortened(b)}" if b else a for a, b in both]
            _write_labels(axes, axes.xaxis, [""] * most, labels)
    else:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([step / 5 for step in range(6)])
        axes.set_xlabel("depth, first layer to last", fontsize=_FONT + 1)
        axes.tick_params(axis="x", labelsize=_FONT)
    if len(lines) < 2:
        handles = []
    if any(np.isnan(line.values).any() for line in lines):
        handles.append(Patch(facecolor=MISSING, label="undefined"))
    if handles:
        _legend(axes, handles)
    what = "CKA with the next layer" if result.square else "best matches by CKA"
    _set_title(axes, _title(result, what) if title is None else title, bool(handles))
    return _finish(figure, axes, path, grow=ax is None)


class _Line(NamedTuple):
    """One line of a profile: what its values mean, their 95 % intervals as half widths, what matched best."""

    name: str
    meaning: str
    labels: list[str]
    values: Floats
    half: Floats
    matches: list[str]


def _draw_line(axes: Axes, line: _Line, at: Floats) -> Any:
    """One line with its intervals, grey where it is undefined; returned for the legend."""
    few = len(at) <= 60
    (drawn,) = axes.plot(at, line.values, marker="o", markersize=3.5 if few else 1.5, linewidth=1.0, label=line.name)
    colour = drawn.get_color()
    if few:
        axes.errorbar(at, line.values, yerr=line.half, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2)
    else:
        axes.fill_between(at, line.values - line.half, line.values + line.half, color=colour, alpha=0.25, lw=0)
    half_step = (at[1] - at[0]) / 2 if len(at) > 1 else 0.5
    for place in at[np.isnan(line.values)]:
        axes.axvspan(place - half_step, place + half_step, color=MISSING, lw=0, zorder=0)
    return drawn


def _steps(result: CKAResult) -> list[_Line]:
    half = (result.interval()[1] - result.matrix).numpy()
    values = result.matrix.numpy()
    lines = []
    for model, run in groupby(range(len(result.rows)), key=lambda i: result.model_of(result.rows[i])):
        at = np.array(list(run))
        labels = [result.layer_of(result.rows[i]) for i in at[:-1]]
        pairs = (at[:-1], at[1:])
        lines.append(_Line(model, "CKA with the next layer", labels, values[pairs], np.nan_to_num(half[pairs]), []))
    return lines


def _best_matches(result: CKAResult) -> _Line:
    values = result.matrix.numpy()
    rows = np.arange(len(result.rows))
    best = np.argmax(np.where(np.isnan(values), -np.inf, values), axis=1)
    half = (result.interval()[1] - result.matrix).numpy()[rows, best]
    labels = [result.layer_of(label) for label in result.rows]
    others = {result.model_of(label) for label in result.columns}
    other = f"in {others.pop()}" if len(others) == 1 and "" not in others else "among the columns"
    matches = [
        "" if np.isnan(values[i, j]) else result.layer_of(result.columns[j]) for i, j in enumerate(best.tolist())
    ]
    meaning = f"CKA with the best match {other}"
    return _Line("", meaning, labels, values[rows, best], np.nan_to_num(half), matches)


def _legend(axes: Axes, handles: list[Any]) -> None:
    """A line above the axes, so that it hides nothing in them."""
    legend = axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(handles),
        fontsize=_FONT,
        frameon=False,
        borderpad=0.2,
        borderaxespad=0.0,
        handlelength=1.5,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


# ---- figure ---------------------------------------------------------------------------------------


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            'plotting needs matplotlib, which is not installed: pip install "cka-hooks[plot]"'
        ) from error


def _sides(rows: int, columns: int, lines: int) -> tuple[float, float]:
    """Width and height of the axes in inches."""
    cell = min(_CELL[0], _SIDE / max(rows, columns))
    if lines and _CELL[lines] * max(rows, columns) <= 1.6 * _SIDE:
        cell = max(cell, _CELL[lines])
    # A long narrow matrix is stretched rather than drawn as a thread.
    return max(columns * cell, 1.5), max(rows * cell, 1.5)


def _canvas(path: PathLike | None, ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Axes of this size in inches, in a figure that :func:`_finish` fits around them."""
    if ax is not None:
        return ax.figure.figure, ax  # of a subfigure, the whole figure
    size = (width * 2, height * 2)
    if path is None:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=size)
    else:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, dpi=200)
        FigureCanvasAgg(figure)  # measures texts quickly; vector formats are still written as such
    return figure, figure.add_axes((0.25, 0.25, 0.5, 0.5))


def _finish(figure: Figure, axes: Axes, path: PathLike | None, *, grow: bool) -> tuple[Figure, Axes]:
    if grow:
        _fit(figure, axes)
    if path is not None:
        suffix = os.path.splitext(os.fspath(path))[1].lower().lstrip(".")
        formats = figure.canvas.get_supported_filetypes()
        if suffix not in formats:
            raise OptionError(
                f"{os.fspath(path)} ends in {'.' + suffix if suffix else 'no suffix'}, which is no "
                f"picture format; expected one of {', '.join('.' + name for name in sorted(formats))}"
            )
        replace_file(path, lambda file: figure.savefig(file, format=suffix))
    return figure, axes


def _fit(figure: Figure, axes: Axes) -> None:
    """Make the figure as large as what is drawn, and leave the axes the size they have."""
    figure.draw_without_rendering()
    around = axes.get_tightbbox()
    inside = axes.get_window_extent()
    if around is None:
        return
    dpi, margin = figure.dpi, 0.12
    left, below = (inside.x0 - around.x0) / dpi + margin, (inside.y0 - around.y0) / dpi + margin
    right, above = (around.x1 - inside.x1) / dpi + margin, (around.y1 - inside.y1) / dpi + margin
    width, height = inside.width / dpi, inside.height / dpi
    total = (left + width + right, below + height + above)
    figure.set_size_inches(*total)
    axes.set_position((left / total[0], below / total[1], width / total[0], height / total[1]))


def _rounds(figure: Figure, given: Axes | None) -> Iterator[None]:
    """Once; twice where a layout engine gives the axes another size as soon as it knows their labels."""
    yield
    if given is not None and figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        yield


def _inches(axes: Axes) -> tuple[float, float]:
    axes.apply_aspect()
    box = axes.get_window_extent()
    return box.width / axes.figure.dpi, box.height / axes.figure.dpi


# ---- labels ---------------------------------------------------------------------------------------


def _write_labels(axes: Axes, axis: Axis, models: Sequence[str], names: Sequence[str]) -> None:
    """Thinned labels along one axis, in the room the axes have now."""
    horizontal = axis is axes.xaxis
    inches = _inches(axes)[0 if horizontal else 1]
    room = inches / len(names)
    spans = thinned(models, names, _PITCH / room)
    texts = [_shortened(span.name, 2 * _LONGEST + 3 if " → " in span.name else _LONGEST) for span in spans]
    flat = all(len(text) * _FONT * 0.65 / 72 <= room for text in texts) and len(spans) == len(names)
    axis.set_ticks([span.middle for span in spans])
    axis.set_ticklabels(
        texts,
        fontsize=_FONT,
        parse_math=False,
        rotation=0 if flat or not horizontal else 90,
    )
    axis.set_tick_params(length=2, width=0.5, pad=2)


def _write_models(axes: Axes, axis: Axis, models: Sequence[str]) -> None:
    """The names of the models beyond the labels of their layers, each along its own stretch."""
    if not any(models):
        return
    horizontal = axis is axes.xaxis
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    edge = (box.y0 if horizontal else box.x0) - 3 * dpi / 72
    for label in axis.get_ticklabels():
        extent = label.get_window_extent()
        edge = min(edge, extent.y0 if horizontal else extent.x0)
    away = -((box.y0 if horizontal else box.x0) - edge) * 72 / dpi - 5
    room = (box.width if horizontal else box.height) / len(models)
    for model, run in groupby(range(len(models)), key=models.__getitem__):
        at = list(run)
        middle = (at[0] + at[-1]) / 2
        text = axes.annotate(
            model,
            (middle, 0) if horizontal else (0, middle),
            xycoords=("data", "axes fraction") if horizontal else ("axes fraction", "data"),
            xytext=(0, away) if horizontal else (away, 0),
            textcoords="offset points",
            rotation=0 if horizontal else 90,
            ha="center" if horizontal else "right",
            va="top" if horizontal else "center",
            fontsize=_FONT + 2,
            fontweight="bold",
            parse_math=False,
            annotation_clip=False,
        )
        for letters in (60, 40, 30, 20, 15, 10, 6, 4, 3, 2, 1):
            text.set_text(_shortened(model, letters))
            extent = text.get_window_extent()
            if (extent.width if horizontal else extent.height) <= len(at) * room:
                break
        else:
            text.remove()


def _shortened(label: str, most: int = _LONGEST) -> str:
    """On one line, and with its middle left out where it is long: the ends tell layers apart."""
    label = "".join(letter if letter.isprintable() else "�" for letter in label)
    if len(label) <= most:
        return label
    front = (most - 1) // 3
    return f"{label[:front]}…{label[len(label) - (most - 1 - front) :]}"


def _title(result: CKAResult, what: str) -> str:
    names = [_shortened(name) for name in result.models]
    joined = " against " if len(names) == 2 and not result.square else ", "
    models = joined.join(names) if len(names) <= 3 else f"{len(names)} models"
    return f"{models}: {what}, {result.samples:,} samples" if names else f"{what}, {result.samples:,} samples"


def _set_title(axes: Axes, title: str, above_legend: bool) -> None:
    width = _inches(axes)[0] + 0.4
    size = _FONT + 3
    text: Text = axes.set_title(
        _wrapped(title, int(width / (size * 0.52 / 72))),
        fontsize=size,
        loc="left",
        pad=18 if above_legend else 7,
    )
    text.set_parse_math(False)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, max(width, 16)))


# ---- cells ----------------------------------------------------------------------------------------


def _colours(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=MISSING)


def _beyond(values: Floats) -> str:
    low = bool((values < -0.005).any())
    high = bool((values > 1.005).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[low, high]


def _round_up(value: float) -> float:
    """The next number with one digit that is not smaller: the end of a colour scale."""
    if not value > 0:
        return 0.01
    digit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / digit - 1e-9) * digit


def _mark_missing(axes: Axes, shown: Floats) -> bool:
    """Hatch the rows and columns without a value, and note what the colour means; True if there are any."""
    from matplotlib.patches import Patch, Rectangle

    missing: npt.NDArray[np.bool_] = np.isnan(shown)
    if not missing.any():
        return False
    rows, columns = missing.shape
    style: dict[str, Any] = {"facecolor": MISSING, "edgecolor": "0.6", "hatch": "////", "linewidth": 0.0}
    if not missing.all():
        for start, stop in _runs([bool(row.all()) for row in missing]):
            axes.add_patch(Rectangle((-0.5, start - 0.5), columns, stop - start, **style))
        for start, stop in _runs([bool(column.all()) for column in missing.T]):
            axes.add_patch(Rectangle((start - 0.5, -0.5), stop - start, rows, **style))
    _legend(axes, [Patch(label="undefined", **style)])
    return True


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    runs = []
    for flag, positions in groupby(range(len(flags)), key=flags.__getitem__):
        at = list(positions)
        if flag:
            runs.append((at[0], at[-1] + 1))
    return runs


def _separate(
    axes: Axes, row_models: list[str], row_names: list[str], column_models: list[str], column_names: list[str]
) -> None:
    """Fine lines between stages, strong ones between models."""
    for models, names, line in (
        (row_models, row_names, axes.axhline),
        (column_models, column_names, axes.axvline),
    ):
        between = {i - 0.5 for i in range(1, len(models)) if models[i] != models[i - 1]}
        if len(names) > 8:
            for place in boundaries(models, names):
                if place not in between:
                    line(place, color="white", linewidth=0.5, alpha=0.55)
        for place in between:
            line(place, color="white", linewidth=2.0)


def _write_values(axes: Axes, result: CKAResult, *, stderr: bool) -> None:
    rows, columns = result.matrix.shape
    width, height = _inches(axes)
    need = _CELL[2 if stderr else 1]
    if width / columns < 0.8 * need or height / rows < 0.5 * need:
        warnings.warn(
            f"the cells of {rows} x {columns} layers are too small to write values into; they are left out. "
            "Choose fewer layers with result.select(...), or larger axes.",
            CKAWarning,
            stacklevel=4,
        )
        return
    values, errors = result.matrix.tolist(), result.stderr.tolist()
    for i in range(rows):
        for j in range(columns):
            if math.isnan(values[i][j]):
                continue
            text = f"{values[i][j]:.2f}"
            if stderr and not math.isnan(errors[i][j]):
                text += f"\n±{errors[i][j]:.3f}".replace("±0.", "±.")
            # The map ends bright: dark letters there.
            bright = values[i][j] > 0.6
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color="black" if bright else "white")
