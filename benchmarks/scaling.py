"""``python -m benchmarks.scaling``: time over boxes, bins, samples, channels, image size, threads, as CSV.

More bins and samples also read more of the cells that boxes cover. Two axes therefore vary them where all of these
are read from the first point on: bins with adaptive sampling, and samples of small bins.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import cases
from benchmarks.cases import Case, Protocol
from benchmarks.measure import TRAINING
from benchmarks.session import csv_path, exit_with_errors, run_cases
from benchmarks.workloads import DISTILL_WORKLOADS, Workload

PREFIX = "scaling-"  # of the workload names of these rows
BASE = DISTILL_WORKLOADS["train"]

_Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]
_Chosen = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]


def _image(height: int) -> Workload:
    return replace(BASE, height=height, width=height * BASE.width // BASE.height)


_POINTS: dict[str, tuple[tuple[int, ...], Callable[[int], Workload]]] = {
    "boxes": ((4, 16, 64, 128, 256, 512), lambda value: replace(BASE, boxes_per_image=value)),
    "bins": ((3, 7, 14, 19, 28), lambda value: replace(BASE, output_size=value)),
    "dense-bins": ((3, 7, 14, 19, 28), lambda value: replace(BASE, output_size=value, sampling_ratio=0)),
    "samples": ((1, 2, 3, 4, 8), lambda value: replace(BASE, sampling_ratio=value)),
    "dense-samples": ((2, 3, 4, 8), lambda value: replace(BASE, output_size=28, sampling_ratio=value)),
    "channels": ((32, 64, 128, 256, 512), lambda value: replace(BASE, channels=value)),
    "image": ((256, 384, 512, 768, 1024), _image),
}
AXES = (*_POINTS, "threads")


def thread_counts(cores: int) -> list[int]:
    """List the powers of two up to the cores, and the cores."""
    counts = [1]
    while counts[-1] * 2 < cores:
        counts.append(counts[-1] * 2)
    return counts + [cores] * (cores > 1)


def plan_axis(axis: str, dtype: str, layout: str, threads: int) -> list[Case]:
    """List the cases of one curve.

    Args:
        axis: One of ``AXES``.
        dtype: Of the maps.
        layout: Of the maps.
        threads: Torch's threads, where they are not what varies.

    Returns:
        The cases, in the order of the axis.
    """
    name = PREFIX + axis
    if axis == "threads":
        counts = thread_counts(os.cpu_count() or 1)
        return [Case("distill", name, BASE, dtype, layout, count) for count in counts]
    values, vary = _POINTS[axis]
    return [Case("distill", name, vary(value), dtype, layout, threads) for value in values]


@dataclass(frozen=True)
class Options:
    """Measure how soft_roi_distill scales, forward + backward, around the workload train.

    Attributes:
        axes: What varies: boxes, bins, samples, dense-bins and dense-samples (where all cells of the boxes are read),
            channels, image, threads.
        backends: Backends of rakd_ops (default: the first that runs on the device).
        dtypes: float32, bfloat16, float16.
        layouts: nchw, nhwc (channels-last).
        peers: As for python -m benchmarks.
        device: cpu, cuda, or auto.
        threads: Torch's threads on the CPU; 0 leaves torch's own number.
        repeats: Interleaved rounds.
        most_seconds: A contender that has used so much time in one measurement gets fewer repeats, but at
            least 3.
        seed: Seed of boxes and maps.
        out: Folder of the CSV.
    """

    axes: _Names = AXES
    backends: _Chosen = ()
    dtypes: _Names = ("float32",)
    layouts: _Names = ("nchw", "nhwc")
    peers: _Names = ("torchvision",)
    device: str = "auto"
    threads: int = 0
    repeats: int = 9
    most_seconds: float = 2.0
    seed: int = 0
    out: Path = Path("runs/benchmarks")


def plan(options: Options) -> tuple[list[Case], Protocol]:
    """Turn options into cases and a protocol.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    axes = cases.check_choices("axes", options.axes, AXES)
    cases.check_layouts_and_dtypes(options.layouts, options.dtypes)
    device = cases.check_device(options.device)
    threads = cases.check_threads(options.threads)
    if device == "cuda":
        axes = tuple(axis for axis in axes if axis != "threads")
    protocol = Protocol(
        device=device,
        backends=cases.check_backends(options.backends, device)[: len(options.backends) or 1],
        peers=cases.check_peers("distill", options.peers, device),
        whats=(TRAINING,),
        repeats=options.repeats,
        most_seconds=options.most_seconds,
        seed=options.seed,
    )
    planned = [
        case
        for axis in axes
        for dtype in options.dtypes
        for layout in options.layouts
        for case in plan_axis(axis, dtype, layout, threads)
    ]
    return planned, cases.check_protocol(protocol)


def main() -> None:
    """Measure the curves."""
    options = tyro.cli(Options, prog="python -m benchmarks.scaling")
    planned, protocol = plan(options)
    run_cases(planned, protocol, csv_path(options.out, "scaling", protocol.device))


if __name__ == "__main__":
    exit_with_errors(main)
