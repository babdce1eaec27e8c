"""Options that the programs share, and their checks. Every error names the option, the expectation and the value."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.implementations import BASELINES, COMPILED, ROWS
from benchmarks.ops import Protocol
from benchmarks.timing import MIN_REPEATS
from benchmarks.workloads import DTYPES, LAYOUTS, PASSES, TRAINING
from rakd_ops import available_backends

SERVED_BY = {"cpu": ("cpu", "reference"), "cuda": ("cuda", f"cuda{ROWS}", "triton", "reference")}
_QUICK_REPEATS, _QUICK_SECONDS = 5, 1.0


def add_names(parser: argparse.ArgumentParser, name: str, text: str, default: Sequence[str] = ()) -> None:
    """Add an option that takes names."""
    parser.add_argument(f"--{name}", nargs="+", metavar="NAME", default=tuple(default), help=text)


def add_common(parser: argparse.ArgumentParser, repeats: int, max_seconds: float | None) -> None:
    """Add the options of every program that measures; ``max_seconds`` where it measures ops."""
    add_names(parser, "backends", "backends of rakd_ops: cpu, cuda, cuda-rows (boxes as one tensor instead of a list), "
              "triton, reference (default: all that run on the device)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads on the CPU; 0: torch's own number")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"interleaved rounds (default: {repeats})")
    parser.add_argument("--seed", type=int, default=0, help="seed of boxes and maps")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the CSV")
    if max_seconds is None:
        return
    add_names(parser, "dtypes", "float32, bfloat16, float16", ("float32",))
    add_names(parser, "layouts", "nchw, nhwc (channels-last)", ("nchw", "nhwc"))
    add_names(parser, "baselines", "of distill torchvision, difference (one RoIAlign of the difference map), "
              "torchvision-compiled, difference-compiled; of align torchvision; or none (default: all)")  # fmt: skip
    parser.add_argument("--max-seconds", type=float, default=max_seconds, help="an implementation that has used so "
                        f"much in one measurement gets fewer repeats, at least {MIN_REPEATS}")  # fmt: skip


def check_choices(name: str, values: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Return ``values`` if there is at least one and all are among ``choices``.

    Raises:
        ValueError: They are not; the message names the option.
    """
    listed = ", ".join(choices)
    if not values:
        raise ValueError(f"{name}: expected at least one of {listed}")
    for value in values:
        if value not in choices:
            raise ValueError(f"{name}: expected some of {listed}, got {value!r}")
    return tuple(dict.fromkeys(values))


def check_device(device: str) -> str:
    """Resolve ``"auto"``, and refuse a device that is not there."""
    check_choices("device", [device], ["auto", "cpu", "cuda"])
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError("device: 'cuda' was asked for, but torch finds no CUDA device")
    return ("cuda" if there else "cpu") if device == "auto" else device


def check_backends(backends: Sequence[str], device: str) -> tuple[str, ...]:
    """Return the backends asked for, or without any all that run on the device; refuse those that cannot."""
    state = available_backends()
    reasons = {name: state[name.removesuffix(ROWS)] for names in SERVED_BY.values() for name in names}
    if not backends:
        return tuple(name for name in SERVED_BY[device] if reasons[name] is True)
    chosen = check_choices("backends", backends, list(reasons))
    for name in chosen:
        if reasons[name] is not True:
            raise ValueError(f"backends: {name!r} cannot run here: {reasons[name]}")
        if name not in SERVED_BY[device]:
            raise ValueError(f"backends: {name!r} takes no tensors on the device {device!r}")
    return chosen


def check_threads(threads: int) -> int:
    """Return the number of threads, torch's own for 0."""
    if threads < 0:
        raise ValueError(f"threads: expected a positive number, or 0 for torch's own, got {threads}")
    return threads or torch.get_num_threads()


def check_minimum(name: str, value: float, minimum: float) -> None:
    """Refuse a number below ``minimum``.

    Raises:
        ValueError: It is; the message names the option.
    """
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum:g}, got {value:g}")


def make_protocol(options: argparse.Namespace, op: str, quick: bool = False) -> Protocol:
    """Turn the options of ``add_common`` into a protocol.

    Args:
        options: The command line.
        op: ``"distill"`` or ``"align"``.
        quick: Forward + backward alone, few repeats, no compiled baselines and no reference unless named.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    check_choices("layouts", options.layouts, list(LAYOUTS))
    check_choices("dtypes", options.dtypes, list(DTYPES))
    check_minimum("repeats", options.repeats, MIN_REPEATS)
    if options.max_seconds <= 0:
        raise ValueError(f"max_seconds: expected a positive number, got {options.max_seconds}")
    device = check_device(options.device)
    backends = check_backends(options.backends, device)
    baselines = BASELINES[op]
    if tuple(options.baselines) == ("none",):
        baselines = ()
    elif options.baselines:
        baselines = check_choices("baselines", options.baselines, baselines)
    elif quick:
        baselines = tuple(name for name in baselines if not name.endswith(COMPILED))
    if quick and not options.backends:
        backends = tuple(name for name in backends if name != "reference") or backends
    return Protocol(
        device=device,
        backends=backends,
        baselines=baselines,
        passes=(TRAINING,) if quick else PASSES,
        repeats=min(options.repeats, _QUICK_REPEATS) if quick else options.repeats,
        max_seconds=min(options.max_seconds, _QUICK_SECONDS) if quick else options.max_seconds,
        seed=options.seed,
    )
