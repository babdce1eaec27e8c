"""Operations counted for the roofline, against counting them one by one; and which rows get a place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.results import Row, read_rows, write_rows
from benchmarks.roofline import RooflineRow, count_operations, draw_roofline, make_points
from benchmarks.workloads import STRIDES, Workload, draw_boxes
from rakd_ops.reference import axis_matrix


def count_one_by_one(boxes: torch.Tensor, workload: Workload) -> int:
    """Perform the two-matrix form on numbers that are only counted."""
    bins, samples = workload.output_size, workload.sampling_ratio
    operations = 0
    for stride in STRIDES:
        height, width = workload.map_size(stride)
        touched = torch.zeros(workload.batch, height, width, dtype=torch.bool)
        for image, x1, y1, x2, y2 in boxes.double().tolist():
            ends = [torch.tensor([v], dtype=torch.float64) for v in (y1, y2, x1, x2)]
            y = axis_matrix(ends[0], ends[1], stride, height, bins, samples)[0]
            x = axis_matrix(ends[2], ends[3], stride, width, bins, samples)[0]
            rows, columns = y.any(dim=0), x.any(dim=0)
            touched[int(image)] |= rows[:, None] & columns[None, :]
            for _ in range(int(rows.sum())):  # every touched row is weighed by every column of bins, and back
                operations += 2 * 2 * int((x != 0).sum())
            for _ in range(bins):  # every column of bins by every bin of y, and back
                operations += 2 * 2 * int((y != 0).sum())
            operations += 2 * bins * bins
        operations += int(touched.sum())
    return operations * workload.channels


def test_operations_are_those_of_the_two_matrix_form() -> None:
    workload = Workload(2, 5, 3, "proposals", channels=7, height=96, width=160)
    boxes = draw_boxes(workload, torch.Generator().manual_seed(3))
    assert count_operations(boxes, workload) == count_one_by_one(boxes, workload)


def test_only_standard_training_steps_in_float32_get_a_place(make_row: Callable[..., Row], tmp_path: Path) -> None:
    row = make_row(workload="gt", boxes=16)
    others = [
        make_row(workload="gt", passes="forward"),
        make_row(workload="gt", dtype="bfloat16"),
        make_row(workload="scaling-boxes"),
        make_row(op="align", workload="pool"),
        make_row(workload="gt", device="NVIDIA H100"),
    ]
    points = make_points([*others, row], {2: 1e11})
    assert [point.workload for point in points] == ["gt"]
    point = points[0]
    assert point.gflops == pytest.approx(point.giga_operations / (row.median_ms / 1000.0))
    assert point.intensity == pytest.approx(1e9 * point.giga_operations / (2**20 * row.bound_mib))
    assert point.peak_gflops == 100.0
    write_rows(tmp_path / "roofline.csv", RooflineRow, points)
    assert read_rows(tmp_path / "roofline.csv", RooflineRow)[0].workload == "gt"
    draw_roofline(points, row).savefig(tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
