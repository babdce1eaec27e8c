"""The script for a machine with a GPU, as far as one without can run it: its flow, and its programs on the CPU.

``test_standing_in.py`` has the imports with the packages of such a machine alone.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from processes import run_process

from benchmarks import __main__ as program
from benchmarks import training_cost

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
PROGRAM = """#!/bin/sh
case "$*" in
  *"finds no CUDA device"*) echo "a GPU"; exit "${NO_GPU:-0}" ;;
  *get_device_capability*) echo 9.0 ;;
  *"${FAIL:-nothing fails}"*) echo "told to fail"; exit 3 ;;
  *"${HANG:-nothing hangs}"*) sleep 30 ;;
  "-m rakd_ops") printf 'backends:\\n  cuda       %s\\n' "${CUDA:-available}" ;;
  *pytest*) echo "$@"; echo "${TESTS:-3 passed, 2 skipped in 1.0s}" ;;
  *) echo "$@" ;;
esac
"""
ORDER = [
    "machine",
    "backends",
    "smoke",
    "memcheck",
    "tests-cuda",
    "probe",
    "profile-train",
    "tests-triton",
    "racecheck",
]


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine whose python, sanitizer and profiler only print their arguments."""
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
    assert (out / "summary.txt").read_text() == result.stdout
    return result.returncode, result.stdout


def logs(out: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (out / "results").glob("*.log")}


def test_all_steps_in_their_order(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out")
    assert code == 0 and text.endswith("all steps passed\n")
    ran = [line[3:].partition(":")[0] for line in text.splitlines() if line.startswith("== ")]
    assert [name for name in ran if name in ORDER] == ORDER
    found = logs(tmp_path / "out")
    assert "build" not in found  # the libraries at hand are taken
    assert "--tool racecheck" in found["racecheck"] and "gpu_steps small" in found["memcheck"]
    assert "gpu_steps hot train19" in found["profile-train19"]
    assert "--backends cuda cuda-rows --baselines torchvision difference" in found["probe"]
    lines = {name: text.splitlines()[0] for name, text in found.items() if text}
    commands = [line.split() for line in lines.values() if line.startswith("-m benchmarks ")]
    assert len(commands) == 5
    for command in commands:
        program.parse(command[2:])
    assert training_cost.parse(lines["training-step"].split()[2:]).pair == "kitti"
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {f"{name}.log" for name in found} | {"summary.txt"} <= names


def test_a_library_that_does_not_fit_is_built_anew(machine: dict[str, str], tmp_path: Path) -> None:
    reason = "the CUDA library was built for 8.0; the device has 9.0"
    check(machine, tmp_path / "out", CUDA=reason)
    assert "setup.py build_ext" in logs(tmp_path / "out")["build"]


def test_wheels_are_installed_first(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one.whl").touch()
    _, text = check(machine, tmp_path / "out", RAKD_WHEELS=str(tmp_path / "wheels"))
    assert text.startswith("== wheels: exit 0")
    assert "--no-index --no-deps" in text and "wheels/one.whl" in text


def test_a_failure_does_not_keep_later_steps_from_running(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", FAIL="gpu_steps smoke")
    assert code == 1 and "\nfailed: smoke\n" in text
    assert "told to fail" in logs(tmp_path / "out")["smoke"]
    assert "tests-training" in logs(tmp_path / "out")


def test_tests_that_are_all_skipped_have_failed(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", "tests-cuda|machine", TESTS="102 skipped in 9.0s")
    assert code == 1 and "\nfailed: tests-cuda\n" in text


def test_a_step_that_hangs_is_cut_off(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", HANG="gpu_steps smoke", RAKD_GPU_SECONDS="7")
    assert code == 1 and "== smoke: exit 124" in text and "cut off" in text
    assert "no time left for: memcheck tests-cuda probe" in text


def test_chosen_steps(machine: dict[str, str], tmp_path: Path) -> None:
    code, _ = check(machine, tmp_path / "out", "machine|profile|memcheck")
    assert code == 0
    assert set(logs(tmp_path / "out")) == {"machine", "backends", "profile-train", "profile-train19", "memcheck"}


def test_no_time(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", RAKD_GPU_SECONDS="0")
    assert code == 1 and "no time left for: machine backends smoke memcheck" in text


def test_no_gpu(machine: dict[str, str], tmp_path: Path) -> None:
    code, text = check(machine, tmp_path / "out", NO_GPU="1")
    assert code == 1 and text.endswith("no GPU: nothing else is run\n")
    assert set(logs(tmp_path / "out")) == {"machine"}


def test_machine_without_tools(machine: dict[str, str], tmp_path: Path) -> None:
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / "bin" / name).unlink()
    code, text = check(machine, tmp_path / "out")
    assert code == 0
    for name, tool in (("memcheck", "compute-sanitizer"), ("profile-train", "ncu")):
        assert f"== {name}: passed over, {tool} is not here" in text


@pytest.mark.parametrize("arguments", [("smoke", "cpu"), ("small", "cpu"), ("hot", "gt", "cpu")])
def test_programs(arguments: tuple[str, ...]) -> None:
    assert run_process("-m", "benchmarks.gpu_steps", *arguments).endswith(f"{' '.join(arguments)}: done\n")
