"""Compiles kernels for the emulator, makes mutants of them, and runs Python under sanitizers.

``load`` compiles a pybind11 source that includes kernels and returns it as a module; what was compiled before is
taken from a cache. Under a sanitizer the interpreter must be started with the sanitizer's runtime: ``run`` does so,
and so does the command line, where everything that ``load`` compiles is then instrumented::

    python tests/emulator/build.py address -m pytest tests/emulator
    python tests/emulator/build.py thread -m pytest tests/emulator

Environment variables:
    CXX: the C++ compiler (g++).
    RAKD_EMULATOR_CACHE: where compiled modules are kept (build/emulator).
    RAKD_EMULATOR_SANITIZE: the sanitizer of this process, set by ``run``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = Path(os.environ.get("RAKD_EMULATOR_CACHE", ROOT / "build" / "emulator"))
CXX = os.environ.get("CXX", "g++")
SANITIZER = os.environ.get("RAKD_EMULATOR_SANITIZE", "")
MODULE = "emulated"  # the first argument of PYBIND11_MODULE in every source

# No contraction, for csrc/geometry.h. Without unique symbols: a process loads many mutants, whose inline variables
# would otherwise be one and the same.
FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-DRAKD_EMULATE"),
)
SANITIZER_FLAGS: dict[str, tuple[str, ...]] = {
    "": (),
    # Floating-point conversions beyond the integer's range are undefined as well, and CUDA's results differ.
    "address": (
        *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
        "-fno-omit-frame-pointer",
    ),
    "thread": ("-fsanitize=thread", "-fno-omit-frame-pointer"),
}
SANITIZER_OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {"TSAN_OPTIONS": "halt_on_error=1"},
}
SOURCES = {".h", ".cuh", ".cpp", ".cu"}


class BuildError(RuntimeError):
    """The compiler refused."""


@functools.cache
def _toolchain() -> str:
    version = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    return version.splitlines()[0] + sys.version


def compile_module(
    source: Path, include: Sequence[Path] = (CSRC,), flags: Sequence[str] = (), sanitizer: str | None = None
) -> Path:
    """Compile a pybind11 source for the emulator, unless the same was compiled before.

    Args:
        source: C++ file whose module is named ``emulated``.
        include: Folders of headers, in the order in which they are searched; the emulator's own comes last. All
            sources in them count as part of what is compiled.
        flags: More compiler flags; they come last.
        sanitizer: ``"address"`` (with undefined behaviour), ``"thread"``, ``""`` for none, or ``None`` for that of
            this process.

    Returns:
        The shared library.

    Raises:
        BuildError: With the compiler's messages.
    """
    import pybind11

    include = [*include, HERE]
    options = [*FLAGS, *SANITIZER_FLAGS[SANITIZER if sanitizer is None else sanitizer], *flags]
    digest = hashlib.sha256(repr((_toolchain(), pybind11.__version__, options)).encode())
    digest.update(source.read_bytes())
    for folder in include:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCES:
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    library = CACHE / f"{source.stem}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    folders = [*include, Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made = Path(scratch) / library.name
        command = [CXX, *(f"-I{folder}" for folder in folders), *options, str(source), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildError(" ".join(command) + "\n" + result.stderr)
        made.replace(library)
    return library


def load(
    source: Path, include: Sequence[Path] = (CSRC,), flags: Sequence[str] = (), sanitizer: str | None = None
) -> ModuleType:
    """Compile and import a pybind11 source. The arguments are those of ``compile_module``."""
    library = compile_module(source, include, flags, sanitizer)
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutate(source: Path, replacements: Sequence[tuple[str, str, str]], target: Path) -> Path:
    """Copy a folder of sources and replace text in it.

    Args:
        source: Folder to copy.
        replacements: (file below the folder, text, what replaces it). The text must occur exactly once, so that a
            mutant whose text has changed fails instead of testing nothing.
        target: The copy; must not exist.

    Returns:
        The copy, for ``include``.
    """
    shutil.copytree(source, target)
    for name, old, new in replacements:
        path = target / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{name} has {text.count(old)} occurrences of {old!r}, not one")
        path.write_text(text.replace(old, new), encoding="utf-8")
    return target


def _runtime(name: str) -> str:
    found = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        raise BuildError(f"{CXX} has no {name}")
    return found


def environment(sanitizer: str) -> dict[str, str]:
    """Environment variables of a Python process whose emulated modules are instrumented."""
    variables: Mapping[str, str] = {}
    if sanitizer:
        # libstdc++ as well: the sanitizers look up what they intercept of it when they start.
        runtime = [_runtime("libasan.so" if sanitizer == "address" else "libtsan.so"), _runtime("libstdc++.so")]
        variables = {**SANITIZER_OPTIONS[sanitizer], "LD_PRELOAD": " ".join(runtime)}
    return {**os.environ, "RAKD_EMULATOR_SANITIZE": sanitizer, **variables}


def command(sanitizer: str, arguments: Sequence[str]) -> list[str]:
    """A command line of Python under a sanitizer, to be run in ``environment(sanitizer)``."""
    python = [sys.executable, *arguments]
    # TSan needs memory at fixed addresses, which randomised layouts of recent kernels may occupy.
    if sanitizer == "thread" and (setarch := shutil.which("setarch")):
        fixed = [setarch, "--addr-no-randomize"]
        if subprocess.run([*fixed, "true"], capture_output=True).returncode == 0:
            return [*fixed, *python]
    return python


def run(sanitizer: str, arguments: Sequence[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with a sanitizer's runtime, and with it the emulated modules that it loads.

    Args:
        sanitizer: ``"address"``, ``"thread"`` or ``""``.
        arguments: Of Python.
        timeout: In seconds.

    Returns:
        The finished process with what it printed. A sanitizer's report makes its exit status non-zero.
    """
    return subprocess.run(
        command(sanitizer, arguments), env=environment(sanitizer), capture_output=True, text=True, timeout=timeout
    )


if __name__ == "__main__":
    chosen = sys.argv[1]
    sys.exit(subprocess.run(command(chosen, sys.argv[2:]), env=environment(chosen)).returncode)
