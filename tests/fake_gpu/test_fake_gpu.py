"""Detector, distillation, trainer and commands on a CUDA device that is not there, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rakd_ops._backends import build_info

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def find_headers() -> Path | None:
    """The folder of the CUDA runtime's header: that of triton, which comes with torch, or of a toolkit."""
    from importlib.util import find_spec

    spec = find_spec("triton")
    homes = [Path(place) / "backends" / "nvidia" for place in (spec.submodule_search_locations or ())] if spec else []
    homes.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")))
    return next((home / "include" for home in homes if (home / "include" / "cuda_runtime_api.h").is_file()), None)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that stands before the CUDA runtime."""
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA: there is no runtime to stand before")
    if sys.platform != "linux":
        pytest.skip("LD_PRELOAD is Linux's")
    if not build_info().get("cuda_built"):
        pytest.skip("the CUDA library was not built; Triton, which would serve, asks for a true driver")
    headers, compiler = find_headers(), shutil.which("g++") or shutil.which("c++")
    if headers is None or compiler is None:
        pytest.skip("no C++ compiler, or no header of the CUDA runtime")
    library = tmp_path_factory.mktemp("driver") / "fake_driver.so"
    # torch looks the driver's own functions up in a library of this name.
    command = [compiler, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", str(headers)]
    subprocess.run([*command, str(HERE / "fake_driver.cpp"), "-o", str(library)], check=True)
    return library


def run(driver: Path, *arguments: str) -> str:
    environment = {**os.environ, "LD_PRELOAD": str(driver), "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    paths = (HERE, ROOT / "tests" / "rakd", ROOT)
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def test_all_runs_on_a_gpu_as_on_the_cpu(driver: Path) -> None:
    out = run(driver, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--override-ini=addopts=", str(HERE / "cases.py"))
    assert " passed" in out and "skipped" not in out and "failed" not in out, out
