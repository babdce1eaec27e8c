"""The emulator itself: right results of right kernels in every order, and what it catches in wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import build
import numpy as np
import pytest

BINDING = build.HERE / "small_binding.cpp"
KERNELS = build.HERE / "small_kernels.cpp"
TYPES = ("float32", "float64", "int32", "int64")

# Under a sanitizer the whole process would end where these expect an exception.
plain_only = pytest.mark.skipif(bool(build.SANITIZER), reason="a sanitizer reports this first")


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    return build.load(BINDING, [KERNELS])


@pytest.fixture
def module(compiled: ModuleType) -> Iterator[ModuleType]:
    yield compiled
    compiled.schedule()


def numbers(count: int, dtype: str, seed: int = 0) -> np.ndarray[Any, Any]:
    """Small integers: their sums are the same in every order."""
    return np.random.default_rng(seed).integers(-50, 50, count).astype(dtype)


def block_sums(module: ModuleType, threads: int, dtype: str = "float32", blocks: int = 3) -> bool:
    values = numbers(5000, dtype)
    sums = np.empty(blocks, dtype)
    getattr(module, f"block_sums_{dtype}")(values, sums, threads)
    owner = np.arange(values.size) // threads % blocks
    return np.array_equal(sums, [values[owner == block].sum() for block in range(blocks)])


def transpose(module: ModuleType, block: tuple[int, int, int], misalign: int = 0, tile: int = 16) -> bool:
    values = np.random.default_rng(0).random((37, 50), np.float32)
    result = np.zeros((50, 37), np.float32)
    module.transpose(values, result, tile, block, misalign)
    return np.array_equal(result, values.T)


def prefix_sum(module: ModuleType, threads: int) -> bool:
    values = numbers(3 * threads, "int32").reshape(3, threads)
    result = values.copy()
    module.prefix_sum(result, threads)
    return np.array_equal(result, values.cumsum(1))


@pytest.mark.parametrize("threads", [32, 64, 96, 256, 1024])
@pytest.mark.parametrize("dtype", TYPES)
def test_block_sums(module: ModuleType, threads: int, dtype: str) -> None:
    for seed in range(8):
        module.schedule(seed, shuffle_blocks=True)
        assert block_sums(module, threads, dtype)


@pytest.mark.parametrize("block", [(1, 1, 1), (32, 1, 1), (32, 8, 1), (7, 5, 1), (16, 64, 1)])
def test_transpose(module: ModuleType, block: tuple[int, int, int]) -> None:
    for seed in range(8):
        module.schedule(seed, shuffle_blocks=True)
        assert transpose(module, block, misalign=seed % 3)


@pytest.mark.parametrize("threads", [1, 32, 33, 100, 512, 1024])
def test_prefix_sum(module: ModuleType, threads: int) -> None:
    for seed in range(8):
        module.schedule(seed, shuffle_blocks=True)
        assert prefix_sum(module, threads)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_atomics_and_workers(module: ModuleType, workers: int) -> None:
    values = np.abs(numbers(20_000, "int32")) % 10
    for seed in range(4):
        module.schedule(seed, shuffle_blocks=True, workers=workers)
        bins = np.full(10, 7, np.int32)
        module.histogram(values, bins, 64)
        np.testing.assert_array_equal(bins, np.bincount(values, minlength=10) + 7)


def test_coordinates(module: ModuleType) -> None:
    grid, block = (2, 3, 4), (5, 6, 7)
    result = np.empty((*grid[::-1], *block[::-1]), np.int64)
    module.coordinates(result, grid, block)
    z, y, x = np.indices(block[::-1])
    blocks = np.arange(24).reshape(4, 3, 2, 1, 1, 1)
    np.testing.assert_array_equal(result, (blocks << 32) + x + (y << 10) + (z << 20))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [32, 64, 48])
@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0xA5A5F00F])
def test_shuffles(module: ModuleType, dtype: str, threads: int, mask: int) -> None:
    values = numbers(threads, dtype)
    poison = np.frombuffer(b"\xff" * 8, dtype)[0]
    for seed, (argument, width) in enumerate([(0, 32), (1, 32), (5, 32), (16, 32), (3, 8), (9, 16), (1, 2), (0, 1)]):
        module.schedule(seed)
        result = np.empty((4, threads), dtype)
        getattr(module, f"shuffles_{dtype}")(values, result, mask, argument, width)
        expected = np.full((4, threads), poison)
        for thread in range(threads):
            warp, lane = divmod(thread, 32)
            if not mask >> lane & 1:
                continue
            begin = lane // width * width
            sources = [begin + argument % width, lane - argument, lane + argument, lane ^ argument]
            if sources[1] < begin:
                sources[1] = lane
            for kind in (2, 3):
                if sources[kind] >= begin + width:
                    sources[kind] = lane
            for kind, source in enumerate(sources):
                if mask >> source & 1 and warp * 32 + source < threads:
                    expected[kind, thread] = values[warp * 32 + source]
        np.testing.assert_array_equal(result, expected)


def widened(module: ModuleType, dtype: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result = np.empty(values.shape, np.float32)
    getattr(module, f"widen_{dtype}")(values, result)
    return result


def narrowed(module: ModuleType, dtype: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result = np.empty(values.shape, np.uint16)
    getattr(module, f"narrow_{dtype}")(values, result)
    return result


def test_half(module: ModuleType) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    for given in (halves, halves.view(np.float16)):
        np.testing.assert_array_equal(widened(module, "half", given), expected)

    finite = np.sort(expected[np.isfinite(expected)])
    between = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)  # ties, all exact
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    edges = np.float32([65504, 65519.996, 65520, 1e30, np.inf, 2**-25, 2**-24, 1e-30])
    values = np.concatenate(
        [between, np.nextafter(between, np.float32(np.inf)), expected, bits.view(np.float32), edges, -edges]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(np.float16).view(np.uint16)
    wanted[np.isnan(values)] = 0x7FFF  # CUDA's NaN
    np.testing.assert_array_equal(narrowed(module, "half", values), wanted)


def test_bfloat16(module: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    words = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(widened(module, "bfloat16", words), (words.astype(np.uint32) << 16).view(np.float32))
    high = np.random.default_rng(0).integers(0, 65536, 200_000, np.uint32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (high | low).view(np.float32)
        wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy().copy()
        wanted[np.isnan(values)] = 0x7FFF
        np.testing.assert_array_equal(narrowed(module, "bfloat16", values), wanted)


def test_counts(module: ModuleType) -> None:
    module.counts()
    assert prefix_sum(module, 64)
    counts = {"launches": 1, "blocks": 3, "threads": 192, "barriers": 3 * 13, "warp_barriers": 0, "shuffles": 0}
    assert module.counts() == counts
    assert module.counts()["launches"] == 0


def mistaken(module: ModuleType, mistake: str, threads: int = 64, shared_bytes: int = 256) -> np.ndarray[Any, Any]:
    values = np.arange(3 * threads, dtype=np.float32)
    result = np.zeros_like(values)
    module.mistaken(mistake, values, result, threads, shared_bytes)
    return result


DIVERGENCE = {
    "divergent_barrier": "5 wait at __syncthreads .*; 59 returned",
    "two_barriers": "5 wait at __syncthreads .*; 59 wait at __syncthreads",
    "early_return": r"\(2, 0, 0\): .* 63 wait at __syncthreads .*; 1 returned.* thread 63",
    "lane_missing": r"62 wait at __shfl_xor_sync \(.*mask 0xffffffff\).*; 2 wait at __syncthreads",
    "lane_outside": "__shfl_xor_sync: lane not in its own mask",
    "masks_differ": "32 wait at __shfl_xor_sync .*mask 0xffffffff.*; 32 wait at __shfl_xor_sync .*mask 0xfffffffe",
    "shuffle_against_barrier": "2 wait at __syncthreads .*; 62 wait at __shfl_down_sync",
    "returned_lane": "33 returned.*; 31 wait at __shfl_sync",
}
OVERRUN = {
    "shared_overrun": "write past shared memory",
    "shared_underrun": "write before shared memory",
    "global_overrun": "write past an array of 192 elements of float32",
    "global_underrun": "write before an array of 192 elements of float32",
    "write_input": "write to an input array of 192 elements of float32",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mistake", DIVERGENCE)
def test_divergence_is_refused(module: ModuleType, mistake: str, seed: int) -> None:
    module.schedule(seed)
    with pytest.raises(RuntimeError, match=f"kernel mistaken, block.*{DIVERGENCE[mistake]}"):
        mistaken(module, mistake)
    assert block_sums(module, 64) and prefix_sum(module, 128), "the emulator is as good as new"


@plain_only
@pytest.mark.parametrize("mistake", OVERRUN)
def test_writes_outside_are_refused(module: ModuleType, mistake: str) -> None:
    with pytest.raises(RuntimeError, match=OVERRUN[mistake]):
        mistaken(module, mistake)
    np.testing.assert_array_equal(mistaken(module, "none"), np.arange(192))


@pytest.mark.parametrize("mistake,places", [("uninitialised", 3), ("unwritten", 32)])
def test_what_was_not_written_is_nan(module: ModuleType, mistake: str, places: int) -> None:
    result = mistaken(module, mistake)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(result)), np.arange(3) * 64 + places)


@pytest.mark.parametrize("workers", [1, 2])
def test_exceptions_reach_the_caller(module: ModuleType, workers: int) -> None:
    for seed in range(3):
        module.schedule(seed, workers=workers)
        with pytest.raises(IndexError, match="thrown by a kernel"):
            mistaken(module, "exception")
        assert block_sums(module, 64)


@pytest.mark.parametrize(
    "threads,shared_bytes,message",
    [(1056, 0, r"block of \(1056, 1, 1\)"), (64, 49153, "49153 bytes"), (576, 0, "grid of .0, 1, 1.")],
)
def test_launch_limits(module: ModuleType, threads: int, shared_bytes: int, message: str) -> None:
    values = np.zeros(1056 if threads > 1024 else 64, np.float32)
    with pytest.raises(RuntimeError, match=message):
        module.mistaken("none", values, values.copy(), threads, shared_bytes)


def test_arrays_are_checked(module: ModuleType) -> None:
    good, result = np.zeros((4, 6), np.float32), np.zeros((6, 4), np.float32)
    for bad in (good.astype(np.float64), np.zeros((4, 12), np.float32)[:, ::2], good[::-1]):
        with pytest.raises(RuntimeError, match="array"):
            module.transpose(bad, result, 4, (4, 4, 1), 0)
    result.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        module.transpose(good, result, 4, (4, 4, 1), 0)


BARRIERS = {
    "block_sums": ("if (lane == 0) partial[warp] = sum;\n  __syncthreads();", "if (lane == 0) partial[warp] = sum;"),
    "transpose": ("  __syncthreads();\n  for (int c = threadIdx.y", "  for (int c = threadIdx.y"),
    "prefix_sum": ("__syncthreads();  // all have read", ""),
    "prefix_sum again": ("__syncthreads();  // all have written", ""),
}


def mutant(folder: Path, *names: str) -> Path:
    return build.mutate(build.HERE, [("small_kernels.cpp", *BARRIERS[name]) for name in names], folder)


@plain_only
def test_removed_barriers_give_wrong_results(tmp_path: Path) -> None:
    first = build.load(BINDING, [mutant(tmp_path / "1", "block_sums", "transpose", "prefix_sum") / KERNELS.name])
    second = build.load(BINDING, [mutant(tmp_path / "2", "prefix_sum again") / KERNELS.name])
    wrong = dict.fromkeys(BARRIERS, 0)
    for seed in range(1, 21):
        first.schedule(seed)
        second.schedule(seed)
        wrong["block_sums"] += not block_sums(first, 128)
        wrong["transpose"] += not transpose(first, (16, 16, 1))
        wrong["prefix_sum"] += not prefix_sum(first, 64)
        wrong["prefix_sum again"] += not prefix_sum(second, 64)
    assert min(wrong.values()) >= 15, wrong


@plain_only
def test_switching_by_ucontext() -> None:
    """What processors other than x86-64 use."""
    module = build.load(BINDING, [KERNELS], flags=["-DRAKD_EMULATE_UCONTEXT"])
    module.schedule(3)
    assert block_sums(module, 1024) and prefix_sum(module, 100)
    with pytest.raises(RuntimeError, match="threads diverge"):
        mistaken(module, "divergent_barrier")
    assert block_sums(module, 64)


ALL_IN_ONE = """
#include "bindings.h"
#include "cuda/platform.h"

__global__ void scale(const float* __restrict__ input, float* __restrict__ output, int64_t count, float factor) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
#pragma unroll
  for (int part = 0; part < 1; ++part) {
    if (i < count) output[i] = factor * input[i];
  }
}

PYBIND11_MODULE(emulated, module) {
  module.def("scale", [](const pybind11::array& x, const pybind11::array& y, double factor) {
    emulator::Buffers buffers;
    const float* input = buffers.in<float>(x);
    float* output = buffers.out<float>(y);
    RAKD_LAUNCH(scale, (x.size() + 63) / 64, 64, 0, nullptr, input, output, x.size(), factor);
    buffers.finish();
  });
}
"""


def test_kernels_in_the_binding(tmp_path: Path) -> None:
    source = tmp_path / "binding.cu"
    source.write_text(ALL_IN_ONE)
    module = build.load(source)
    values = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5).transpose(2, 0, 1)
    result = np.zeros((2, 3, 5), np.float32).transpose(2, 0, 1)  # in memory like the input, as is a channels-last map
    module.scale(values, result, 0.5)
    np.testing.assert_array_equal(result, values / 2)


def test_mutations_must_apply(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 occurrences"):
        build.mutate(build.HERE, [("small_kernels.cpp", "not there", "")], tmp_path / "mutant")


def test_compiler_errors_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("#error this is wrong\n")
    with pytest.raises(build.BuildError, match="this is wrong"):
        build.compile_module(source, [])
