"""``python -m benchmarks.roofline CSV... --out DIR``: how near the measured runs come to the machine's limits.

It writes ``roofline.csv`` and ``roofline.png``. A run's place is operations by bytes and operations by second. Bytes
are those that must move (`benchmarks.workloads.count_bytes`). Operations are those of RoIAlign as two small matrices
per box and level, forward and its transpose, each number touched once; an implementation that does more, sample by
sample, still counts as these, and one that shares work between boxes may pass for faster than the machine. The roofs
are the copy bandwidth found in the run and the rate of a large float32 matrix product, measured now with the same
number of threads.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from benchmarks import figures
from benchmarks.results import Row, exit_with_errors, processor, read_all, write_rows
from benchmarks.tables import LAYOUT_NAMES
from benchmarks.timing import time_interleaved, wall_sampler
from benchmarks.workloads import (
    DISTILL_WORKLOADS,
    STRIDES,
    TRAINING,
    Workload,
    bin_support,
    draw_boxes,
    support_cells,
)

MATRIX, MATRIX_REPEATS = 2048, 9
MARKERS = {"nchw": "o", "nhwc": "D"}


@dataclass(frozen=True)
class RooflineRow:
    """One run under the machine's roofs.

    Attributes:
        workload: Its name.
        layout: Of the maps.
        implementation: As measured.
        threads: Torch's threads.
        median_ms: Median time, milliseconds.
        giga_operations: Of the two-matrix form, 10⁹; a multiply-add is two.
        mebibytes: That must move.
        intensity: Operations by byte.
        gflops: 10⁹ operations by second.
        copy_gb_s: Copy bandwidth in that run, 10⁹ bytes read and written by second.
        peak_gflops: Of a matrix product of this size, measured for this file.
        cpu: The processor.
        commit: Of the run.
    """

    workload: str
    layout: str
    implementation: str
    threads: int
    median_ms: float
    giga_operations: float
    mebibytes: float
    intensity: float
    gflops: float
    copy_gb_s: float
    peak_gflops: float
    cpu: str
    commit: str


def count_operations(boxes: Tensor, workload: Workload) -> int:
    """Count the operations of a training step of the distillation loss in the two-matrix form.

    Args:
        boxes: ``[K, 5]``.
        workload: Sizes.

    Returns:
        Multiplications and additions, of all levels, boxes and channels.
    """
    total = 0
    for stride in STRIDES:
        y, x = bin_support(boxes, stride, workload)
        rows = y.any(dim=1).sum(dim=1)
        multiply_adds = rows * x.sum(dim=(1, 2)) + workload.output_size * y.sum(dim=(1, 2))
        squares = 2 * workload.output_size**2 * len(boxes)
        total += 4 * int(multiply_adds.sum()) + squares + support_cells(boxes, stride, workload)
    return total * workload.channels


def measure_peak(threads: int) -> float:
    """Measure operations by second of a float32 matrix product, median of several."""
    torch.set_num_threads(threads)
    a = torch.rand(MATRIX, MATRIX)
    sampler = wall_sampler(lambda: a @ a)
    timing = time_interleaved({"product": sampler}, MATRIX_REPEATS, math.inf, lambda _: None)["product"]
    return 2.0 * MATRIX**3 / (timing.median / 1000.0)


def make_points(rows: Sequence[Row], peaks: dict[int, float], seed: int = 0) -> list[RooflineRow]:
    """Place the rows that are float32 training steps of the standard distillation workloads on the CPU.

    Args:
        rows: Of ``python -m benchmarks``.
        peaks: Operations by second, for each number of threads.
        seed: That the rows' boxes were drawn with.

    Returns:
        The points, in the rows' order.
    """
    operations: dict[str, int] = {}
    points = []
    for row in rows:
        standard = row.op == "distill" and row.workload in DISTILL_WORKLOADS and row.device == "cpu"
        if not standard or row.passes != TRAINING or row.dtype != "float32":
            continue
        if row.workload not in operations:
            workload = DISTILL_WORKLOADS[row.workload]
            boxes = draw_boxes(workload, torch.Generator().manual_seed(seed))
            operations[row.workload] = count_operations(boxes, workload)
        count = operations[row.workload]
        point = RooflineRow(
            workload=row.workload,
            layout=row.layout,
            implementation=row.implementation,
            threads=row.threads,
            median_ms=row.median_ms,
            giga_operations=count / 1e9,
            mebibytes=row.bound_mib,
            intensity=count / (row.bound_mib * 2**20),
            gflops=count / row.median_ms / 1e6,
            copy_gb_s=row.copy_gb_s,
            peak_gflops=peaks[row.threads] / 1e9,
            cpu=row.cpu,
            commit=row.commit,
        )
        points.append(point)
    return points


def draw_roofline(points: Sequence[RooflineRow], row: Row) -> Figure:
    """Draw points of one number of threads under their roofs.

    Args:
        points: At least one.
        row: Where they come from, for the title.
    """
    height = 4.6
    figure = Figure(figsize=(7.6, height))
    axes = figure.subplots()

    def label(text: str, place: tuple[float, float], offset: tuple[float, float], colour: str) -> None:
        axes.annotate(text, place, offset, textcoords="offset points", size=8.5, color=colour, ha="right")

    bandwidth, peak = float(np.median([p.copy_gb_s for p in points])), points[0].peak_gflops
    x = np.geomspace(0.5 * min(p.intensity for p in points), 3.0 * max(p.intensity for p in points), 200)
    axes.plot(x, np.minimum(bandwidth * x, peak), color=figures.INK, linewidth=1.6)
    label(f"a copy, {bandwidth:.0f} GB/s", (x[80], bandwidth * x[80]), (-8, 4), figures.MUTED)
    label(f"matrix product, {peak:.0f} GFLOP/s", (x[-1], peak), (0, 5), figures.MUTED)
    for point in points:
        colour = figures.LOOKS.get(point.implementation, (figures.MUTED, ""))[0]
        axes.plot(point.intensity, point.gflops, MARKERS[point.layout], color=colour, markersize=6.5, mec="white")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name in dict.fromkeys(point.workload for point in points):
        mine = [point for point in points if point.workload == name]
        ours = min((p for p in mine if p.implementation == row.ratio_to), key=lambda p: p.gflops, default=mine[0])
        label(name, (ours.intensity, ours.gflops), (12, -16), figures.INK)
    axes.set_xlabel("operations by byte that must move", size=9, color=figures.INK)
    axes.set_ylabel("GFLOP/s", size=9, color=figures.INK)
    figures.clean_axes(axes, "both")
    figures.write_title(figure, "soft_roi_distill, forward + backward, float32: under the roofs", row)
    names = dict.fromkeys(point.implementation for point in points)
    looks = [figures.LOOKS.get(name, (figures.MUTED, name)) for name in names]
    handles = [Line2D([], [], color=colour, lw=4, label=text) for colour, text in looks]
    for layout in dict.fromkeys(point.layout for point in points):
        handles.append(Line2D([], [], color=figures.MUTED, marker=MARKERS[layout], ls="", label=LAYOUT_NAMES[layout]))
    figures.write_legend(figure, handles)
    top = 1 - (figures.head_height(len(handles)) - 0.15) / height
    figure.subplots_adjust(left=0.1, right=0.97, top=top, bottom=0.12)
    return figure


def main() -> None:
    """Count, measure the peak, write and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Place runs under the roofs.")
    parser.add_argument("csv", nargs="+", type=Path, help="files of python -m benchmarks, measured on this machine")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs' boxes")
    options = parser.parse_args()
    rows = read_all(options.csv)
    if rows[0].cpu != processor():
        raise ValueError(f"csv: expected runs on this machine's {processor()}, got {rows[0].cpu}")
    peaks = {threads: measure_peak(threads) for threads in sorted({row.threads for row in rows})}
    points = make_points(rows, peaks, options.seed)
    if not points:
        raise ValueError("csv: expected float32 training steps of distillation workloads on the CPU, found none")
    write_rows(options.out / "roofline.csv", RooflineRow, points)
    most = max(point.threads for point in points)
    figure = draw_roofline([p for p in points if p.threads == most], next(r for r in rows if r.threads == most))
    figure.savefig(options.out / "roofline.png", dpi=150, facecolor="white")
    print(options.out / "roofline.csv", options.out / "roofline.png", sep="\n")


if __name__ == "__main__":
    exit_with_errors(main)
