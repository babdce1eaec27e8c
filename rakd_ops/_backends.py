"""Backends: which can run here and why the others cannot, and the choice among them."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
# Triton then runs its kernels on the CPU, slowly: for tests. It reads the variable when it is imported.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def build_info() -> dict[str, object]:
    """Return how the compiled libraries were built; empty where nothing was built."""
    try:
        from rakd_ops import _build_info
    except ImportError:
        return {}
    return {key: value for key, value in vars(_build_info).items() if not key.startswith("_")}


def _remedy(folder: Path) -> str:
    """The remedy for a library that is not in the package's folder."""
    if not (folder.parent / "csrc").is_dir():
        return "install the package with `pip install .`"
    text = f"{folder.parent} is a source tree without built libraries: run `python setup.py build_ext --inplace` in it"
    for found in importlib.metadata.distributions(name="rakd"):
        installed = Path(str(found.locate_file("rakd_ops")))
        if installed != folder and any(installed.glob("_cpu.*so")):
            return f"{text}, or start Python in another folder: it hides the installed package {installed}"
    return text


def _load(name: str) -> str | None:
    """Load a compiled library; return why it is not there, or None."""
    folder = Path(__file__).parent
    paths = sorted(folder.glob(f"{name}.*so")) + sorted(folder.glob(f"{name}.so"))
    if not paths:
        return f"the compiled library rakd_ops/{name} is not installed; {_remedy(folder)}"
    try:
        torch.ops.load_library(str(paths[0]))
    except (OSError, RuntimeError) as error:
        return f"{paths[0].name} does not load under torch {torch.__version__}: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    info = build_info()
    if not info.get("cuda_built", False):
        return f"the CUDA library was not built: {info.get('cuda_reason', 'nothing was built')}"
    return _load("_cuda")


def _find_triton() -> str | None:
    # Looked for and not imported: that takes seconds, and happens when the first of its ops runs.
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if TRITON_INTERPRETED or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "triton compiles a C file at its first launch and finds no compiler (CC, gcc, clang)"


# Why each backend's code is not there, or None. Filled by load_backends(), a plain dict so that torch.compile can read
# it; whether a GPU is there is asked only when somebody asks, and a CUDA tensor answers it by existing.
_MISSING: dict[str, str | None] = {}


def load_backends() -> None:
    """Load what is installed, so that its ops are registered. Called once, when the schemas are defined."""
    _MISSING.update(cuda=_load_cuda(), triton=_find_triton(), cpu=_load("_cpu"), reference=None)


_TEGRA = {(7, 2), (8, 7), (11, 0)}
"""Capabilities of Xavier, Orin and Thor."""


def can_run(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether compiled CUDA code runs on a device.

    Args:
        architecture: ``"9.0"`` for machine code, ``"9.0+PTX"`` for PTX; ``"9.0a"`` and ``"10.0f"`` are the code of one
            architecture and of one family.
        capability: The device's compute capability.

    Returns:
        Machine code runs on the same major version from its minor version on, PTX on all that are as new. Machine code
        of a Tegra runs on none but its own kind, and a Tegra runs no other.

    Source:
        CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    number, _, ptx = architecture.partition("+")
    major, minor = map(int, number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == (major, minor)
    if ptx and not number.endswith("f"):
        return capability >= (major, minor)
    if (major, minor) in _TEGRA or capability in _TEGRA:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def explain_mismatch(architectures: Iterable[str], capability: tuple[int, int]) -> str | None:
    """Return why code for none of these architectures runs on a device, or None if some does."""
    if any(can_run(architecture, capability) for architecture in architectures):
        return None
    built = ", ".join(architectures) or "no architecture on record"
    device = "{}.{}".format(*capability)
    return f"the CUDA library was built for {built}; the device has {device}. Build with TORCH_CUDA_ARCH_LIST={device}"


def _driver_version() -> int | None:
    """Latest CUDA that the driver supports: 12080 is 12.8. None where none tells."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    version = ctypes.c_int()
    return version.value if ask(ctypes.byref(version)) == 0 else None


def explain_driver(toolkit: str, driver: int | None, *, from_ptx: bool = False) -> str | None:
    """Return why a driver is too old for a library's CUDA runtime, or None.

    Args:
        toolkit: Version that the library was built with, ``"13.0"``; empty: not on record.
        driver: Latest CUDA that the driver supports, 12080 is 12.8; None: not known.
        from_ptx: Whether the driver has to compile the device's code, which it does up to its own version.

    Source:
        CUDA Compatibility, "Minor Version Compatibility": a runtime needs a driver of its major version or newer.
    """
    if not toolkit or driver is None:
        return None
    major, minor = map(int, toolkit.split("."))
    if driver >= 1000 * major + (10 * minor if from_ptx else 0):
        return None
    here = f"{driver // 1000}.{driver % 1000 // 10}"
    return f"the CUDA library was built with CUDA {toolkit}; the driver here supports {here}: update it or build anew"


# Per device, so that it is asked once.
_MISMATCHES: dict[int, str | None] = {}


def _mismatch(index: int) -> str | None:
    """Return why the CUDA library cannot run on a device, or None."""
    if index not in _MISMATCHES:
        try:
            capability = torch.cuda.get_device_capability(index)
        except (RuntimeError, AssertionError):
            return None  # fake tensors on a machine without a GPU: nothing will run here
        info = build_info()
        architectures = info.get("cuda_architectures", ())
        assert isinstance(architectures, tuple)
        from_ptx = not any(can_run(each, capability) for each in architectures if not each.endswith("+PTX"))
        outdated = explain_driver(str(info.get("cuda_toolkit", "")), _driver_version(), from_ptx=from_ptx)
        _MISMATCHES[index] = explain_mismatch(architectures, capability) or outdated
    return _MISMATCHES[index]


# As torch.compiler.assume_constant_result does, which would import the compiler.
_mismatch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_installed(backend: str) -> bool:
    """Whether a backend's code is there; asks no device, which would start CUDA in this process."""
    return _MISSING[backend] is None


def _why_not(backend: str) -> str | None:
    missing = _MISSING[backend]
    needs_device = backend == "cuda" or (backend == "triton" and not TRITON_INTERPRETED)
    if missing is None and needs_device and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if missing is None and backend == "cuda":
        try:
            return _mismatch(torch.cuda.current_device())
        except RuntimeError as error:  # as in a process that was forked from one that uses CUDA
            return str(error).strip().split("\n")[0]
    return missing


def _why_not_on(backend: str, device: torch.device) -> str | None:
    """As `_why_not`, without asking whether there is a GPU: a tensor on one answers that by existing."""
    if _MISSING[backend] is None and backend == "cuda" and device.type == "cuda":
        return _mismatch(device.index or 0)
    return _MISSING[backend]


def available_backends() -> dict[str, bool | str]:
    """Tell which backends can run here, on the current device where they need one.

    Returns:
        For each of ``"cuda"``, ``"triton"``, ``"cpu"`` and ``"reference"``: True, or the reason it is not there.
    """
    reasons = {backend: _why_not(backend) for backend in BACKENDS}
    return {backend: True if reason is None else reason for backend, reason in reasons.items()}


@functools.cache
def _warn_slow(device: torch.device, chosen: str, better: tuple[str, ...]) -> None:
    reasons = {name: _why_not_on(name, device) for name in better}
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    message = f"rakd_ops: {device.type} tensors are served by the slower {chosen!r} backend ({listed})"
    warnings.warn(message, stacklevel=4)


def choose_backend(backend: str, device: torch.device) -> str:
    """Resolve ``backend`` for tensors on ``device``.

    Args:
        backend: A backend's name or ``"auto"``, which takes the first of them that can run.
        device: Of the maps.

    Returns:
        A backend's name.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend asked for cannot run here or on this device; the message says why.
    """
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    serving = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference"), "meta": ("cpu", "reference")}.get(
        device.type, ("reference",)
    )
    if backend == "auto":
        chosen = next(name for name in serving if _why_not_on(name, device) is None)
        if chosen != serving[0] and not torch.compiler.is_compiling():
            _warn_slow(device, chosen, serving[: serving.index(chosen)])
        return chosen
    reason = _why_not_on(backend, device)
    if reason is not None:
        raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")
    interpreted = backend == "triton" and TRITON_INTERPRETED and device.type == "cpu"
    if backend not in serving and not interpreted:
        raise RuntimeError(f"backend: {backend!r} cannot take tensors on device {device}")
    return backend
