"""``python -m benchmarks.scaling``: time over boxes, bins, samples, channels, image size, threads, as CSV.

More bins and samples also read more of the cells that boxes cover. Two axes therefore vary them where all of these
are read from the first point on: bins with adaptive sampling, and samples of small bins.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import options as checks
from benchmarks.ops import Case, Protocol, run_cases
from benchmarks.results import csv_path, exit_with_errors
from benchmarks.workloads import DISTILL_WORKLOADS, TRAINING, Workload

PREFIX = "scaling-"  # of the workload names of these rows
BASE = DISTILL_WORKLOADS["train"]


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
        threads: Torch's threads, where they do not vary.

    Returns:
        The cases, in the order of the axis.
    """
    name = PREFIX + axis
    if axis == "threads":
        counts = thread_counts(os.cpu_count() or 1)
        return [Case("distill", name, BASE, dtype, layout, count) for count in counts]
    values, vary = _POINTS[axis]
    return [Case("distill", name, vary(value), dtype, layout, threads) for value in values]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Measure how soft_roi_distill scales, forward + backward, around the workload train, beside "
        "torchvision; the first backend that runs on the device unless others are named.",
    )
    checks.add_names(parser, "axes", f"of {', '.join(AXES)} (default: all)", AXES)
    checks.add_common(parser, repeats=9, max_seconds=2.0)
    parser.set_defaults(baselines=("torchvision",))
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> tuple[list[Case], Protocol]:
    """Turn options into cases and a protocol.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    axes = checks.check_choices("axes", options.axes, AXES)
    protocol = checks.make_protocol(options, "distill")
    backends = protocol.backends[: len(options.backends) or 1]
    threads = checks.check_threads(options.threads)
    cases = [
        case
        for axis in axes
        if not (protocol.cuda and axis == "threads")
        for dtype in options.dtypes
        for layout in options.layouts
        for case in plan_axis(axis, dtype, layout, threads)
    ]
    return cases, replace(protocol, backends=backends, passes=(TRAINING,))


def main() -> None:
    """Measure the curves."""
    options = parse()
    cases, protocol = plan(options)
    run_cases(cases, protocol, csv_path(options.out, "scaling", protocol.device))


if __name__ == "__main__":
    exit_with_errors(main)
