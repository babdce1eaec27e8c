"""How it is measured: agreement first, then interleaved timing and peak memory, on CPU and CUDA devices."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rakd_ops
from benchmarks.contenders import Contender

FORWARD = "forward"
TRAINING = "forward+backward"
WHATS = (FORWARD, TRAINING)
LEAST_REPEATS = 3

# Largest difference of outputs and of gradients, relative to the largest value: several times the error of
# torchvision's float32 sample positions; the halves' is that of rounding a gradient to their 8 and 11 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
# The gradient of a mean over K C P² values lies below float16's range; training scales the loss, as here.
LOSS_SCALE = {"float16": 2.0**16}

Advance = Callable[[int], object]


class DisagreementError(ValueError):
    """Two contenders compute different things: their times must not be compared."""


def run_forward(contender: Contender) -> Tensor:
    """Compute the output alone, as in validation: nothing is kept for a backward."""
    with torch.no_grad():
        return contender.forward()


def run_training(contender: Contender, maps: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Compute the output and the maps' gradients, which are allocated anew, as in a training step.

    Args:
        contender: What runs.
        maps: The maps that want gradients.
        upstream: Gradient of the output.

    Returns:
        The gradients.
    """
    return torch.autograd.grad(contender.forward(), list(maps), upstream)


def make_upstream(op: str, contender: Contender, dtype: str) -> Tensor:
    """Make the gradient that flows into the op: the loss scale, or random values for pooled outputs."""
    output = run_forward(contender)
    if op == "distill":
        return torch.full_like(output, LOSS_SCALE.get(dtype, 1.0))
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output.device, output.dtype)


def _difference(value: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    if value.shape != expected.shape:
        return float("inf")
    scale = float(expected.detach().abs().amax()) or 1.0
    error = float((value.detach().to(torch.float64) - expected.detach().to(torch.float64)).abs().amax()) / scale
    return float("inf") if np.isnan(error) else error


def check_agreement(
    contenders: Sequence[Contender], maps: Sequence[Tensor], upstream: Tensor, dtype: str, advance: Advance
) -> None:
    """Run every contender once and compare outputs and gradients with the first one's.

    Args:
        contenders: What will be measured.
        maps: The maps that want gradients.
        upstream: Gradient of the output.
        dtype: The maps' dtype; chooses the tolerance.
        advance: Told of each finished run.

    Raises:
        DisagreementError: A difference exceeds ``TOLERANCE[dtype]``; the message names contenders and place.
    """
    first = contenders[0]
    expected: list[Tensor] = []
    for contender in contenders:
        output = contender.forward()
        gradients = torch.autograd.grad(output, list(maps), upstream)
        values = [output.detach(), *gradients]
        expected = expected or values
        for place, (value, wanted) in enumerate(zip(values, expected, strict=True)):
            error = _difference(value, wanted)
            if error > TOLERANCE[dtype]:
                where = "output" if place == 0 else f"gradient of map {place - 1}"
                raise DisagreementError(
                    f"{contender.name} and {first.name} disagree: the {where} differs by {error:.1e} of its "
                    f"largest value (tolerance {TOLERANCE[dtype]:.0e}); not timed"
                )
        advance(1)


@dataclass(frozen=True)
class Timing:
    """Wall time of one contender (device time on CUDA), milliseconds.

    Attributes:
        median: Median over the repeats.
        p20: 20th percentile.
        p80: 80th percentile.
        samples: The runs these come from, in their order.
    """

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...]

    @property
    def repeats(self) -> int:
        """How many runs there were."""
        return len(self.samples)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]


def _time_once(run: Callable[[], object], cuda: bool) -> float:
    """Milliseconds of one run; what it returns is freed after the clock has stopped."""
    if cuda:
        start, end = (_timing_event() for _ in range(2))
        start.record()
        result = run()
        end.record()
        end.synchronize()
        elapsed = float(start.elapsed_time(end))
    else:
        begin = time.perf_counter()
        result = run()
        elapsed = 1000.0 * (time.perf_counter() - begin)
    del result
    return elapsed


def time_interleaved(
    runs: dict[str, Callable[[], object]], cuda: bool, repeats: int, most_seconds: float, advance: Advance
) -> dict[str, Timing]:
    """Time functions in turn, round after round, after one warm-up round.

    Args:
        runs: What to time, by name.
        cuda: Whether they run on a CUDA device (timed by events).
        repeats: Rounds.
        most_seconds: A function that has used this much time leaves after its ``LEAST_REPEATS``-th run.
        advance: Told of finished (or dropped) runs.

    Returns:
        The timings, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        _time_once(run, cuda)
        advance(1)
    for round_index in range(repeats):
        for name, run in runs.items():
            taken = samples[name]
            if round_index < LEAST_REPEATS or sum(taken) < 1000.0 * most_seconds:
                taken.append(_time_once(run, cuda))
            advance(1)
    timings = {}
    for name, taken in samples.items():
        low, middle, high = (float(value) for value in np.percentile(taken, [20, 50, 80]))
        timings[name] = Timing(middle, low, high, tuple(taken))
    return timings


def _status_mib(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def _trim_heap() -> None:
    """Give freed memory back to the system, so that its reuse counts as growth."""
    rakd_ops.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure_peak_mib(run: Callable[[], object], cuda: bool) -> float | None:
    """Measure by how much one run raises peak memory above what stood before it.

    On CUDA this is what torch allocated. On the CPU it is the growth of the process's resident memory, read
    from Linux's resettable high-water mark.

    Args:
        run: What to measure; its result counts, while it is alive.
        cuda: Whether it runs on a CUDA device.

    Returns:
        MiB, or None where the system does not tell.
    """
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return (peak - before) / 2**20
    _trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    resident = _status_mib("VmRSS")
    result = run()
    highest = _status_mib("VmHWM")
    del result
    return None if resident is None or highest is None else max(0.0, highest - resident)
