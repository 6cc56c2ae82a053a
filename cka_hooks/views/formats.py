"""All formats that a result can be written in, and which of them a run writes, in two tables.

A new format is a function that writes it and a line in :data:`FORMATS`. ``result.export(path)`` and the command
line's ``show --out`` then find it by its suffix. With a line in :data:`FILES`, ``run`` and ``demo`` write it, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cka_hooks.errors import OptionError
from cka_hooks.files import PathLike
from cka_hooks.results.result import CKAResult

# The formats that matplotlib can always write.
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps", ".pgf", ".svgz")

#: What writes a result into a file with this suffix.
FORMATS: dict[str, Callable[[CKAResult, PathLike], object]] = {
    ".json": CKAResult.save,
    ".html": CKAResult.to_html,
    ".csv": CKAResult.to_csv,
    ".npz": CKAResult.to_npz,
    **dict.fromkeys(_PICTURES, CKAResult.plot),
}
#: What a run calls its files, and their names; ``between`` is written only if two models were compared.
FILES = {"result": "cka.json", "heatmap": "cka.png", "page": "cka.html", "between": "between.png"}


def export(result: CKAResult, path: PathLike) -> None:
    """Write a result in the format that the suffix of a path names.

    Raises:
        OptionError: there is no such format. The message lists all formats.
        MissingExtraError: the format needs a package that is not installed.
        OSError: the file cannot be written.
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in FORMATS:
        raise OptionError(
            f"{os.fspath(path)} ends in {suffix or 'no suffix'}, which is not a format of a result: use one of "
            f"{', '.join(FORMATS)}"
        )
    FORMATS[suffix](result, path)


def export_all(result: CKAResult, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the files of a run, the result itself first. A picture that cannot be drawn does not stop the others.

    Returns:
        The path of each file that was written, by name, and the reason for each that could not be, by name.

    Raises:
        OSError: ``cka.json``, the result itself, cannot be written.
    """
    written: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for name, file in FILES.items():
        if name == "between" and len(result.models) != 2:
            continue
        try:
            export(result.between(*result.models) if name == "between" else result, folder / file)
        except Exception as error:  # matplotlib's, too: its settings come from the environment
            if name == "result":
                raise
            failed[name] = str(error) or type(error).__name__
        else:
            written[name] = folder / file
    return written, failed
