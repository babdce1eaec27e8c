"""The bytes that must move, on cases counted by hand."""

from __future__ import annotations

import torch

from benchmarks.timing import measure_copy_bandwidth
from benchmarks.workloads import BoundBytes, Workload, count_bytes, support_cells

# One bin with one sample, at the box's centre: pixel 12, that is cell 2.5 at stride 4 (cells 2 and 3), cell
# 1 at stride 8 (that alone), cell 0.25 at stride 16 (0 and 1), cell -0.125 at stride 32 (clamped to cell 0).
ONE = Workload(1, 1, 1, "uniform", channels=3, height=64, width=64, sampling_ratio=1)
BOX = torch.tensor([[0.0, 8.0, 8.0, 16.0, 16.0]])
CELLS = {4: 4, 8: 1, 16: 4, 32: 1}
DENSE = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2


def test_cells_of_one_box() -> None:
    assert {stride: support_cells(BOX, stride, ONE) for stride in CELLS} == CELLS


def test_overlapping_boxes_count_once_and_images_apart() -> None:
    two = Workload(2, 2, 1, "uniform", channels=3, height=64, width=64, sampling_ratio=1)
    moved = BOX + torch.tensor([0.0, 4.0, 0.0, 4.0, 0.0])  # one cell further right at stride 4
    assert support_cells(torch.cat([BOX, BOX]), 4, two) == 4
    assert support_cells(torch.cat([BOX, moved]), 4, two) == 6
    other = BOX + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    assert support_cells(torch.cat([BOX, other]), 4, two) == 8
    assert support_cells(BOX[:0], 4, two) == 0


def test_distill_bytes() -> None:
    read = 2 * sum(CELLS.values()) * 3 * 4
    assert count_bytes("distill", BOX, ONE, "float32") == BoundBytes(read, read + DENSE * 3 * 4)
    assert count_bytes("distill", BOX, ONE, "bfloat16") == BoundBytes(read // 2, (read + DENSE * 3 * 4) // 2)


def test_align_bytes_read_each_box_at_its_level_only() -> None:
    read, output = CELLS[4] * 3 * 4, 3 * 4
    expected = BoundBytes(read + output, read + 2 * output + DENSE * 3 * 4)
    assert count_bytes("align", BOX, ONE, "float32") == expected


def test_copy_bandwidth_is_plausible() -> None:
    assert 1e7 < measure_copy_bandwidth("cpu", mib=1) < 1e14
