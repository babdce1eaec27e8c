"""What a machine with a GPU runs, as far as one without can: the script's flow, and its programs on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
PROGRAM = """#!/bin/sh
case "$*" in
  -) echo "a GPU"; exit "${NO_GPU:-0}" ;;
  *get_device_capability*) echo 9.0 ;;
  *"${FAIL:-nothing fails}"*) echo "told to fail"; exit 3 ;;
  *) echo "$@" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine whose python, sanitizer and profiler only say what they were asked to do."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python", "compute-sanitizer", "ncu"):
        (tools / name).write_text(PROGRAM)
        (tools / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tools}:/usr/bin:/bin"}


def check(machine: dict[str, str], out: Path, *more: str, **changes: str) -> tuple[int, str]:
    command = ["bash", str(SCRIPT), str(out), "python", *more]
    result = subprocess.run(command, env={**machine, **changes}, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    return result.returncode, result.stdout


def test_all_steps(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out")
    assert code == 0 and "all steps passed" in text
    logs = {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.log")}
    assert set(logs) >= {"build", "tests", "tests-gram", "tests-pooled", "sanitizer-racecheck", "ncu-train19"}
    assert "setup.py build_ext" in logs["build"]
    assert "--tool racecheck" in logs["sanitizer-racecheck"] and "gpu_steps small" in logs["sanitizer-racecheck"]
    assert "gpu_steps hot train19" in logs["ncu-train19"]


def test_a_failure_does_not_keep_later_steps_from_running(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", FAIL="setup.py")
    assert code == 1 and "failed: build\n" in text and "told to fail" in (tmp_path / "out" / "build.log").read_text()
    assert (tmp_path / "out" / "tests-pooled.log").exists()


def test_chosen_steps(machine: dict[str, str], tmp_path: Path) -> None:
    code, _ = check(machine, tmp_path / "out", "ncu|memcheck")
    assert code == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.log")} == {
        "ncu-train",
        "ncu-train19",
        "sanitizer-memcheck",
    }


def test_no_time(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", RAKD_GPU_SECONDS="0")
    assert code == 1 and "no time left for: build backends tests" in text
    assert not list((tmp_path / "out").glob("*.log"))


def test_no_gpu(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", NO_GPU="1")
    assert code == 1 and "==" not in text


def test_machine_without_tools(machine: dict[str, str], tmp_path: Path) -> None:
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / "bin" / name).unlink()
    code, text = check(machine, tmp_path / "out")
    assert code == 0 and "compute-sanitizer is not here: memcheck is passed over" in text
    assert "ncu is not here" in (tmp_path / "out" / "ncu-train.log").read_text()


@pytest.mark.parametrize("arguments", [("small", "cpu"), ("hot", "gt", "cpu")])
def test_programs(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_steps", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{' '.join(arguments)}: done\n"
