"""Runs the tests of the backend "cuda" with its host code and kernels in the emulator, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_emulated(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    variables = {**os.environ, "RAKD_TEST_EMULATED": "1"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1800, check=False)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout.splitlines()[-1]


def test_host_code() -> None:
    run_emulated(str(HERE / "emulated_cuda.py"))


@pytest.mark.slow
def test_shared_suite() -> None:
    files = [str(HERE / name) for name in ("test_backends.py", "test_edge_cases.py", "test_gradients.py")]
    run_emulated(*files, "-k", "cuda")
