"""Builds the compiled libraries of ``rakd_ops``; everything else about the package stands in pyproject.toml.

Two libraries, because a user's torch may have no CUDA: ``rakd_ops/_cpu`` always, ``rakd_ops/_cuda`` where it can be
built. Both use LibTorch's stable ABI with 2.10 as target, so the torch they are compiled against (the newest, in
pip's isolated build) need not be the one they run under. They are loaded by ``torch.ops.load_library`` and hold no
Python module.

Environment variables:
    RAKD_CUDA=1 / 0: build the CUDA library or fail / do not build it. Unset: build it if nvcc and a CUDA build of
        torch are there. What was decided, and why, is printed and kept in ``rakd_ops/_build_info.py``.
    CUDA_HOME: the CUDA toolkit to use.
    TORCH_CUDA_ARCH_LIST: GPU architectures, by number ("8.0 9.0+PTX"). They are kept in ``rakd_ops/_build_info.py``.
    CXX: the C++ compiler, with options if need be. nvcc chooses its own; NVCC_CCBIN names it another.
    RAKD_WERROR=1: compiler warnings are errors (CI).
    MAX_JOBS: compilations at a time.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10
DEFAULT_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"

# Contraction into fused multiply-adds is off in the files that compute geometry: see csrc/geometry.h.
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
GEOMETRY_FLAGS = ["-ffp-contract=off"]
ISA_FLAGS = {
    "baseline": ["-DRAKD_VECTOR_BYTES=16"],
    "avx2": ["-DRAKD_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DRAKD_VECTOR_BYTES=64",
        *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ],
}


def switch(name: str) -> str:
    """Return an environment variable that is "0", "1" or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0, 1 or nothing, got {value!r}")
    return value


# Free-threaded Python has no limited API before 3.15, and setuptools refuses the tag.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
WARNINGS_ARE_ERRORS = switch("RAKD_WERROR") == "1"


@dataclass(frozen=True)
class CudaDecision:
    """Whether the CUDA library is built, why, with which toolkit, and where that has its static runtime."""

    build: bool
    reason: str
    home: Path | None = None
    libraries: Path | None = None


def find_headers(home: Path, name: str) -> list[Path]:
    """A header's files in a toolkit. conda keeps them below ``targets``, where nvcc finds them."""
    headers = [home / "include" / name, *home.glob(f"targets/*/include/{name}")]
    return [header for header in headers if header.is_file()]


def find_cuda_home() -> tuple[Path | None, str]:
    """Find a CUDA toolkit that has both a compiler and headers.

    A lone ``nvcc`` on the PATH may be a wrapper whose folder is no toolkit, so each candidate is checked.
    """
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    explicit = bool(candidates)
    if not explicit:
        nvcc = shutil.which("nvcc")
        if nvcc:
            candidates.append(Path(nvcc).resolve().parent.parent)
        candidates.append(Path("/usr/local/cuda"))
    for home in candidates:
        if (home / "bin" / "nvcc").is_file() and find_headers(home, "cuda_runtime.h"):
            return home, f"CUDA toolkit at {home}"
    looked = ", ".join(str(home) for home in candidates)
    where = "CUDA_HOME names no CUDA toolkit" if explicit else "no CUDA toolkit"
    return None, f"{where} (looked for bin/nvcc and include/cuda_runtime.h in {looked})"


def find_static_runtime(home: Path) -> Path | None:
    """Find the folder of ``libcudart_static.a``: installers, conda and pip each put it elsewhere."""
    targets = {"x86_64": ("x86_64-linux",), "aarch64": ("sbsa-linux", "aarch64-linux")}.get(platform.machine(), ())
    folders = [home / "lib64", home / "lib", *(home / "targets" / target / "lib" for target in targets)]
    return next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)


def decide_cuda(torch_has_cuda: bool) -> CudaDecision:
    """Decide on the CUDA library from RAKD_CUDA, the toolkit and the torch that is built against."""
    wish = switch("RAKD_CUDA")
    if wish == "0":
        return CudaDecision(False, "RAKD_CUDA=0 forbids it")
    home, found = find_cuda_home()
    libraries = None if home is None else find_static_runtime(home)
    if not any((CSRC / "cuda").glob("*.cu")):
        decision = CudaDecision(False, "this version has no CUDA kernels")
    elif not torch_has_cuda:
        decision = CudaDecision(False, "the torch it is built against has no CUDA")
    elif home is None:
        decision = CudaDecision(False, found)
    elif libraries is None:
        where = "lib64, lib and targets/*/lib"
        decision = CudaDecision(False, f"the CUDA toolkit at {home} has no libcudart_static.a in {where}")
    else:
        return CudaDecision(True, found, home, libraries)
    if wish == "1":
        raise SystemExit(f"RAKD_CUDA=1 asks for the CUDA library, but {decision.reason}")
    return decision


def list_architectures(wanted: str) -> list[str]:
    """List what a TORCH_CUDA_ARCH_LIST asks for; ``"9.0+PTX"`` is two: ``"9.0"``, and ``"9.0+PTX"`` for its PTX."""
    architectures = []
    for entry in wanted.replace(";", " ").split():
        match = re.fullmatch(r"(\d+\.\d[af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {entry!r}")
        architectures += [match[1]] + [entry] * bool(match[2])
    return list(dict.fromkeys(architectures))


def architecture_flags(architectures: list[str]) -> list[str]:
    """Translate architectures into nvcc's -gencode options."""
    flags = []
    for architecture in architectures:
        number, ptx, _ = architecture.replace(".", "").partition("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return flags


def find_compiler() -> list[str]:
    """Return the C++ compiler, CXX if set, as the first words of a command.

    Raises:
        SystemExit: It is not there.
    """
    value = os.environ.get("CXX", "").strip() or "c++"
    command = [value] if shutil.which(value) else shlex.split(value)
    if shutil.which(command[0]) is None:
        raise SystemExit(f"rakd_ops: no C++ compiler (CXX={value}): install GCC or Clang, or set CXX to one")
    return command


@dataclass(frozen=True)
class Unit:
    """One compilation: a source, its flags, and a tag where a source is compiled more than once."""

    source: Path
    flags: tuple[str, ...]
    tag: str = ""


class BuildLibraries(build_ext):
    """Compiles with flags of their own per file, several at a time, and records what was built."""

    def finalize_options(self) -> None:
        """Decide what to build."""
        import torch
        from torch.utils.cpp_extension import include_paths

        self.torch_version = torch.__version__
        self.torch_libraries = Path(torch.__file__).parent / "lib"
        self.torch_includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        self.cuda = decide_cuda(torch.version.cuda is not None)
        self.architectures = self.choose_architectures() if self.cuda.build else []
        self.distribution.ext_modules = [extension("_cpu")] + ([extension("_cuda")] if self.cuda.build else [])
        super().finalize_options()

    def run(self) -> None:
        """Build, and write ``_build_info.py``."""
        verdict = "is built" if self.cuda.build else "is not built"
        print(f"rakd_ops: the CUDA library {verdict}: {self.cuda.reason}", flush=True)
        self.cxx = find_compiler()
        super().run()
        self.write_build_info()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library."""
        if os.name != "posix":
            raise SystemExit("rakd_ops builds with GCC or Clang; this platform is not supported")
        units = self.cuda_units() if ext.name.endswith("_cuda") else self.cpu_units()
        objects_dir = Path(self.build_temp) / ext.name
        objects_dir.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.jobs()) as pool:
            objects = list(pool.map(lambda unit: self.compile_unit(unit, objects_dir), units))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        libraries = ["-ltorch_cpu", "-lc10"]
        if ext.name.endswith("_cuda"):
            # A static runtime: the user's torch may carry another CUDA version than the toolkit here.
            libraries += [
                "-ltorch_cuda",
                f"-L{self.cuda.libraries}",
                "-lcudart_static",
                "-lrt",
                "-ldl",
                "-lpthread",
            ]
        shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-shared"]
        as_needed = [] if platform.system() == "Darwin" else ["-Wl,--as-needed", "-s"]
        search = f"-L{self.torch_libraries}"
        command = [
            *self.cxx,
            *shared,
            *as_needed,
            *map(str, objects),
            search,
            *libraries,
            "-o",
            str(library),
        ]
        self.check_call(command)

    def jobs(self) -> int:
        """Return how many compilations may run at a time; the architectures of a CUDA file are one each."""
        return int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count() or 1

    def cpu_units(self) -> list[Unit]:
        """List the compilations of the CPU library."""
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = ISA_FLAGS if is_x86 else {"baseline": ISA_FLAGS["baseline"]}
        macros = [f"-DRAKD_HAS_{name.upper()}" for name in isas]
        torch_flags = [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}", *self.torch_includes]
        units = [
            Unit(CSRC / "cpu" / "kernels.cpp", (*flags, f"-DRAKD_ISA={name}"), name) for name, flags in isas.items()
        ]
        sources = sorted(source for source in (CSRC / "cpu").glob("*.cpp") if source.stem != "kernels")
        units += [Unit(source, (*GEOMETRY_FLAGS, *macros, *torch_flags)) for source in sources]
        return sorted(units, key=lambda unit: unit.tag, reverse=True)  # the slow ones first

    def cuda_units(self) -> list[Unit]:
        """List the compilations of the CUDA library."""
        flags = (
            f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
            "-DUSE_CUDA",
            *architecture_flags(self.architectures),
            *self.torch_includes,
        )
        return [Unit(source, flags) for source in sorted((CSRC / "cuda").glob("*.cu"))]

    def choose_architectures(self) -> list[str]:
        """Return TORCH_CUDA_ARCH_LIST, or those default architectures that this toolkit can compile for."""
        wished = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        if wished:
            return list_architectures(wished)
        command = [str(self.cuda.home / "bin" / "nvcc"), "--list-gpu-arch"]
        known = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        wanted = DEFAULT_ARCHITECTURES.removesuffix("+PTX").split()
        chosen = [arch for arch in wanted if f"compute_{arch.replace('.', '')}" in known] or wanted
        return list_architectures(" ".join(chosen) + "+PTX")

    def compile_unit(self, unit: Unit, objects_dir: Path) -> Path:
        """Compile one unit unless its object is newer than all sources."""
        target = objects_dir / f"{unit.source.stem}{'-' + unit.tag if unit.tag else ''}.o"
        if unit.source.suffix == ".cu":
            compiler = [str(self.cuda.home / "bin" / "nvcc"), "-std=c++17", "-O3", f"--threads={self.jobs()}"]
            compiler += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
            compiler += ["-Werror=all-warnings"] if WARNINGS_ARE_ERRORS else []
        else:
            compiler = [*self.cxx, *CXX_FLAGS, "-fPIC", *(["-Werror"] if WARNINGS_ARE_ERRORS else [])]
        command = [*compiler, *unit.flags, "-c", str(unit.source), "-o", str(target)]
        record = target.with_suffix(".command")
        newest = max(path.stat().st_mtime for path in [*CSRC.rglob("*.*"), Path(__file__)])
        # Another torch or toolkit may be installed under the same paths, so versions are part of the record.
        content = "\n".join([*command, self.torch_version, (self.cuda.home and toolkit_version(self.cuda.home)) or ""])
        current = record.exists() and record.read_text() == content
        if current and target.exists() and target.stat().st_mtime > newest:
            return target
        self.check_call(command)
        record.write_text(content)
        return target

    def check_call(self, command: list[str]) -> None:
        """Run a compiler; a failure ends the build with the command that failed."""
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            instead = " (RAKD_CUDA=0 builds without CUDA)" if command[0].endswith("nvcc") else ""
            raise SystemExit(f"rakd_ops: the build failed{instead} at: " + " ".join(command))

    def write_build_info(self) -> None:
        """Record how the libraries were built, beside them."""
        package = Path(self.get_ext_fullpath("rakd_ops._cpu")).parent
        if not self.cuda.build:  # one of an earlier build
            for stale in package.glob("_cuda*.so"):
                stale.unlink()
        compiler = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True, check=False)
        info = {
            "built_against_torch": self.torch_version,
            "stable_abi_target": "2.10",
            "compiler": compiler.stdout.splitlines()[0] if compiler.stdout else "unknown",
            "cuda_built": self.cuda.build,
            "cuda_reason": self.cuda.reason,
            "cuda_architectures": tuple(self.architectures),
            "cuda_toolkit": toolkit_version(self.cuda.home) if self.cuda.build and self.cuda.home else "",
        }
        lines = ['"""How the compiled libraries were built; written by setup.py."""', ""]
        lines += [f"{key} = {value!r}" for key, value in info.items()]
        (package / "_build_info.py").write_text("\n".join(lines) + "\n")


def toolkit_version(home: Path) -> str:
    """Version of a CUDA toolkit, such as "13.0"; empty if no header tells."""
    for header in find_headers(home, "cuda_runtime_api.h"):
        found = re.search(r"^#define CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"), re.MULTILINE)
        if found:
            return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
    return ""


def extension(name: str) -> Extension:
    """Describe one library; its sources are compiled by BuildLibraries, not by setuptools."""
    return Extension(f"rakd_ops.{name}", sources=[], py_limited_api=LIMITED_API)


setup(
    ext_modules=[extension("_cpu")],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
