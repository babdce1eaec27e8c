"""How things are timed: in turns, on the CPU by the clock, on a GPU as three numbers; peak memory; copy bandwidth.

The three numbers of a step on a GPU: *host*, the time until the call returns, the device idle before it; *device*, the
time of its kernels in a replayed CUDA graph, with other memory written before each replay so that the L2 cache is cold
(where a graph cannot be captured, the sum of the profiler's kernels); *end to end*, steps that follow one another.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rakd_ops

MIN_REPEATS = 3
CALLS_IN_A_ROW = 10  # of an end-to-end sample
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
CPU_COPY_MIB, CUDA_COPY_MIB, COPY_REPEATS = 256, 1024, 9

Step = Callable[[], object]
Sampler = Callable[[], float]
"""Runs a step and returns milliseconds."""
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Times of one implementation, milliseconds; or ratios."""

    median: float
    p20: float  # 20th percentile
    p80: float  # 80th percentile
    samples: tuple[float, ...]  # these come from, in their order

    @property
    def repeats(self) -> int:
        """How many runs there were."""
        return len(self.samples)

    def columns(self) -> dict[str, Any]:
        """Return the columns of a row of milliseconds."""
        return {"median_ms": self.median, "p20_ms": self.p20, "p80_ms": self.p80}


def summarise(samples: Iterable[float]) -> Timing:
    """Return median and percentiles of samples."""
    taken = tuple(samples)
    low, middle, high = (float(value) for value in np.percentile(taken, [20, 50, 80]))
    return Timing(middle, low, high, taken)


def compare(timing: Timing, base: Timing) -> Timing:
    """Return the ratios of the times over those of ``base``.

    Rounds are compared one by one: a slow minute of the machine slows both steps of a round. Rounds that only one of
    them took are left out.
    """
    return summarise(mine / other for mine, other in zip(timing.samples, base.samples, strict=False))


def time_interleaved(
    samplers: dict[str, Sampler], repeats: int, max_seconds: float, advance: Advance
) -> dict[str, Timing]:
    """Take samples in turn, round after round, after one warm-up round.

    A sampler that has used ``max_seconds`` leaves after its ``MIN_REPEATS``-th run. ``advance`` is told of finished (or
    dropped) runs.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for sampler in samplers.values():
        sampler()
        advance(1)
    for round_index in range(repeats):
        for name, sampler in samplers.items():
            taken = samples[name]
            if round_index < MIN_REPEATS or sum(taken) < 1000.0 * max_seconds:
                taken.append(sampler())
            advance(1)
    return {name: summarise(taken) for name, taken in samples.items()}


def wall_sampler(step: Step) -> Sampler:
    """Time a step by the clock; its result is freed after the clock has stopped."""

    def sample() -> float:
        begin = time.perf_counter()
        result = step()
        elapsed = 1000.0 * (time.perf_counter() - begin)
        del result
        return elapsed

    return sample


def host_sampler(step: Step) -> Sampler:
    """Time until a call that works on a GPU returns, the device idle before it."""
    wall = wall_sampler(step)

    def sample() -> float:
        torch.cuda.synchronize()
        return wall()

    return sample


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]


def _between_events(run: Step) -> float:
    begin, end = _timing_event(), _timing_event()
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return float(begin.elapsed_time(end))


def end_to_end_sampler(step: Step) -> Sampler:
    """Time a step among others that follow one another on a GPU."""

    def calls() -> None:
        for _ in range(CALLS_IN_A_ROW):
            step()

    def sample() -> float:
        torch.cuda.synchronize()
        return _between_events(calls) / CALLS_IN_A_ROW

    return sample


def list_kernels(step: Step) -> list[tuple[str, float]]:
    """Return name and microseconds of all that one step runs on the GPU, copies and fills included."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    return [(e.name, e.time_range.elapsed_us()) for e in events if not getattr(e, "is_user_annotation", False)]


def _capture(step: Step) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def device_sampler(step: Step) -> tuple[Sampler | None, str]:
    """Time the kernels of a step on a GPU with a cold L2 cache.

    Returns:
        The sampler, and how it measures: ``"graph"``, or ``"profiler"`` with the reason that there is no graph. No
        sampler where the profiler sees no kernel either, as where the system keeps its counters from users.
    """
    cold = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    try:
        graph = _capture(step)
    except Exception as error:
        torch.cuda.synchronize()
        reason = f"({type(error).__name__}: {str(error).splitlines()[0][:80]})"
        if not list_kernels(step):
            return None, f"none: the profiler sees no kernel, and no graph {reason}"
        return lambda: sum(us for _, us in list_kernels(step)) / 1000.0, f"profiler {reason}"

    def sample() -> float:
        cold.zero_()
        return _between_events(graph.replay)

    return sample, "graph"


def status_mib(key: str) -> float:
    """Return memory of this process, as Linux tells it: ``"VmRSS"``, resident, or ``"VmHWM"``, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def _trim_heap() -> None:
    """Give freed memory back to the system, so that its reuse counts as growth."""
    rakd_ops.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure_peak_mib(step: Step, cuda: bool) -> float | None:
    """Measure by how many MiB one step, its result included, raises peak memory; None where the system does not tell.

    On CUDA this counts torch's allocations. On the CPU it is the growth of the process's resident memory, read from
    Linux's resettable high-water mark.
    """
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return (peak - before) / 2**20
    gc.collect()  # garbage that goes during the step would hide what the step takes
    _trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    resident = status_mib("VmRSS")
    result = step()
    highest = status_mib("VmHWM")
    del result
    return max(0.0, highest - resident)


def measure_copy_bandwidth(device: str, mib: int | None = None) -> float:
    """Measure how many bytes a second torch reads and writes as it copies a large buffer into another.

    Both are touched before; the median of several copies counts. ``mib`` is the size of each, by default by device.
    """
    cuda = torch.device(device).type == "cuda"
    count = (mib or (CUDA_COPY_MIB if cuda else CPU_COPY_MIB)) * 2**20 // 4
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)

    def copy() -> None:
        target.copy_(source)

    sample = end_to_end_sampler(copy) if cuda else wall_sampler(copy)
    timing = time_interleaved({"copy": sample}, COPY_REPEATS, float("inf"), lambda _: None)["copy"]
    return 2 * 4 * count / (timing.median / 1000.0)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.namespace] += 1
        return func(*args, **(kwargs or {}))


def count_dispatched(step: Step) -> tuple[int, int]:
    """Count the operations that one step dispatches: torch's, and those of ``rakd_ops``."""
    with _Counter() as counter:
        step()
    own = counter.names.pop("rakd_ops", 0)
    return counter.names.total(), own
