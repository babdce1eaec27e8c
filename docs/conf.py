"""Settings of the documentation: ``make docs`` builds these pages and the docstrings into build/docs."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import rakd_ops

project = "RAKD"
author = "the RAKD developers"
project_copyright = author
version = release = rakd_ops.__version__

# Optional packages that the integrations import; documented whether or not they are installed.
autodoc_mock_imports = ["ultralytics", "transformers", "lightning", "timm"]
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "command_help"]
myst_heading_anchors = 3  # links to headings work as they do on a forge
templates_path: list[str] = []
html_theme = "furo"
html_title = f"RAKD {release}"
html_copy_source = False

# Docstrings name other objects in single backticks.
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# Signatures show names and defaults; types stand beside the arguments' descriptions, under their short names.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: f"rakd_ops._inputs.{name}" for name in ("Boxes", "Maps")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 110

napoleon_numpy_docstring = False
napoleon_attr_annotations = True
napoleon_custom_sections = ["Source"]

# Other projects' references are not fetched, so that a build needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torchvision|numpy|np|npt|nn|matplotlib|PIL|pathlib|collections|tqdm|Image)\..*"),
    ("py:class", r"rakd_ops\._inputs\.(Boxes|Maps)"),  # Sphinx finds type aliases from 8.2 on
    ("py:class", r"NDArray|u?int\d+|float\d+"),
    ("py:class", r"rakd\.distributed\.T"),  # a type variable
    ("py:class", r"Keywords"),  # the keywords of SoftRoIDistillLoss, which its docstring lists
]

_ARRAY = re.compile(r"numpy\.ndarray\[.*?numpy\.dtype\[numpy\.(\w+?)_?\]\]")


def setup(app: Sphinx) -> None:
    """Correct three things that napoleon does.

    It would read "What it is: more of it" as a type and a description. Under Returns, a colon in front says that there
    is no type. For variables and properties nothing can be said; so their sections are made here, as for everything
    else, and put back when it has run. And it writes types of arrays as long as numpy spells them, where
    ``NDArray[float64]`` says it.
    """
    made: list[str] = []

    def make(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        for i, line in enumerate(lines[:-1]):
            if line.strip() in ("Returns:", "Yields:"):
                lines[i + 1] = re.sub(r"^\s+", r"\g<0>: ", lines[i + 1])
        made[:] = GoogleDocstring(lines, app.config).lines()

    def put_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        if what in ("data", "attribute", "property"):
            lines[:] = made
        lines[:] = [_ARRAY.sub(r"NDArray[\1]", line) if ":type:" in line else line for line in lines]

    app.connect("autodoc-process-docstring", make, priority=400)
    app.connect("autodoc-process-docstring", put_back, priority=600)
