"""Benchmarks and tests of the ops import nothing that a GPU machine without a package index lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
# Beside the standard library, with the packages that these need themselves; pybind11, setuptools, tyro are not there.
PACKAGES = (
    *("torch", "torchgen", "functorch", "torchvision", "triton", "numpy", "pytest", "_pytest", "xdist", "hypothesis"),
    *("PIL", "matplotlib", "mpl_toolkits", "tqdm", "py", "pluggy", "iniconfig", "execnet", "packaging", "pygments"),
    *(
        "typing_extensions",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "markupsafe",
        "fsspec",
        "filelock",
        "sortedcontainers",
    ),
    *("attr", "attrs", "cycler", "kiwisolver", "contourpy", "dateutil", "six", "pyparsing", "fontTools", "nvidia"),
    *("rakd_ops", "rakd", "benchmarks", "tests"),
)
HIDE = f"""
import importlib.machinery, sys
allowed = {{*sys.stdlib_module_names, *{PACKAGES!r}}}
class Hide:
    def find_spec(self, name, path=None, target=None):
        found = None if path else importlib.machinery.PathFinder.find_spec(name)
        if found and name not in allowed and "-packages" in str(found.origin or found.submodule_search_locations):
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden)", name=name)
sys.meta_path.insert(0, Hide())
"""


def run(code: str) -> str:
    command = [sys.executable, "-c", HIDE + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_other_packages_are_hidden() -> None:
    for name in ("tyro", "pybind11", "ruff"):
        with pytest.raises(AssertionError, match=f"No module named '{name}'"):
            run(f"import {name}")


def test_every_benchmark_imports_and_only_the_training_step_needs_the_detector_package() -> None:
    lines = [f"import benchmarks.{name}" for name in MODULES if name != "training_cost"]
    lines.append("assert not [name for name in sys.modules if name.split('.')[0] == 'rakd']")
    lines.append("import benchmarks.training_cost; print('all of them')")
    assert run("\n".join(lines)) == "all of them\n"


def test_all_tests_of_the_ops_are_collected() -> None:
    code = "import pytest\nsys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', 'tests/ops']))"
    assert "tests collected" in run(code)
