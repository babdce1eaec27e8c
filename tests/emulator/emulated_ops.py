"""The registered CUDA ops on tensors of the CPU: ``csrc/cuda/ops.cu`` compiled for the emulator.

The code between torch and the kernels reads tensors, allocates, chooses a form and launches as on a GPU; the emulator
runs what it launches.
"""

from __future__ import annotations

import ctypes
import functools

import build
import torch

from rakd_ops import _backends, _schemas, functional

OPS = torch.ops.rakd_emulated


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled host code; loading it registers its ops."""
    path = build.compile_ops()
    for name, schema in _schemas.SCHEMAS.items():
        if name not in _schemas.CPU_ONLY:
            torch.library.define(f"rakd_emulated::{name}", schema)
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.rakd_emulated_launches.restype = ctypes.c_int64
    loaded.rakd_emulated_schedule.argtypes = [ctypes.c_uint64]
    return loaded


def install() -> None:
    """Make these ops the backend "cuda", which then takes tensors on the CPU, in this process."""
    library()
    torch.use_deterministic_algorithms(True)  # what torch allocates holds NaN, so that unwritten results show
    choose, find, why_not = functional.choose_backend, _schemas.op, _backends._why_not
    functional.choose_backend = lambda backend, device: backend if backend == "cuda" else choose(backend, device)
    _schemas.op = lambda name, backend: getattr(OPS, name) if backend == "cuda" else find(name, backend)
    _backends._why_not = lambda backend: None if backend == "cuda" else why_not(backend)
