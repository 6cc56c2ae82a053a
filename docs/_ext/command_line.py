"""The directive `cka-help`: the help of a command, printed by the parser that reads its words."""

from __future__ import annotations

import contextlib
import io

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cka_hooks.command.cli import parser


class Help(SphinxDirective):
    """What `cka-hooks COMMAND --help` prints; without an argument, what `cka-hooks --help` does."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The help as a literal block."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            parser().parse_args([*self.arguments, "--help"])
        text = printed.getvalue()
        return [nodes.literal_block(text, text, language="text", classes=["cka-help"])]


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directive known to Sphinx."""
    app.add_directive("cka-help", Help)
    return {"parallel_read_safe": True}
