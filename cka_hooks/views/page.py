"""Write a result as HTML: one page that works offline, ``page.html`` filled with the data, and a table for notebooks.

Layer names are not trusted. They reach the page in two ways only: as JSON in which every ``<`` is written as
``\\u003c``, and as escaped text in the heading and the summary. The page's Content-Security-Policy forbids every
request.
"""

from __future__ import annotations

import html
import json
import math
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from cka_hooks.files import PathLike, replace_file
from cka_hooks.results.words import summary, value_in_words
from cka_hooks.views.labels import Side, shortened, title_of

if TYPE_CHECKING:
    from cka_hooks.results.result import CKAResult

# How many labels fit along an axis of the page. The page thins them further in a small window.
_ROOM = 45

# matplotlib's viridis at 0, 1/8 ... 1. Straight lines in between are close enough.
_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip

#: In a notebook, values are written into the cells up to this many rows and columns. Beyond, only colours are shown.
WITH_VALUES = 12
#: In a notebook, at most this many rows and columns are shown.
MOST = 32


def to_html(result: CKAResult, path: PathLike, *, title: str | None = None) -> None:
    """Write a page that works offline: hover for values, click a row, search layers.

    Args:
        path: where to write it.
        title: heading of the page; by default made from the names of the models.

    Raises:
        OSError: the file cannot be written.
    """
    parts = {
        "@TITLE@": html.escape(title or title_of(result, "CKA")),
        "@SUMMARY@": html.escape(summary(result).replace(" -> ", " → ")),
        "@DATA@": script_json(page_data(result)),
    }
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # Fill everything in one pass, so that a layer called @DATA@ stays a layer.
    page = re.sub("|".join(parts), lambda match: parts[match.group()], template)
    # Half a surrogate pair in a name cannot be written as UTF-8.
    replace_file(path, lambda file: file.write(page.encode("utf-8", "replace")))


def page_data(result: CKAResult) -> dict[str, Any]:
    """What the page draws: labels with their grouping, values and errors to 5 digits, None if undefined.

    Example:
        >>> from cka_hooks import CKAResult
        >>> page_data(CKAResult.example())["matrix"][0]
        [1.0, 0.9, 0.5]
    """
    return {
        "rows": _axis(result, result.rows),
        "columns": _axis(result, result.columns),
        "matrix": _rounded(result.matrix.tolist()),
        "stderr": _rounded(result.stderr.tolist()),
        "pvalue": None if result.null_unknown else _rounded(result.pvalue().tolist()),
        "colours": _VIRIDIS,
    }


def script_json(data: object) -> str:
    """JSON that can stand inside a ``<script>`` element, whatever text it holds.

    Example:
        >>> print(script_json("</script>"))
        "\\u003c/script>"
    """
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _axis(result: CKAResult, labels: tuple[str, ...]) -> dict[str, Any]:
    side = Side.of(result, labels)
    several = len(set(side.models)) > 1
    spans = side.thinned(max(1.0, len(labels) / _ROOM))
    return {
        "labels": labels,
        "layers": [result.layer_of(label) for label in labels],
        "names": labels if several else side.names,
        "spans": [[it.middle, f"{side.models[it.start]}/{it.name}" if several else it.name] for it in spans],
        "sections": side.section_lines(),
        "models": side.model_lines(),
    }


def _rounded(values: list[list[float]]) -> list[list[float | None]]:
    return [[None if math.isnan(value) else float(f"{value:.5g}") for value in row] for row in values]


# ---- notebooks ------------------------------------------------------------------------------------


def notebook_html(result: CKAResult) -> str:
    """A table for ``_repr_html_``: first layer at the bottom left, as in :meth:`CKAResult.plot`.

    Args:
        result: what to show. If it has more than :data:`MOST` rows or columns, evenly spaced ones are kept.

    Example:
        >>> from cka_hooks import CKAResult
        >>> print(notebook_html(CKAResult.example()).count("<td"))
        9
    """
    size = result.matrix.shape
    rows, columns = (np.linspace(0, n - 1, min(n, MOST)).round().astype(int).tolist() for n in size)
    lines = []
    if max(len(rows), len(columns)) <= WITH_VALUES:
        short = shortened(result.layers, 28)
        for i in reversed(rows):
            lines.append(_label(result.rows[i], short) + "".join(_cell(result, i, j) for j in columns))
        lines.append("<th></th>" + "".join(_label(result.columns[j], short) for j in columns))
    else:
        for i in reversed(rows):
            shades = (colour(result.matrix[i, j].item()) for j in columns)
            lines.append("".join(f'<td style="padding:5px;background:{shade}"></td>' for shade in shades))
    caption = f"CKA of {size[0]} x {size[1]} layers, {result.samples:,} samples, {result.minibatches:,} minibatches"
    if max(size) > MOST:
        caption += f"; {len(rows)} x {len(columns)} of them, evenly spaced, are shown"
    return (
        '<table style="border-collapse:collapse;border-spacing:0;font-size:11px;line-height:1.1">'
        f'<caption style="text-align:left;white-space:nowrap">{caption}</caption>'
        f"{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    )


def _label(label: str, short: dict[str, str]) -> str:
    return (
        f'<th title="{html.escape(label)}" style="text-align:right;font-weight:normal;padding:0 4px;'
        f'white-space:nowrap;background:none">{html.escape(short[label])}</th>'
    )


def _cell(result: CKAResult, row: int, column: int) -> str:
    value, error = result.matrix[row, column].item(), result.stderr[row, column].item()
    title = f"{result.rows[row]}\n{result.columns[column]}\n{value_in_words(value, error)}"
    ink, text = ("#000", "–") if math.isnan(value) else ("#000" if value > 0.6 else "#fff", f"{value:.2f}")
    return (
        f'<td title="{html.escape(title)}" style="padding:4px 6px;text-align:center;'
        f'background:{colour(value)};color:{ink}">{text}</td>'
    )


def colour(value: float) -> str:
    """The HTML colour of a CKA value from 0 to 1, grey for NaN.

    Example:
        >>> colour(0.0), colour(0.5), colour(float("nan"))
        ('#440154', '#21908d', '#d9d9d9')
    """
    if math.isnan(value):
        return "#d9d9d9"
    places = np.linspace(0, 1, len(_VIRIDIS))
    return "#" + "".join(f"{round(np.interp(value, places, part)):02x}" for part in zip(*_VIRIDIS, strict=True))
