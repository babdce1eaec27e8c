"""The examples run as they stand, with few frames, from random weights and without a download."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

# That of an exported model is run in tests/rakd/test_export.py.
EXAMPLES = sorted(p for p in (Path(__file__).parents[2] / "examples").glob("*.py") if p.stem != "onnx_model")
SMALL = {"transformers_rtdetr": {"size": 192}}


def test_there_is_one_for_each_integration() -> None:
    integrations = {path.stem for path in (Path(__file__).parents[2] / "rakd" / "integrations").glob("[a-z]*.py")}
    used = {name for path in EXAMPLES for name in re.findall(r"rakd\.integrations\.(\w+)", path.read_text("utf-8"))}
    assert used == integrations


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 40
    for package in set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)) - {"rakd"}:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    settings = {"out": tmp_path, "frames": 15, "size": 128, "epochs": 1, **SMALL.get(path.stem, {})}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [sys.executable, path, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^(expert|apprentice|distilled):\s+\S+ ([0-9.e-]+)$", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in found] == ["expert", "apprentice", "distilled"]
    assert all(0 <= float(value) <= 1 for _, value in found)
