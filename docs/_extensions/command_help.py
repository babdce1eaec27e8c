"""A Sphinx directive, ``command-help``, that shows what ``rakd COMMAND --help`` prints."""

import contextlib
import io
import os
import textwrap
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rakd.cli import main

_WIDTH = 88  # characters that the theme shows without scrolling


class CommandHelp(SphinxDirective):
    """The help of a command, or without an argument that of ``rakd`` itself."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Run the command line for its help."""
        arguments = [*self.arguments, "--help"]
        printed = io.StringIO()
        with (
            mock.patch.dict(os.environ, {"COLUMNS": str(_WIDTH), "NO_COLOR": "1"}),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
        ):
            main(arguments)
        if not printed.getvalue():
            raise self.error(f"rakd {' '.join(arguments)} printed nothing")
        # A terminal breaks the lines of the description, which are as long as its paragraphs.
        lines = [textwrap.wrap(line, _WIDTH) or [""] for line in printed.getvalue().splitlines()]
        text = "\n".join(part.rstrip() for parts in lines for part in parts)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
