"""``python -m benchmarks.roofline CSV... --out DIR``: how near the measured runs come to what the machine can do.

Written are ``roofline.csv`` and ``roofline.png``. A run's place is operations by bytes and operations by second. Bytes
are the floor's (`benchmarks.floor`). Operations are those of RoIAlign as two small matrices per box and level, forward
and its transpose, each number touched once; an implementation that does more, sample by sample, still counts as these,
and one that shares work between boxes may pass for faster than the machine. The roofs are the copy bandwidth found in
the run and the rate of a large float32 matrix product, measured now with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from benchmarks import style
from benchmarks.floor import touched_cells
from benchmarks.measure import TRAINING, time_interleaved
from benchmarks.records import RooflineRow, Row, read_all, write_rows
from benchmarks.session import exit_with_errors
from benchmarks.workloads import DISTILL_WORKLOADS, STRIDES, Workload, draw_boxes
from rakd.study.versions import processor
from rakd_ops.reference import axis_matrix

MATRIX, MATRIX_REPEATS = 2048, 9
MARKERS = {"nchw": "o", "nhwc": "D"}


def count_operations(boxes: Tensor, workload: Workload) -> int:
    """Count the operations of a training step of the distillation loss in the two-matrix form.

    Args:
        boxes: ``[K, 5]``.
        workload: Sizes.

    Returns:
        Multiplications and additions, of all levels, boxes and channels.
    """
    boxes = boxes.double()
    bins, samples = workload.output_size, workload.sampling_ratio
    total = 0
    for stride in STRIDES:
        height, width = workload.map_size(stride)
        y = axis_matrix(boxes[:, 2], boxes[:, 4], stride, height, bins, samples) != 0
        x = axis_matrix(boxes[:, 1], boxes[:, 3], stride, width, bins, samples) != 0
        rows = y.any(dim=1).sum(dim=1)
        multiply_adds = rows * x.sum(dim=(1, 2)) + bins * y.sum(dim=(1, 2))
        squares = 2 * bins * bins * len(boxes)
        total += 4 * int(multiply_adds.sum()) + squares + touched_cells(boxes, stride, workload)
    return total * workload.channels


def measure_peak(threads: int) -> float:
    """Measure operations by second of a float32 matrix product, median of several."""
    torch.set_num_threads(threads)
    a = torch.rand(MATRIX, MATRIX)
    timings = time_interleaved({"product": lambda: a @ a}, False, MATRIX_REPEATS, math.inf, lambda _: None)
    return 2.0 * MATRIX**3 / (timings["product"].median / 1000.0)


def make_points(rows: Sequence[Row], peaks: dict[int, float], seed: int = 0) -> list[RooflineRow]:
    """Place the rows that are float32 training steps of the standard distillation workloads.

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
        if not standard or row.what != TRAINING or row.dtype != "float32":
            continue
        if row.workload not in operations:
            workload = DISTILL_WORKLOADS[row.workload]
            boxes = draw_boxes(workload, torch.Generator().manual_seed(seed))
            operations[row.workload] = count_operations(boxes, workload)
        count, size = operations[row.workload], row.floor_mib * 2**20
        point = RooflineRow(
            workload=row.workload,
            layout=row.layout,
            contender=row.contender,
            threads=row.threads,
            median_ms=row.median_ms,
            giga_operations=count / 1e9,
            mebibytes=row.floor_mib,
            intensity=count / size,
            gflops=count / row.median_ms / 1e6,
            copy_gb_s=row.copy_gb_s,
            peak_gflops=peaks[row.threads] / 1e9,
            cpu=row.cpu,
            commit=row.commit,
        )
        points.append(point)
    return points


def _label(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    colour: str,
    align: Literal["center", "right"],
) -> None:
    axes.annotate(text, place, offset, textcoords="offset points", size=8.5, color=colour, ha=align)


def draw_roofline(points: Sequence[RooflineRow], row: Row) -> Figure:
    """Draw points of one number of threads under their roofs.

    Args:
        points: At least one.
        row: Where they come from, for the title.
    """
    height = 4.6
    figure = Figure(figsize=(7.6, height))
    axes = figure.subplots()
    bandwidth, peak = float(np.median([p.copy_gb_s for p in points])), points[0].peak_gflops
    x = np.geomspace(0.5 * min(p.intensity for p in points), 3.0 * max(p.intensity for p in points), 200)
    axes.plot(x, np.minimum(bandwidth * x, peak), color=style.INK, linewidth=1.6)
    _label(axes, f"a copy, {bandwidth:.0f} GB/s", (x[80], bandwidth * x[80]), (-8, 4), style.MUTED, "right")
    _label(axes, f"matrix product, {peak:.0f} GFLOP/s", (x[-1], peak), (0, 5), style.MUTED, "right")
    for point in points:
        colour = style.COLOURS.get(point.contender, style.MUTED)
        axes.plot(point.intensity, point.gflops, MARKERS[point.layout], color=colour, markersize=6.5, mec="white")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name in dict.fromkeys(point.workload for point in points):
        mine = [point for point in points if point.workload == name]
        subject = min((p for p in mine if p.contender == row.ratio_to), key=lambda p: p.gflops, default=mine[0])
        _label(axes, name, (subject.intensity, subject.gflops), (0, -16), style.INK, "center")
    axes.set_xlabel("operations by byte that must move", size=9, color=style.INK)
    axes.set_ylabel("GFLOP/s", size=9, color=style.INK)
    style.clean_axes(axes, "both")
    style.write_title(figure, "soft_roi_distill, forward + backward, float32: under the roofs", row)
    contenders = dict.fromkeys(point.contender for point in points)
    handles: list[Line2D] = [
        Line2D([], [], color=style.COLOURS.get(c, style.MUTED), lw=4, label=style.NAMES.get(c, c)) for c in contenders
    ]
    handles += [
        Line2D([], [], color=style.MUTED, marker=MARKERS[layout], ls="", label=style.LAYOUT_NAMES[layout])
        for layout in dict.fromkeys(point.layout for point in points)
    ]
    style.write_legend(figure, [*handles])
    top = 1 - (style.head_height(len(handles)) - 0.15) / height
    figure.subplots_adjust(left=0.1, right=0.97, top=top, bottom=0.12)
    return figure


@dataclass(frozen=True)
class Options:
    """Place measured runs under the machine's roofs.

    Attributes:
        csv: Files of python -m benchmarks, measured on this machine.
        out: Folder of roofline.csv and roofline.png.
        seed: Seed of the runs' boxes.
    """

    csv: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CSV ...")]
    out: Path = Path("runs/benchmarks")
    seed: int = 0


def main() -> None:
    """Count, measure the peak, write and draw."""
    options = tyro.cli(Options, prog="python -m benchmarks.roofline")
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
