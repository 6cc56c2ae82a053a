"""All formats that a result can be written in, and which of them a run writes, in one table.

A new format is a function that writes it and a line in :data:`FORMATS`. ``result.export(path)`` and the command
line's ``show --out`` then find it by its suffix. With a ``name``, it is one of the files that ``run`` and ``demo``
write.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cka_hooks.errors import OptionError
from cka_hooks.files import PathLike
from cka_hooks.results.result import CKAResult
from cka_hooks.results.tables import to_csv, to_npz
from cka_hooks.views.heatmap import heatmap
from cka_hooks.views.page import write_page


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        suffixes: the file suffixes that choose it, with their dot.
        line: what it is for, in one line.
        write: writes a result to a path.
        extra: the extra of this package that it needs.
        name: what a run calls this file, None if a run does not write it.
    """

    suffixes: tuple[str, ...]
    line: str
    write: Callable[[CKAResult, PathLike], object]
    extra: str | None = None
    name: str | None = None


# The formats that matplotlib can always write.
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps", ".pgf", ".svgz")

FORMATS = (
    Format((".json",), "the whole result, which CKAResult.load reads", CKAResult.save, name="result"),
    Format(_PICTURES, "the heatmap as a picture", heatmap, "plot", name="heatmap"),
    Format((".html",), "a page to explore, offline", write_page, name="page"),
    Format((".csv",), "the matrix as a table with labels", to_csv),
    Format((".npz",), "labels, matrix and standard errors as NumPy arrays", to_npz),
)


def format_of(path: PathLike) -> Format:
    """The format that the suffix of a path names.

    Raises:
        OptionError: there is no such format. The message lists all formats.
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    for found in FORMATS:
        if suffix in found.suffixes:
            return found
    known = ", ".join(f"{'/'.join(one.suffixes)} ({one.line})" for one in FORMATS)
    raise OptionError(
        f"{os.fspath(path)} ends in {suffix or 'no suffix'}, which is not a format of a result: use one of {known}"
    )


def files_of_a_run() -> dict[str, str]:
    """For each file that a run writes, its name in the folder; ``between`` only if two models were compared."""
    files = {one.name: f"cka{one.suffixes[0]}" for one in FORMATS if one.name}
    return {**files, "between": "between.png"}


def export_all(result: CKAResult, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the files of a run, the result itself first. A picture that cannot be drawn does not stop the others.

    Returns:
        The path of each file that was written, by name, and the reason for each that could not be, by name.

    Raises:
        OSError: ``cka.json``, the result itself, cannot be written.
    """
    writes = {one.name: one.write for one in FORMATS if one.name}
    if len(result.models) == 2:
        writes["between"] = lambda whole, path: heatmap(whole.between(*whole.models), path)
    written: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for name, write in writes.items():
        path = folder / files_of_a_run()[name]
        try:
            write(result, path)
        except Exception as error:  # matplotlib's, too: its settings come from the environment
            if name == "result":
                raise
            failed[name] = str(error) or type(error).__name__
        else:
            written[name] = path
    return written, failed
