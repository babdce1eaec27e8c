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
import sys
allowed = {{*sys.stdlib_module_names, *{PACKAGES!r}}}
class Hide:
    # Wraps a finder, whose packages that are not allowed are then not there, as for one who looks first (torch does).
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        found = self.finder.find_spec(name, path, target)
        where = str(found and (found.origin or found.submodule_search_locations))
        return None if not path and name not in allowed and "-packages" in where else found
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""


def run(code: str) -> str:
    command = [sys.executable, "-c", HIDE + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_other_packages_are_hidden() -> None:
    code = """
for name in ("tyro", "pybind11", "ruff"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    assert run(code).splitlines() == [f"No module named '{name}'" for name in ("tyro", "pybind11", "ruff")]
    with pytest.raises(AssertionError, match="No module named 'tyro'"):
        run("import tyro")


# These measure the layer above the ops, with its packages.
OF_RAKD = {
    "detector_cost",
    "training_cost",
    "framework_cost",
    "waymo_evaluation",
    "yolo_comparison",
    "map_imitation",
    "gains",
}


def test_benchmarks_of_the_ops_import_and_their_tests_are_collected() -> None:
    """In one process; the benchmarks need nothing of the detector package."""
    assert set(MODULES) >= OF_RAKD
    lines = [f"import benchmarks.{name}" for name in MODULES if name not in OF_RAKD]
    lines.append("assert not [name for name in sys.modules if name.split('.')[0] == 'rakd']")
    lines.append("import benchmarks.training_cost; print('all of them')")
    lines.append("import pytest")
    lines.append("sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', 'tests/ops']))")
    out = run("\n".join(lines))
    assert out.startswith("all of them\n") and "tests collected" in out
