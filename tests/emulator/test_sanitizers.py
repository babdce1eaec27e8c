"""Kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: each reports what it should."""

from __future__ import annotations

import subprocess
from pathlib import Path

import build
import pytest
from test_emulator import BARRIERS, KERNELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(build.SANITIZER), reason="this process runs under a sanitizer already"),
]

SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import build, test_emulator as tests
from pathlib import Path
module = build.load(tests.BINDING, [Path({kernels!r})])
module.schedule(1, shuffle_blocks=True)
{statements}
print("finished")
"""
RIGHT = """
assert tests.block_sums(module, 64, blocks=1)  # of two workers, one has nothing to do
for threads in (32, 96):
    assert tests.block_sums(module, threads) and tests.prefix_sum(module, threads)
assert tests.transpose(module, (16, 4, 1))
tests.test_atomics_and_workers(module, 2)
tests.test_exceptions_reach_the_caller(module, 2)
tests.test_divergence_is_refused(module, "lane_missing", 1)
"""


def run(sanitizer: str, statements: str, kernels: Path = KERNELS) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(here=str(build.HERE), kernels=str(kernels), statements=statements)
    return build.run(sanitizer, ["-c", script], timeout=300)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_right_kernels_are_passed(sanitizer: str) -> None:
    result = run(sanitizer, RIGHT)
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "mistake,report",
    [
        ("global_overrun", r"WRITE of size 4"),
        ("far_overrun", r"READ of size 4"),
        ("shared_overrun", r"WRITE of size 4"),
        ("undefined", r"signed integer overflow"),
    ],
)
def test_memory_and_undefined_behaviour(mistake: str, report: str) -> None:
    result = run("address", f"tests.mistaken(module, {mistake!r})")
    assert result.returncode != 0 and "finished" not in result.stdout
    assert report in result.stderr and KERNELS.name in result.stderr, result.stderr


def races(statements: str, kernels: Path = KERNELS) -> bool:
    """Whether TSan reports a race in the kernels for one of some seeds: it misses some in some orders of the blocks."""
    loop = f"for seed in range(1, 6):\n    module.schedule(seed, shuffle_blocks=True)\n    {statements}"
    result = run("thread", loop, kernels)
    assert "ThreadSanitizer" in result.stderr or "finished" in result.stdout, result.stderr
    return result.returncode != 0 and "data race" in result.stderr and KERNELS.name in result.stderr


@pytest.mark.parametrize("mistake", ["block_race", "hidden_race"])
def test_races(mistake: str) -> None:
    assert races(f"tests.mistaken(module, {mistake!r})")


def test_missing_atomic_and_barriers(tmp_path: Path) -> None:
    replacements = [
        (KERNELS.name, "atomicAdd(&bins[input[i]], 1)", "bins[input[i]] += 1"),
        *((KERNELS.name, *BARRIERS[name]) for name in ("block_sums", "transpose", "prefix_sum")),
    ]
    kernels = build.mutate(build.HERE, replacements, tmp_path / "mutant") / KERNELS.name
    for statements in (
        "module.histogram(tests.np.zeros(1000, 'int32'), tests.np.zeros(10, 'int32'), 32)",
        "tests.block_sums(module, 64)",
        "tests.transpose(module, (16, 16, 1))",
        "tests.prefix_sum(module, 64)",
    ):
        assert races(statements, kernels), statements


# What no order of fibers need show: fences between blocks, and barriers that a whole warp would have to overtake.
OF_THE_GRAM_FORM = {
    "none": [],
    "fence before the counter removed": [("__threadfence();  // the part is visible before the counter", "")],
    "fence after the counter removed": [("__threadfence();  // the other parts are visible from here on", "")],
    "barrier before the sum removed": [("__syncthreads();  // sums[] held `last`", "")],
    "barrier after fragments removed": [("__syncthreads();  // fragments, boxes and stage are written anew", "")],
}
GRAM_SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import build, kernel_calls as tests
from pathlib import Path
module = build.load(tests.BINDING, [tests.KERNELS], include=[Path({source!r})])
call = tests.Call(form="gram", boxes=40, channels=33, size=(30, 50))
for seed in range(1, 4):
    module.schedule(seed, shuffle_blocks=True)
    call.distill(module)
print("finished")
"""


@pytest.mark.parametrize("name", OF_THE_GRAM_FORM)
def test_races_of_the_gram_form(name: str, tmp_path: Path) -> None:
    replacements = [("cuda/gram_operator.cuh", *texts) for texts in OF_THE_GRAM_FORM[name]]
    source = build.mutate(build.CSRC, replacements, tmp_path / "mutant")
    result = build.run("thread", ["-c", GRAM_SCRIPT.format(here=str(build.HERE), source=str(source))], timeout=300)
    if name == "none":
        assert "finished" in result.stdout, result.stderr
    else:
        assert "data race" in result.stderr and "gram_operator.cuh" in result.stderr, result.stderr
