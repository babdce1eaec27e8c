"""The model of the CUDA designs counts what dense matrices show; tests/emulator/test_design.py has the kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import gpu_design
from benchmarks.resources import plain_name
from benchmarks.workloads import STRIDES, Workload, draw_boxes
from rakd_ops.reference import axis_matrix

SMALL = Workload(1, 5, 3, "objects", channels=32, height=64, width=128)


def small_boxes() -> torch.Tensor:
    return draw_boxes(SMALL, torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_cells_are_those_of_the_reference(samples: int) -> None:
    boxes = small_boxes() + 8.0 * torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    low, high = boxes[:, 1], boxes[:, 3]
    for stride in STRIDES:
        weighed = axis_matrix(low, high, stride, 9, 3, samples) != 0
        assert torch.equal(gpu_design.touches(low, high, stride, 9, 3, samples), weighed)


def test_operator_entries_and_cells() -> None:
    """Against the operator of each level as a dense matrix, of which weights are ones where a bin reads a cell."""
    patches = gpu_design.list_patches(SMALL, small_boxes())
    entries = cells = added = 0
    for patch in patches:
        boxes = [torch.kron(y.float(), x.float()) for y, x in zip(patch.y, patch.x, strict=True)]  # [P * P, H * W]
        per_box = [bins.T @ bins > 0 for bins in boxes]
        added += sum(int(operator.sum()) for operator in per_box)
        entries += int(torch.stack(per_box).any(0).sum())
        cells += int(torch.cat(boxes).any(0).sum())
    _, assembled = gpu_design._gram(patches)
    assert (assembled.entries, assembled.once) == (entries, added)
    assert gpu_design._touched(patches)[0] == cells


def test_rows() -> None:
    pooled, factors, assembled = gpu_design.model("small", SMALL, small_boxes(), gpu_design.Machine())
    assert pooled.workspace_mb == pytest.approx(5 * 4 * 9 * 32 * 4 / 1e6) and factors.workspace_mb == 0.0
    assert pooled.gradient_mb == pytest.approx((16 * 32 + 8 * 16 + 4 * 8 + 2 * 4) * 32 * 4 / 1e6)
    assert pooled.map_mb == factors.map_mb == assembled.map_mb
    assert pooled.bound_us == pytest.approx(5.0 + max(pooled.memory_us, pooled.cache_us, pooled.compute_us))
    # A workspace that no cache holds is written to memory and read back.
    without = gpu_design.model("small", SMALL, small_boxes(), dataclasses.replace(gpu_design.Machine(), cache_bytes=0))
    assert without[0].memory_us == pytest.approx(pooled.memory_us + 2 * pooled.workspace_mb / 4.3)
    assert len(gpu_design.to_csv([pooled, factors]).splitlines()) == 3


def test_kernel_names() -> None:
    assert plain_name("_ZN4rakd3gpu6spreadIfEEvNS0_6SpreadIT_EE") == "spread<float>"
    assert plain_name("_ZN4rakd3gpu12distill_poolI6__halfLb1EEEvNS0_11DistillPoolIT_EE") == "distill_pool<half, true>"
