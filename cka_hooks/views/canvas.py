"""What all pictures share: a figure of the right size, labels that fit, titles, legends and files.

Labels are thinned to the room that the axes have. A new figure grows around axes of a fixed size. If you ask for a
size of the figure, the axes get what the labels leave. In axes that you pass, the labels take the room that there is.
"""

from __future__ import annotations

import math
import os
import textwrap
from typing import TYPE_CHECKING, Any

from cka_hooks.errors import MissingExtraError, OptionError
from cka_hooks.files import PathLike, replace_file
from cka_hooks.views.labels import Side, runs, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Colour of what is undefined.
MISSING = "0.85"
#: Font size of layer labels, in points.
FONT = 7.0
#: Inches from one line of labels to the next.
PITCH = FONT * 1.3 / 72
#: Inches of the longest side of the axes: 60 labels.
SIDE = 7.8

_MARGIN = 0.12  # inches of white around everything
_LEAST = 0.4  # inches of axes in which something can be seen

#: Width and height in inches.
Size = tuple[float, float]


class Canvas:
    """A figure with one picture in it.

    Args:
        path: where the picture will be written, None if ``pyplot`` is to show it.
        ax: axes to draw into instead of a new figure.
        figsize: size of the figure; None makes it as large as the axes and their labels need.
        size: size of the axes if nothing else decides it.

    Raises:
        MissingExtraError: matplotlib is not installed, or does not start.
        OptionError: ``figsize`` is not a size.
    """

    def __init__(self, path: PathLike | None, ax: Axes | None, figsize: Size | None, size: Size) -> None:
        self.path, self.figsize, self.size, self.given = path, figsize, size, ax is not None
        if ax is None:
            self.axes = _new_axes(path is None, (2 * size[0], 2 * size[1]))
        elif figsize is None:
            self.axes = ax
        else:
            raise OptionError("figsize= is for a new figure, and ax= belongs to one already: leave one of them out")
        self.figure: Figure = self.axes.figure.figure  # of a subfigure, the whole figure
        if figsize is not None:
            try:
                if min(figsize) <= 0:
                    raise ValueError
                self.figure.set_size_inches(figsize)
            except (TypeError, ValueError) as error:
                expected = "expected width and height in inches, such as (6, 5)"
                raise OptionError(f"figsize is {figsize!r}: {expected}") from error

    def label(self, title: str, handles: list[Any], sides: dict[Axis, Side]) -> None:
        """Write title, legend and the labels along each axis, in rounds, since what is written decides the size.

        Raises:
            OptionError: ``figsize`` has no room for the labels.
        """
        engine = self.figure.get_layout_engine() if self.given else None
        for _ in range(3 if self.figsize is not None or engine else 1):
            _write_title(self.axes, title, handles)
            for axis, side in sides.items():
                _write_side(self.axes, axis, side)
            if engine:
                engine.execute(self.figure)
            elif not self.given:
                self._make_room()

    def _make_room(self) -> None:
        """Place the axes so that everything around them is inside the figure."""
        # In inches: the corners of everything and of the axes, and what is between them at the left and right.
        around = self.figure.get_tightbbox().get_points()
        inside = self.axes.get_window_extent().get_points() / self.figure.dpi
        before, after = inside[0] - around[0] + _MARGIN, around[1] - inside[1] + _MARGIN
        if self.figsize is None:
            self.figure.set_size_inches(before + self.size + after)
        total = self.figure.get_size_inches()
        room = total - before - after
        if min(room) < _LEAST:
            least = " by ".join(f"{side:.1f}" for side in before + after + _LEAST)
            raise OptionError(
                f"figsize={self.figsize!r} leaves no room beside the labels: make it at least {least} inches"
            )
        self.axes.set_position((*before / total, *room / total))

    def written(self) -> tuple[Figure, Axes]:
        """Write the figure into its file, if there is one, and return it.

        Raises:
            OptionError: the suffix of ``path`` is not a picture format.
            OSError: the file cannot be written.
        """
        if self.path is not None:
            suffix = os.path.splitext(os.fspath(self.path))[1].lower().lstrip(".")
            try:
                replace_file(self.path, lambda file: self.figure.savefig(file, format=suffix))
            except ValueError as error:  # a suffix that is not a picture format
                raise OptionError(f"{os.fspath(self.path)} cannot be drawn: {error}") from error
        return self.figure, self.axes


def _new_axes(shown: bool, figsize: Size) -> Axes:
    """Axes in the middle of a figure, which is one of ``pyplot`` only if it is to be shown."""
    try:
        if shown:
            from matplotlib import pyplot

            figure = pyplot.figure(figsize=figsize)
        else:
            import matplotlib.figure

            figure = matplotlib.figure.Figure(figsize=figsize, dpi=200)
    except Exception as error:  # matplotlib may not be installed, or refuse its matplotlibrc or backend
        raise MissingExtraError(
            f'plotting needs matplotlib, which does not work here ({error}): pip install "cka-hooks[plot]", choose '
            "another backend with MPLBACKEND, or give a path to write the picture to"
        ) from error
    figure.set_layout_engine("none")
    return figure.add_axes((0.25, 0.25, 0.5, 0.5))


def inches(axes: Axes) -> Size:
    """Width and height of the axes as they are now."""
    axes.apply_aspect()
    box = axes.get_window_extent()
    return box.width / axes.figure.dpi, box.height / axes.figure.dpi


def _write_side(axes: Axes, axis: Axis, side: Side) -> None:
    """Write along one axis thinned labels, in the room that it has now, and beyond them the names of the models."""
    horizontal = axis is axes.xaxis
    room, dpi = inches(axes)[0 if horizontal else 1] / len(side.names), axes.figure.dpi
    spans = side.thinned(PITCH / room)
    matches = [span.name.split(" → ") for span in spans]  # one name, or a layer's and its best match's
    short = shortened(name for match in matches for name in match)
    texts = [" → ".join(short[name] for name in match) for match in matches]
    flat = all(len(text) * FONT * 0.65 / 72 <= room for text in texts) and len(spans) == len(side.names)
    style: dict[str, Any] = {"fontsize": FONT, "parse_math": False}
    axis.set_ticks([span.middle for span in spans], texts, rotation=90 if horizontal and not flat else 0, **style)
    axis.set_tick_params(length=2, width=0.5, pad=2)
    axis.set_ticks([], minor=True)
    if not any(side.models):
        return
    box = axes.get_window_extent()
    labels = axis.get_tightbbox() or box
    away = (box.y0 - labels.y0 if horizontal else box.x0 - labels.x0) * 72 / dpi
    models = list(runs(side.models))
    style = {"fontsize": FONT + 2, "fontweight": "bold", "parse_math": False}
    axis.remove_overlapping_locs = False
    # Along their layers if all names fit, otherwise across, and only where there are layers enough for a line.
    short, shorter = shortened(side.models), shortened(side.models, 24)
    along = [short[model.name] for model in models]
    across = [shorter[model.name] if model.length * room > 1.4 * PITCH else "" for model in models]
    for rotation, names in zip((0, 90) if horizontal else (90, 0), (along, across), strict=True):
        axis.set_ticks([model.middle for model in models], names, minor=True, rotation=rotation, **style)
        axis.set_tick_params(which="minor", length=0, pad=away + 5)
        extents = [text.get_window_extent().size[0 if horizontal else 1] for text in axis.get_ticklabels(minor=True)]
        if all(extent / dpi <= model.length * room for extent, model in zip(extents, models, strict=True)):
            break


def _write_title(axes: Axes, title: str, handles: list[Any]) -> None:
    """Write the title at the left, wrapped to the axes, above a short legend; a long one stands beside the axes."""
    width, height = inches(axes)
    above = len(handles) <= 3
    if handles:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0)}
        if not above:
            columns = math.ceil(len(handles) / max(1, int(height / (FONT * 1.5 / 72))))
            place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "ncols": columns}
        for text in axes.legend(handles=handles, fontsize=FONT, frameon=False, **place).get_texts():
            text.set_parse_math(False)
    size = FONT + 3
    lines = "\n".join(textwrap.wrap(title, max(16, int((width + 0.4) / (size * 0.52 / 72)))))
    pad = 7 + 11 * len(handles) if above else 7
    axes.set_title(lines, fontsize=size, loc="left", pad=pad, parse_math=False)
