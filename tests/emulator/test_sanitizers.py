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
