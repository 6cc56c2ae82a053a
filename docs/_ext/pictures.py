"""Pictures of examples: the `.png` files that an example writes beside itself, moved onto its page."""

import shutil
from pathlib import Path
from typing import Any

from sphinx_gallery.scrapers import figure_rst


def of_example(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """The pictures that a block of an example has written, as reStructuredText."""
    written = sorted(Path(block_vars["src_file"]).parent.rglob("*.png"))
    places = [next(block_vars["image_path_iterator"]) for _ in written]
    for path, place in zip(written, places, strict=True):
        shutil.move(path, place)
    return figure_rst(places, gallery_conf["src_dir"])
