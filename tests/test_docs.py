"""The API reference leaves out no module and no command. `make docs` sees to the rest."""

from __future__ import annotations

import re
from pathlib import Path

from rakd.cli import _commands

ROOT = Path(__file__).parents[1]
PAGES = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.rst"))

# On the page of the command line by their help, or on another page through what their package exports.
ELSEWHERE = r"rakd\.(cli|__main__|commands|commands\..*|scenes\..*)|rakd"


def test_every_module_has_its_place() -> None:
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "rakd").rglob("*.py")]
    modules = {".".join(name for name in names if name != "__init__") for names in parts}
    shown = set(re.findall(r"automodule:: (rakd[\w.]*)", PAGES)) - {"rakd_ops", "rakd_ops.reference"}
    assert shown == {name for name in modules if not re.fullmatch(ELSEWHERE, name)}


def test_every_command_shows_its_help() -> None:
    assert re.findall(r"command-help:: (\S+)", PAGES) == list(_commands())
