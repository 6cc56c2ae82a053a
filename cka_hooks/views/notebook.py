"""Show a result in a notebook, as a small table of coloured cells without scripts or libraries."""

from __future__ import annotations

import html
import math

from cka_hooks.names import printable
from cka_hooks.results.result import CKAResult
from cka_hooks.results.words import value_in_words
from cka_hooks.views.colours import colour

#: Values are written into the cells up to this many rows and columns. Beyond that, only colours are shown.
WITH_VALUES = 12
#: At most this many rows and columns are shown.
MOST = 32


def notebook_html(result: CKAResult) -> str:
    """A table for ``_repr_html_``: first layer at the bottom left, as in :meth:`CKAResult.plot`.

    Args:
        result: what to show. If it has more than :data:`MOST` rows or columns, evenly spaced ones are kept.

    Example:
        >>> print(notebook_html(CKAResult.example()).count("<td"))
        9
    """
    rows, columns = _spread(len(result.rows)), _spread(len(result.columns))
    written = max(len(rows), len(columns)) <= WITH_VALUES
    values, errors = result.matrix.tolist(), result.stderr.tolist()
    lines = []
    for i in reversed(rows):
        if written:
            cells = "".join(
                _cell(value, f"{result.rows[i]}\n{result.columns[j]}\n{value_in_words(value, errors[i][j])}")
                for j, value in ((j, values[i][j]) for j in columns)
            )
        else:
            cells = "".join(_dot(values[i][j]) for j in columns)
        lines.append(f"<tr>{_label(result.rows[i]) if written else ''}{cells}</tr>")
    if written:
        heads = "".join(_label(result.columns[j]) for j in columns)
        lines.append(f"<tr><th></th>{heads}</tr>")
    size = str(len(result.rows)) if result.square else f"{len(result.rows)} x {len(result.columns)}"
    caption = f"CKA of {size} layers, {result.samples:,} samples, {result.minibatches:,} minibatches"
    if len(rows) < len(result.rows) or len(columns) < len(result.columns):
        caption += f"; {len(rows)} x {len(columns)} of them, evenly spaced, are shown"
    return (
        '<table style="border-collapse:collapse;border-spacing:0;font-size:11px;line-height:1.1">'
        f'<caption style="text-align:left;white-space:nowrap">{html.escape(caption)}</caption>'
        f"{''.join(lines)}</table>"
    )


def _spread(count: int) -> list[int]:
    if count <= MOST:
        return list(range(count))
    return [round(i * (count - 1) / (MOST - 1)) for i in range(MOST)]


def _label(label: str) -> str:
    label = printable(label)
    short = label if len(label) <= 28 else f"{label[:8]}…{label[-19:]}"
    return (
        f'<th title="{html.escape(label)}" style="text-align:right;font-weight:normal;padding:0 4px;'
        f'white-space:nowrap;background:none">{html.escape(short)}</th>'
    )


def _cell(value: float, title: str) -> str:
    ink = "#000" if math.isnan(value) or value > 0.6 else "#fff"
    text = "–" if math.isnan(value) else f"{value:.2f}"
    return (
        f'<td title="{html.escape(title)}" style="padding:4px 6px;text-align:center;'
        f'background:{colour(value)};color:{ink}">{text}</td>'
    )


def _dot(value: float) -> str:
    return f'<td style="padding:5px;background:{colour(value)}"></td>'
