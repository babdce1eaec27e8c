"""Each integration names its extra where its framework is missing, and needs none of the others."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_process

ROOT = Path(__file__).parents[2]
PACKAGES = ("ultralytics", "transformers", "torchvision", "lightning", "timm")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_framework_is_named_with_its_extra(name: str) -> None:
    code = (
        f"import sys; sys.modules['{name}'] = None\n"
        f"try:\n    import rakd.integrations.{name}\n"
        "except ImportError as error:\n    print(error)"
    )
    assert run_process("-c", code).strip() == f"{name} is not installed; run: pip install 'rakd[{name}]'"
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n{name} = [" in pyproject


@pytest.mark.parametrize("name", PACKAGES)
def test_an_integration_loads_no_other_framework(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    # transformers and lightning import some of the others themselves if they are there.
    code = (
        f"import sys, {name}\n"
        f"blocked = [p for p in {PACKAGES!r} if p != '{name}' and p not in sys.modules]\n"
        "for package in blocked:\n    sys.modules[package] = None\n"
        f"import rakd.integrations.{name}\nprint(len(blocked))"
    )
    if name == "timm":
        code = code.replace("'torchvision', ", "")  # timm needs it
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    for path in (ROOT / "rakd" / "integrations").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 200, path
