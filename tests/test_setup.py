"""setup.py decides what is built, for which GPUs and with which compiler; tested without building anything."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
VARIABLES = ("RAKD_CUDA", "RAKD_WERROR", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX")


def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run setup.py as far as its call of ``setuptools.setup``."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return load(monkeypatch)


def make_toolkit(home: Path, headers: str = "include", libraries: str | None = "lib64") -> Path:
    for name in ("bin/nvcc", f"{headers}/cuda_runtime.h", *([f"{libraries}/libcudart_static.a"] if libraries else [])):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    return home


def make_program(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_asking_for_cuda_without_a_toolkit_is_an_error_that_says_why(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    decision = setup.decide_cuda(True)
    assert not decision.build
    assert decision.reason.startswith("CUDA_HOME names no CUDA toolkit (looked for bin/nvcc")
    monkeypatch.setenv("RAKD_CUDA", "1")
    with pytest.raises(SystemExit, match="RAKD_CUDA=1 asks for the CUDA library, but CUDA_HOME names no"):
        setup.decide_cuda(True)
    monkeypatch.setenv("RAKD_CUDA", "0")
    assert setup.decide_cuda(True).reason == "RAKD_CUDA=0 forbids it"


def test_wrong_switches_are_errors(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAKD_CUDA", "yes")
    with pytest.raises(SystemExit, match="RAKD_CUDA: expected 0, 1 or nothing, got 'yes'"):
        setup.decide_cuda(True)
    monkeypatch.setenv("RAKD_WERROR", "on")
    with pytest.raises(SystemExit, match="RAKD_WERROR: expected 0, 1 or nothing, got 'on'"):
        load(monkeypatch)


@pytest.mark.parametrize(
    ("headers", "libraries"),
    [
        ("include", "lib64"),
        ("include", "lib"),
        ("targets/x86_64-linux/include", "targets/x86_64-linux/lib"),
    ],
)
def test_toolkits_of_all_installers_are_found(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, headers: str, libraries: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    home = make_toolkit(tmp_path / "cuda", headers, libraries)
    monkeypatch.setenv("CUDA_HOME", str(home))
    decision = setup.decide_cuda(True)
    assert decision.build and decision.home == home
    assert decision.libraries == home / libraries


def test_a_toolkit_without_the_static_runtime_is_told_before_anything_is_compiled(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", libraries=None)))
    decision = setup.decide_cuda(True)
    assert not decision.build and "has no libcudart_static.a in lib64, lib and targets/*/lib" in decision.reason


def test_architectures(setup: ModuleType) -> None:
    architectures = setup.list_architectures("7.5;8.0 9.0a 12.0+PTX 8.0")
    assert architectures == ["7.5", "8.0", "9.0a", "12.0", "12.0+PTX"]
    assert setup.architecture_flags(architectures) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    for wrong in ("Ampere", "90", "9.0+ptx"):
        with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected entries like 9\.0 or 9\.0\+PTX"):
            setup.list_architectures(wrong)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("compute_75 compute_80 compute_90 compute_120", ["7.5", "8.0", "9.0", "12.0", "12.0+PTX"]),
        (
            "compute_80 compute_90",
            ["8.0", "9.0", "9.0+PTX"],
        ),  # a toolkit that has dropped sm_75, or is older than sm_100
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: str, expected: list[str]
) -> None:
    command = setup.BuildLibraries(setuptools.Distribution())
    make_program(tmp_path / "bin" / "nvcc", f"printf '%s\\n' {known}")
    command.cuda = setup.CudaDecision(True, "", tmp_path)
    assert command.choose_architectures() == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6+PTX")
    assert command.choose_architectures() == ["8.6", "8.6+PTX"]


def test_what_was_built_is_recorded(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = setup.BuildLibraries(setuptools.Distribution())
    monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / name))
    command.torch_version, command.cxx = "2.11.0", ["true"]
    command.cuda = setup.CudaDecision(True, "because", tmp_path)
    command.architectures = ["7.5", "12.0", "12.0+PTX"]
    include = tmp_path / "targets" / "x86_64-linux" / "include"  # as conda has it
    include.mkdir(parents=True)
    (include / "cuda_runtime_api.h").write_text("/* */\n#define CUDART_VERSION  12060\n")
    command.write_build_info()
    found: dict[str, object] = {}
    exec((tmp_path / "_build_info.py").read_text(), found)
    assert found["cuda_architectures"] == ("7.5", "12.0", "12.0+PTX")
    assert (found["cuda_built"], found["cuda_reason"]) == (True, "because")
    assert found["cuda_toolkit"] == "12.6"
    (include / "cuda_runtime_api.h").unlink()
    assert setup.toolkit_version(tmp_path) == ""


def test_objects_of_another_torch_or_toolkit_are_compiled_anew(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which may lie at the same path, with older files."""
    command = setup.BuildLibraries(setuptools.Distribution())
    home = make_toolkit(tmp_path / "cuda")
    header = home / "include" / "cuda_runtime_api.h"
    header.write_text("#define CUDART_VERSION 12060\n")
    command.torch_version, command.cxx, command.cuda = "2.11.0", ["g++"], setup.CudaDecision(True, "", home)
    compiled: list[str] = []

    def compile_(words: list[str]) -> None:
        compiled.append(words[0])
        Path(words[-1]).write_bytes(b"")

    monkeypatch.setattr(command, "check_call", compile_)
    unit = setup.Unit(setup.CSRC / "cpu" / "align.cpp", ())
    counts = []
    for version, runtime in (("2.11.0", "12060"), ("2.11.0", "12060"), ("2.12.0", "12060"), ("2.12.0", "13000")):
        command.torch_version = version
        header.write_text(f"#define CUDART_VERSION {runtime}\n")
        command.compile_unit(unit, tmp_path)
        counts.append(len(compiled))
    assert counts == [1, 1, 2, 3]


def test_numbers_of_jobs_and_free_threaded_python(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    command = setup.BuildLibraries(setuptools.Distribution())
    for value, expected in (("", os.cpu_count()), ("3", 3)):
        monkeypatch.setenv("MAX_JOBS", value)
        assert command.jobs() == expected
    assert setup.LIMITED_API
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else None)
    assert not load(monkeypatch).LIMITED_API


def test_compiler(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = make_program(tmp_path / "my tools" / "g++")
    for value, expected in (
        (str(compiler), [str(compiler)]),  # a path with a space, as it stands
        (f"{shlex.quote(str(compiler))} -m64", [str(compiler), "-m64"]),
    ):
        monkeypatch.setenv("CXX", value)
        assert setup.find_compiler() == expected
    monkeypatch.setenv("CXX", "ccache no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(CXX=ccache no-such-compiler\): install GCC or Clang"):
        setup.find_compiler()
    monkeypatch.setenv("CXX", " ")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(CXX=c\+\+\)"):
        setup.find_compiler()
