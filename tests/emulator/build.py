"""Compiles kernels for the emulator, makes mutants of them, and runs Python under sanitizers.

``load`` compiles kernels and a pybind11 source that binds them and returns the module; what was compiled before is
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

import fcntl
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = Path(os.environ.get("RAKD_EMULATOR_CACHE", ROOT / "build" / "emulator"))
CXX = os.environ.get("CXX", "g++")
SANITIZER = os.environ.get("RAKD_EMULATOR_SANITIZE", "")
MODULE = "emulated"  # the first argument of PYBIND11_MODULE in every source

# Like nvcc, these do not warn of "#pragma unroll" and of comparing an int with threadIdx.x. No contraction, for
# csrc/geometry.h. No unique symbols: a process loads many mutants, whose inline variables would otherwise be one.
FLAGS = (
    *("-xc++", "-std=c++17", "-g1", "-fPIC", "-pthread", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-sign-compare", "-Wno-unknown-pragmas"),
    *("-fvisibility=hidden", "-fno-gnu-unique", "-DRAKD_EMULATE"),
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
    "thread": {
        "TSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "1",  # TSan does not see how OpenMP orders torch's threads
    },
}


class BuildError(RuntimeError):
    """The compiler refused."""


@functools.cache
def _toolchain() -> str:
    return _compiler(["--version"]) + sys.version


def _compiler(command: Sequence[str]) -> str:
    # The compiler itself is not to run under this process's sanitizer.
    variables = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([CXX, *command], capture_output=True, text=True, env=variables)
    if result.returncode != 0:
        raise BuildError(f"{CXX} {' '.join(command)}\n{result.stderr}")
    return result.stdout


def _made(name: str, key: str, command: Sequence[str]) -> Path:
    """The file that a compiler's command makes, from the cache if it was made before."""
    stem, suffix = name.split(".")
    path = CACHE / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.{suffix}"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    # Another process that is making the same is waited for: it takes less of the processor than making it twice.
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            # Under another name until it is whole: this process may be killed.
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                _compiler([*command, "-o", str(Path(scratch) / name)])
                (Path(scratch) / name).replace(path)
    return path


def compile_module(
    binding: Path,
    kernels: Sequence[Path] = (),
    include: Sequence[Path] = (CSRC,),
    flags: Sequence[str] = (),
    sanitizer: str | None = None,
) -> Path:
    """Compile kernels and their binding for the emulator, except what was compiled before.

    Args:
        binding: C++ file that includes ``bindings.h`` and makes the pybind11 module ``emulated``.
        kernels: C++ files that define the launch functions. The binding then includes but their declarations, is not
            instrumented, and serves all mutants of the kernels. Without any, the binding includes the kernels itself.
        include: Folders of headers, in the order in which they are searched; the emulator's own comes last.
        flags: More flags for what includes kernels; they come last.
        sanitizer: ``"address"`` (with undefined behaviour), ``"thread"``, ``""`` for none, or ``None`` for that of
            this process.

    Returns:
        The shared library.

    Raises:
        BuildError: With the compiler's messages.
    """
    import pybind11

    of_sanitizer = SANITIZER_FLAGS[SANITIZER if sanitizer is None else sanitizer]
    folders = [f"-I{folder}" for folder in (*include, HERE)]
    python = [f"-isystem{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]

    def compile_object(task: tuple[Path, Sequence[str]]) -> Path:
        source, options = task
        return _object(source, options, repr(options[len(folders) :]))

    of_kernels = ["-O2", *of_sanitizer, *flags]
    of_binding = ["-O1", "-DRAKD_EMULATE_BINDING"] if kernels else of_kernels
    tasks: list[tuple[Path, Sequence[str]]] = [
        (binding, [*folders, *python, *FLAGS, *of_binding]),
        *((source, [*folders, *FLAGS, *of_kernels]) for source in kernels),
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_object, tasks)]
    return _linked(binding.stem, objects, of_sanitizer)


def _linked(stem: str, objects: Sequence[str], of_sanitizer: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    command = ["-shared", "-pthread", *of_sanitizer, *objects, *libraries]
    return _made(f"{stem}.so", repr((objects, libraries)), command)


def compile_ops(sanitizer: str | None = None) -> Path:
    """Compile the registered CUDA ops, with their kernels, for tensors on the CPU.

    Args:
        sanitizer: As of ``compile_module``.

    Returns:
        The shared library, for ``torch.ops.load_library``; its ops are those of the namespace ``rakd_emulated``.

    Raises:
        BuildError: With the compiler's messages.
    """
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    of_sanitizer = SANITIZER_FLAGS[SANITIZER if sanitizer is None else sanitizer]
    torch_flags = [f"-isystem{path}" for path in include_paths()]
    options = [f"-I{CSRC}", f"-I{HERE}", *torch_flags, "-DTORCH_TARGET_VERSION=0x020a000000000000", *FLAGS, "-O2"]
    compiled = _object(HERE / "emulated_ops.cpp", [*options, *of_sanitizer], repr(of_sanitizer))
    return _linked("emulated_ops", [str(compiled)], of_sanitizer, [f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"])


def _object(source: Path, options: Sequence[str], flags: str) -> Path:
    # What the compiler sees after the preprocessor, and its flags, tell whether this was compiled before.
    key = _compiler([*options, "-E", "-P", str(source)]) + repr((_toolchain(), FLAGS, flags))
    return _made(f"{source.stem}.o", key, [*options, "-c", str(source)])


def load(
    binding: Path,
    kernels: Sequence[Path] = (),
    include: Sequence[Path] = (CSRC,),
    flags: Sequence[str] = (),
    sanitizer: str | None = None,
) -> ModuleType:
    """Compile and import kernels and their binding. The arguments are those of ``compile_module``."""
    library = compile_module(binding, kernels, include, flags, sanitizer)
    # pybind11 keeps modules by their full names; of these, only what follows the last dot names the entry point.
    spec = importlib.util.spec_from_file_location(f"{library.stem}.{MODULE}", library)
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
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name, old, new in replacements:
        path = target / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{name} has {text.count(old)} occurrences of {old!r}, not one")
        path.write_text(text.replace(old, new), encoding="utf-8")
    return target


def _runtime(name: str) -> str:
    found = _compiler([f"-print-file-name={name}"]).strip()
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
