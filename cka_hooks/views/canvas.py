"""What all pictures share: a figure of the right size, labels that fit, titles, legends and files.

Labels are thinned to the room that the axes have, so the size of the axes is fixed before anything is drawn. A new
figure grows around its axes. If you ask for a size, the axes get what the labels leave. Axes that you pass are
measured. A figure that goes to a file is made without ``pyplot``, so no window system is touched.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cka_hooks.errors import MissingExtraError, OptionError, imported
from cka_hooks.files import PathLike, replace_file
from cka_hooks.names import printable
from cka_hooks.results.result import CKAResult
from cka_hooks.views.labels import runs, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Colour of what is undefined.
MISSING = "0.85"
#: Font size of layer labels, in points.
FONT = 7.0
#: Inches from one line of labels to the next.
PITCH = FONT * 1.3 / 72
#: Inches of the longest side of the axes: 60 labels.
SIDE = 7.8

_LONGEST = 36  # characters of a label
_MARGIN = 0.12  # inches of white around everything
_LEAST = 0.4  # inches of axes in which something can be seen

#: Width and height in inches.
Size = tuple[float, float]


def drawn(
    draw: Callable[[Axes], None], path: PathLike | None, ax: Axes | None, figsize: Size | None, size: Size
) -> tuple[Figure, Axes]:
    """Let ``draw`` fill axes, and place these in a figure.

    Args:
        draw: draws a whole picture into axes whose size is final.
        path: where the picture will be written, None if ``pyplot`` is to show it.
        ax: axes to draw into instead of a new figure.
        figsize: size of the figure; None makes it as large as the axes and their labels need.
        size: size of the axes if nothing else decides it.

    Raises:
        MissingExtraError: matplotlib is not installed, or does not start.
        OptionError: ``figsize`` is not a size, or has no room for the labels.
    """
    _require_matplotlib()
    if ax is not None:
        if figsize is not None:
            raise OptionError(
                "figsize= sets the size of a new figure, and ax= belongs to one already: leave one of them out"
            )
        draw(ax)
        return ax.figure.figure, ax  # of a subfigure, the whole figure
    if figsize is None:
        figure, axes = _canvas(path is None, size)
        draw(axes)
        edges = _edges(figure, axes)
    else:
        width, height = _checked(figsize)
        size = (0.6 * width, 0.6 * height)
        edges = (0.0, 0.0, 0.0, 0.0)
        # In other axes, other labels fit, which leave other room. This may alternate, so the largest edges count.
        for number in range(4):
            figure, axes = _canvas(number == 3 and path is None, size)
            draw(axes)
            found = _edges(figure, axes)
            left, right, below, above = edges = tuple(map(max, edges, found)) if number > 1 else found
            size = (width - left - right, height - below - above)
            if min(size) < _LEAST:
                needed = f"{width - size[0] + _LEAST:.1f} by {height - size[1] + _LEAST:.1f}"
                raise OptionError(
                    f"figsize={figsize!r} leaves no room beside the labels: make it at least {needed} inches"
                )
    left, right, below, above = edges
    total = (left + size[0] + right, below + size[1] + above)
    figure.set_size_inches(*total)
    axes.set_position((left / total[0], below / total[1], size[0] / total[0], size[1] / total[1]))
    return figure, axes


def written(figure: Figure, path: PathLike | None) -> None:
    """Write the figure into a file, if there is one.

    Raises:
        OptionError: the suffix of ``path`` is not a picture format.
        OSError: the file cannot be written.
    """
    if path is None:
        return
    suffix = os.path.splitext(os.fspath(path))[1].lower().lstrip(".")
    formats = figure.canvas.get_supported_filetypes()
    if suffix not in formats:
        raise OptionError(
            f"{os.fspath(path)} ends in {'.' + suffix if suffix else 'no suffix'}, which is not a "
            f"picture format: use one of {', '.join('.' + name for name in sorted(formats))}"
        )
    replace_file(path, lambda file: figure.savefig(file, format=suffix))


def rounds(axes: Axes) -> Iterator[None]:
    """Run once; run twice if a layout engine resizes the axes as soon as it knows their labels."""
    yield
    if axes.figure.figure.get_layout_engine() is not None:
        axes.figure.figure.draw_without_rendering()
        yield


def inches(axes: Axes) -> Size:
    """Width and height of the axes as they are now."""
    axes.apply_aspect()
    box = axes.get_window_extent()
    return box.width / axes.figure.dpi, box.height / axes.figure.dpi


def _require_matplotlib() -> None:
    try:
        imported("matplotlib", "plotting needs matplotlib, which is not installed", '"cka-hooks[plot]"')
    except MissingExtraError:
        raise
    except Exception as error:  # a matplotlibrc or an MPLBACKEND that it does not take
        raise MissingExtraError(f"plotting needs matplotlib, which fails to start: {error}") from error


def _canvas(shown: bool, size: Size) -> tuple[Figure, Axes]:
    """Axes of this size in a figure twice as large, which is one of ``pyplot`` if it is to be shown."""
    figsize = (size[0] * 2, size[1] * 2)
    if shown:
        try:
            from matplotlib import pyplot

            figure = pyplot.figure(figsize=figsize)
        except Exception as error:
            raise MissingExtraError(
                f"matplotlib cannot show a figure here ({error}): choose another backend with MPLBACKEND or "
                "matplotlib.use, or give a path to write the picture to"
            ) from error
    else:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=figsize, dpi=200)
        FigureCanvasAgg(figure)  # measures texts quickly; vector formats are still written as such
    return figure, figure.add_axes((0.25, 0.25, 0.5, 0.5))


def _checked(figsize: Any) -> Size:
    try:
        width, height = (float(side) for side in figsize)
        if 0 < width < math.inf and 0 < height < math.inf:
            return width, height
    except (TypeError, ValueError):
        pass
    raise OptionError(f"figsize is {figsize!r}: expected width and height in inches, such as (6, 5)")


def _edges(figure: Figure, axes: Axes) -> tuple[float, ...]:
    """Inches that labels, titles and scales need around the axes: at the left, at the right, below and above."""
    figure.draw_without_rendering()
    around, inside = axes.get_tightbbox(), axes.get_window_extent()
    if around is None:
        return (_MARGIN,) * 4
    lengths = (inside.x0 - around.x0, around.x1 - inside.x1, inside.y0 - around.y0, around.y1 - inside.y1)
    return tuple(length / figure.dpi + _MARGIN for length in lengths)


# ---- labels ---------------------------------------------------------------------------------------


class Side(NamedTuple):
    """What is written along one side of a matrix, one entry per layer.

    Attributes:
        models: names of the models, ``""`` to write none.
        names: labels of the layers within their models.
    """

    models: list[str]
    names: list[str]


def side_of(result: CKAResult, labels: Sequence[str]) -> Side:
    """Models and layers of these labels; models alone if each has one layer, the same in all."""
    models = [result.model_of(label) for label in labels]
    names = [result.layer_of(label) for label in labels]
    if len(models) > 1 and len(set(models)) == len(models):
        return Side([""] * len(models), models if len(set(names)) == 1 else list(labels))
    return Side(models, names)


def write_side(axes: Axes, axis: Axis, side: Side) -> None:
    """Write thinned labels along one axis, in the room that the axes have now."""
    horizontal = axis is axes.xaxis
    room = inches(axes)[0 if horizontal else 1] / len(side.names)
    spans = thinned(side.models, side.names, PITCH / room)
    texts = [shortened(span.name, 2 * _LONGEST + 3 if " → " in span.name else _LONGEST) for span in spans]
    flat = all(len(text) * FONT * 0.65 / 72 <= room for text in texts) and len(spans) == len(side.names)
    axis.set_ticks([span.middle for span in spans])
    axis.set_ticklabels(texts, fontsize=FONT, parse_math=False, rotation=0 if flat or not horizontal else 90)
    axis.set_tick_params(length=2, width=0.5, pad=2)


def write_models(axes: Axes, axis: Axis, models: Sequence[str]) -> None:
    """Write the names of the models outside the labels of their layers, along their stretch or across it."""
    if not any(models):
        return
    horizontal = axis is axes.xaxis
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    end = "y0" if horizontal else "x0"
    ends = [getattr(label.get_window_extent(), end) for label in axis.get_ticklabels()]
    away = min(-3, *((other - getattr(box, end)) * 72 / dpi for other in ends)) - 5
    room = (box.width if horizontal else box.height) / len(models)
    texts: list[tuple[Text, str, float]] = []
    for start, stop, model in runs(models):
        middle = (start + stop - 1) / 2
        text: Text = axes.annotate(
            shortened(model),
            (middle, 0) if horizontal else (0, middle),
            xycoords=("data", "axes fraction") if horizontal else ("axes fraction", "data"),
            xytext=(0, away) if horizontal else (away, 0),
            textcoords="offset points",
            rotation=0 if horizontal else 90,
            ha="center" if horizontal else "right",
            va="top" if horizontal else "center",
            fontsize=FONT + 2,
            fontweight="bold",
            parse_math=False,
            annotation_clip=False,
        )
        texts.append((text, model, (stop - start) * room))
    if not all(_fits(*entry, horizontal, least=12) for entry in texts):
        for text, model, _ in texts:
            text.set_text(shortened(model))
            text.set_rotation(90 if horizontal else 0)
        for entry in texts:
            if not _fits(*entry, horizontal, least=1):
                entry[0].remove()


def _fits(text: Text, model: str, room: float, horizontal: bool, least: int) -> bool:
    """Shorten a name until it fits into its stretch, but not below ``least`` letters."""
    for letters in (_LONGEST, 30, 20, 15, 12, 10, 6, 4, 3, 2, 1):
        extent = text.get_window_extent()
        if (extent.width if horizontal else extent.height) <= room:
            return True
        if letters < min(least, len(model)):
            return False
        text.set_text(shortened(model, letters))
    return False


def shortened(label: str, most: int = _LONGEST) -> str:
    """The label on one line. A long one loses its middle, because layers differ at the ends."""
    label = printable(label)
    if len(label) <= most:
        return label
    front = (most - 1) // 3
    return f"{label[:front]}…{label[len(label) - (most - 1 - front) :]}"


def title_of(result: CKAResult, what: str) -> str:
    """The default title: the models, what is shown of them, and the number of samples."""
    names = [shortened(name) for name in result.models]
    layers = {result.layer_of(label) for label in result.layers}
    joined = " against " if len(names) == 2 and not result.square else ", "
    models = joined.join(names) if len(names) <= 3 else f"{len(names)} models"
    if len(names) > 1 and len(layers) == 1:
        models = f"{shortened(layers.pop())} of {models}"
    return f"{models}: {what}, {result.samples:,} samples" if names else f"{what}, {result.samples:,} samples"


def set_title(axes: Axes, title: str, lines_below: int) -> None:
    """Write the title at the left, wrapped to the axes, above a legend of this many lines."""
    size = FONT + 3
    letters = max(16, int((inches(axes)[0] + 0.4) / (size * 0.52 / 72)))
    lines = "\n".join(textwrap.wrap(title, letters))
    axes.set_title(lines, fontsize=size, loc="left", pad=7 + 11 * lines_below, parse_math=False)


def legend_above(axes: Axes, handles: list[Any]) -> int:
    """Draw a legend above the axes, where it hides nothing. Return the number of its lines."""
    if not handles:
        return 0
    letters = max(len(handle.get_label()) for handle in handles) + 6
    columns = max(1, min(len(handles), int(inches(axes)[0] / (letters * FONT * 0.52 / 72))))
    _legend(axes, handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderaxespad=0.0)
    return -(-len(handles) // columns)


def legend_beside(axes: Axes, handles: list[Any]) -> None:
    """Draw a legend to the right of the axes, for more lines than fit above them."""
    rows = max(1, int(inches(axes)[1] / (FONT * 1.45 / 72)))
    columns = -(-len(handles) // rows)
    _legend(axes, handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), ncols=columns, borderaxespad=0.0)


def _legend(axes: Axes, handles: list[Any], **place: Any) -> None:
    legend = axes.legend(
        handles=handles,
        **place,
        fontsize=FONT,
        frameon=False,
        borderpad=0.2,
        labelspacing=0.35,
        handlelength=1.5,
        columnspacing=1.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
