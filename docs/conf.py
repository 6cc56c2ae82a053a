"""The site: `python -m sphinx -W --keep-going -n docs docs/_build`."""

import inspect
import os
import sys
from pathlib import Path

from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docstrings import prepare_docstring
from sphinx.util.inspect import stringify_signature

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]
# Help texts are as wide as the page.
os.environ["COLUMNS"] = "96"
# Output of examples is shown without progress bars.
os.environ["TQDM_DISABLE"] = "1"

import cka_hooks  # noqa: E402

project = "cka_hooks"
author = "The cka_hooks authors"
copyright = "the cka_hooks authors"
version = release = cka_hooks.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "command_line",
]
exclude_patterns = ["_build", "examples/*.ipynb", "examples/*.zip", "inventories", "figures", "errors.md"]
nitpicky = True
nitpick_ignore_regex = [
    # Annotations: aliases and types inside the package have no page.
    ("py:class", r"\w+|batches\.Forward|pandas\.DataFrame"),
    ("py:.*", r"cka_hooks\.(recording|results|run|similarity|features|hsic|arrays|null|files)\..*"),
]
# Napoleon's fields hold sentences here, not types.
napoleon_use_rtype = False
napoleon_preprocess_types = False
default_role = "code"

# Its callback is documented where Lightning is not installed.
autodoc_mock_imports = ["lightning"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Pages refer to files in the repository that are not on the site.
suppress_warnings = ["config.cache"]

# Builds work offline: these files have the names that pages refer to. Version 1 of the format is text.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.txt"),
    "numpy": ("https://numpy.org/doc/stable", "inventories/numpy.txt"),
}

# Examples that take longer than a few seconds are not run for the site, which has their pictures.
STORED = (
    "clean_and_corrupted",
    "distil_with_cka_loss",
    "lightning_callback",
    "torchvision_by_name",
    "two_architectures",
)
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": rf"/(?!{'|'.join(STORED)})\w+\.py$",
    "image_scrapers": ("pictures.of_example",),
    "reset_modules": (),
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "thumbnail_size": (400, 300),
    "abort_on_example_error": True,
}

html_theme = "pydata_sphinx_theme"
html_title = "cka_hooks"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {page: [] for page in ("start", "numbers", "coming-from", "benchmarks", "design", "changelog")}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


# Types as signatures spell them, and what they are. Aliases of the package stand as they are: spelled out they fill
# a page.
TYPES = {
    "nn.Module": "torch.nn.Module",
    "Tensor": "torch.Tensor",
    "dist.ProcessGroup": "torch.distributed.ProcessGroup",
    **{name: f"collections.abc.{name}" for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")},
    **{name: f"typing.{name}" for name in ("Any", "Literal")},
}


def setup(app):
    """Change what autodoc makes of signatures and docstrings, and add pictures of examples that are not run."""
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("missing-reference", with_full_name, priority=400)
    app.connect("autodoc-process-docstring", without_type, priority=600)
    app.connect("source-read", with_stored_picture)


def signature_as_written(app, what, name, obj, options, signature, returns):
    """Annotations as the source has them."""
    if what not in ("function", "method", "class"):
        return None
    own = inspect.signature(obj.__init__ if what == "class" else obj)
    parameters = [one for one in own.parameters.values() if one.name not in ("self", "cls")]
    result = None if what == "class" or own.return_annotation is own.empty else str(own.return_annotation)
    written = stringify_signature(own.replace(parameters=parameters), show_return_annotation=False)
    return written.replace("<factory>", "..."), result


def with_full_name(app, env, node, contnode):
    """Let intersphinx find a type by the name that its own documentation has for it."""
    node["reftarget"] = TYPES.get(node.get("reftarget"), node.get("reftarget"))


def without_type(app, what, name, obj, options, lines):
    """Napoleon takes what a property's first line has in front of a colon for a type."""
    if what == "property":
        lines[:] = GoogleDocstring(prepare_docstring(obj.__doc__ or ""), app.config, app, "method", name, obj).lines()


def with_stored_picture(app, docname, source):
    """The picture of an example that is not run here, before its code."""
    name = docname.removeprefix("examples/")
    if docname != name and name in STORED:
        source[0] = source[0].replace("\n.. code-block::", f"\n.. image:: /pictures/{name}.png\n\n.. code-block::", 1)
