"""A source tree without built libraries in the place of the installed package says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree as git has it: nothing is built."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "rakd_ops", tree / "rakd_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tree / "csrc").mkdir()
    return tree


def report(folder: Path, **environment: str) -> dict[str, str]:
    """What ``python -m rakd_ops`` says of each backend when it is started in a folder."""
    done = subprocess.run(
        *([sys.executable, "-m", "rakd_ops"],),
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = done.stdout.partition("backends:\n")[2].splitlines()
    return {row.split()[0]: row for row in rows}


def test_a_source_tree_says_that_it_hides_the_installed_package(tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(tree / "rakd_ops", site / "rakd_ops")
    (site / "rakd-0.1.0.dist-info").mkdir()
    (site / "rakd-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rakd\nVersion: 0.1.0\n")
    source = f"{tree} is a source tree without built libraries: run `python setup.py build_ext --inplace` in it"
    hidden = f"it hides the installed package {site / 'rakd_ops'}"
    row = report(tree, PYTHONPATH=str(site))["cpu"]
    assert source in row and hidden not in row  # that has no libraries either
    (site / "rakd_ops" / "_cpu.abi3.so").touch()
    row = report(tree, PYTHONPATH=str(site))["cpu"]
    assert source in row and hidden in row
    # An installed package without its library is no source tree.
    (site / "rakd_ops" / "_cpu.abi3.so").unlink()
    assert "install the package with `pip install .`" in report(tmp_path, PYTHONPATH=str(site))["cpu"]
