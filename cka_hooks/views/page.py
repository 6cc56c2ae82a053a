"""Write a result as one HTML page that works offline: ``page.html`` filled with the data.

Layer names are not trusted. They reach the page in two ways only: as JSON in which every ``<``, ``>`` and ``&`` is
written as ``\\u003c`` and so on, and as escaped text in the heading and the summary. The page's
Content-Security-Policy forbids every request.
"""

from __future__ import annotations

import html
import json
import math
import re
from importlib import resources
from typing import Any

from cka_hooks.files import PathLike, replace_file
from cka_hooks.results.result import CKAResult
from cka_hooks.results.words import summary
from cka_hooks.views.colours import VIRIDIS
from cka_hooks.views.labels import section_lines, thinned

# How many labels fit along an axis of the page. The page thins them further in a small window.
_ROOM = 45


def write_page(result: CKAResult, path: PathLike, *, title: str | None = None) -> None:
    """Write the page; see :meth:`CKAResult.to_html`.

    Args:
        result: what to show.
        path: where to write it.
        title: heading; by default made from the names of the models.

    Raises:
        OSError: the file cannot be written.
    """
    parts = {
        "@TITLE@": html.escape(_shown(title or _title(result))),
        "@SUMMARY@": html.escape(_shown(summary(result).replace(" -> ", " → "))),
        "@DATA@": script_json(page_data(result)),
    }
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # Fill everything in one pass, so that a layer called @DATA@ stays a layer.
    page = re.sub("|".join(parts), lambda match: parts[match.group()], template)
    replace_file(path, lambda file: file.write(page.encode("utf-8")))


def page_data(result: CKAResult) -> dict[str, Any]:
    """What the page draws: labels with their grouping, values and errors to 5 digits, None if undefined.

    Example:
        >>> page_data(CKAResult.example())["matrix"][0]
        [1.0, 0.9, 0.5]
    """
    return {
        "rows": _axis(result, result.rows),
        "columns": _axis(result, result.columns),
        "matrix": _rounded(result.matrix.tolist()),
        "stderr": _rounded(result.stderr.tolist()),
        "pvalue": None if result.null_unknown else _rounded(result.pvalue().tolist()),
        "colours": VIRIDIS,
    }


def script_json(data: object) -> str:
    """JSON that can stand inside a ``<script>`` element, whatever text it holds.

    Example:
        >>> print(script_json("</script>"))
        "\\u003c/script\\u003e"
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _axis(result: CKAResult, labels: tuple[str, ...]) -> dict[str, Any]:
    models = [result.model_of(label) for label in labels]
    names = [result.layer_of(label) for label in labels]
    several = len(set(models)) > 1
    changes = [i - 0.5 for i in range(1, len(models)) if models[i] != models[i - 1]]
    spans = thinned(models, names, max(1.0, len(labels) / _ROOM))
    return {
        "labels": [_shown(label) for label in labels],
        "layers": [_shown(name) for name in names],
        "names": [_shown(name) for name in (labels if several else names)],
        "spans": [
            [span.middle, _shown(f"{models[span.start]}/{span.name}" if several else span.name)] for span in spans
        ],
        "sections": [place for place in section_lines(models, names) if place not in changes],
        "models": changes,
    }


def _shown(text: str) -> str:
    # Half a surrogate pair cannot be written as UTF-8, and JSON.parse would keep it.
    return text.encode("utf-8", "replace").decode("utf-8")


def _rounded(values: list[list[float]]) -> list[list[float | None]]:
    return [[None if math.isnan(value) else float(f"{value:.5g}") for value in row] for row in values]


def _title(result: CKAResult) -> str:
    joined = " against " if len(result.models) == 2 and not result.square else ", "
    names = joined.join(result.models) if len(result.models) <= 3 else f"{len(result.models)} models"
    return f"CKA of {names}" if names else "CKA between layers"
