"""What is distributed: the sdist builds the wheel, and both hold what they need and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# CPU only: the compiled CUDA code is checked where it is built, and it takes minutes for all architectures.
ENVIRONMENT = {**os.environ, "RAKD_CUDA": "0"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_sdist(out: Path) -> Path:
    # From a copy of what git would hand out: a build must not depend on, or leave, files in the source tree.
    source = out / "source"
    source.mkdir(parents=True)
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, source, cwd=out)
    return next(out.glob("*.tar.gz"))


def make_wheel(sdist: Path, out: Path) -> Path:
    out.mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--verbose"]
    printed = run(*pip, "--wheel-dir", out, sdist, cwd=out)
    assert "rakd_ops: the CUDA library is not built: RAKD_CUDA=0 forbids it" in printed
    return next(out.glob("*.whl"))


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc/geometry.h", "csrc/cpu/kernels.cpp"}
    assert needed <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= names
    foreign = {n for n in names if re.search(r"\.(so|o|pyc|png|csv)$|^(tests|benchmarks|runs|\.ci|\.github)(/|$)", n)}
    assert not foreign


def check_wheel(wheel: Path) -> None:
    assert re.fullmatch(r"rakd-[\d.]+-cp310-abi3-\w+\.whl", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = archive.read("rakd_ops/_build_info.py").decode()
    python = {str(p.relative_to(ROOT)) for package in ("rakd", "rakd_ops") for p in (ROOT / package).rglob("*.py")}
    python |= {"rakd/py.typed", "rakd_ops/py.typed", "rakd_ops/_build_info.py"}
    assert python <= names
    rest = {n for n in names - python if not n.split("/")[0].endswith(".dist-info")}
    assert len(rest) == 1
    assert re.fullmatch(r"rakd_ops/_cpu\.abi3\.so", rest.pop())
    assert "cuda_built = False" in info
    assert any(n.endswith("licenses/LICENSE") for n in names)


def check_that_it_works(wheel: Path, out: Path) -> None:
    """Without the source tree."""
    site = out / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = out / "install_check.py"
    script.write_bytes((ROOT / "tests" / "install_check.py").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, script], cwd=out, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "values and gradients are right" in done.stdout


@pytest.mark.slow
def test_what_is_distributed(tmp_path: Path) -> None:
    """In one test, so that processes which share tests out build the wheel once."""
    sdist = make_sdist(tmp_path / "sdist")
    check_sdist(sdist)
    wheel = make_wheel(sdist, tmp_path / "wheel")
    check_wheel(wheel)
    check_that_it_works(wheel, tmp_path)
