"""Runs the tests of the Triton backend under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environ = {**os.environ, **environment}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    files = (str(HERE / "interpreted_triton.py"), str(HERE / "interpreted_triton_ops.py"))
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    result = run_python(*arguments, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_importing_the_package_does_not_import_triton() -> None:
    result = run_python("-c", "import sys, rakd_ops; print('triton' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_without_gpu_and_interpreter_the_backend_says_why() -> None:
    program = """
import torch, rakd_ops
print(rakd_ops.available_backends()["triton"])
maps = [torch.zeros(1, 1, 4, 4)]
try:
    rakd_ops.soft_roi_distill(maps, maps, torch.zeros(0, 5), strides=(4,), backend="triton")
except RuntimeError as error:
    print(error)
"""
    result = run_python("-c", program, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    available, refused = result.stdout.strip().splitlines()
    if importlib.util.find_spec("triton") is None:
        assert available == "triton is not installed" and available in refused
    else:
        assert available == "torch finds no CUDA device"
        assert refused == "backend: 'triton' cannot take tensors on device cpu"
