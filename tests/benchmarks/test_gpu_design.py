"""The model of the CUDA designs counts what dense matrices show; tests/emulator/test_design.py has the kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import gpu_counts, gpu_design
from benchmarks.resources import count_instructions, plain_name
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
        assert torch.equal(gpu_counts.touches(low, high, stride, 9, 3, samples), weighed)


def test_operator_entries_and_cells() -> None:
    """Against the operator of each level as a dense matrix, of which weights are ones where a bin reads a cell."""
    patches = gpu_counts.list_patches(SMALL, small_boxes())
    entries = cells = added = 0
    for patch in patches:
        boxes = [torch.kron(y.float(), x.float()) for y, x in zip(patch.y, patch.x, strict=True)]  # [P * P, H * W]
        per_box = [bins.T @ bins > 0 for bins in boxes]
        added += sum(int(operator.sum()) for operator in per_box)
        entries += int(torch.stack(per_box).any(0).sum())
        cells += int(torch.cat(boxes).any(0).sum())
    assembled = gpu_counts.assembled_work(patches)
    assert (assembled.entries, assembled.once) == (entries, added)
    assert gpu_counts.touched(patches)[0] == cells


def test_passes_of_the_gram_form() -> None:
    """Its multiply-adds are those of the bands, whatever the tiles; all is staged here, and loaded once a tile."""
    patches = gpu_counts.list_patches(SMALL, small_boxes())
    work = gpu_counts.gram_work(SMALL, patches)
    along_y = along_x = 0
    for patch in patches:
        for y, x in zip(patch.y.float(), patch.x.float(), strict=True):
            bands_y, bands_x = (y.T @ y > 0), (x.T @ x > 0)
            along_y += int(bands_y.sum()) * int(x.any(0).sum())
            for tile in bands_y.split(gpu_counts.GRAM_ROWS):
                along_x += int(tile.any(0).sum()) * int(bands_x.sum())
    assert work.shared == along_x and work.multiply_adds == along_x + along_y + work.loads // 2


def test_rows() -> None:
    pooled, gram, assembled = gpu_design.model("small", SMALL, small_boxes(), gpu_design.Machine())
    assert pooled.workspace_mb == pytest.approx(5 * 4 * 9 * 32 * 4 / 1e6)
    assert pooled.shipped and not gram.shipped and not assembled.shipped
    assert pooled.gradient_mb == pytest.approx((16 * 32 + 8 * 16 + 4 * 8 + 2 * 4) * 32 * 4 / 1e6)
    assert pooled.map_mb == gram.map_mb == assembled.map_mb
    times = (pooled.memory_us, pooled.cache_us, pooled.compute_us, pooled.issue_us)
    assert pooled.bound_us == pytest.approx(5.0 + max(times))
    # A workspace that no cache holds is written to memory and read back.
    without = gpu_design.model("small", SMALL, small_boxes(), dataclasses.replace(gpu_design.Machine(), cache_bytes=0))
    assert without[0].memory_us == pytest.approx(pooled.memory_us + 2 * pooled.workspace_mb / 4.3)
    assert len(gpu_design.to_csv([pooled, gram]).splitlines()) == 3


def test_kernel_names() -> None:
    assert plain_name("_ZN4rakd3gpu6spreadIfEEvNS0_6SpreadIT_EE") == "spread<float>"
    assert plain_name("_ZN4rakd3gpu12distill_poolI6__halfLb1EEEvNS0_11DistillPoolIT_EE") == "distill_pool<half, true>"


def test_instructions_are_counted() -> None:
    lines = "\n".join(
        f"        /*{i:04x}*/   {text} ;" for i, text in enumerate(("@!P0 FFMA R0, R1", "LDG.E R2, [R4]"))
    )
    dump = f"Fatbin elf code:\narch = sm_90\n\tFunction : _ZN4rakd3gpu6spreadIfEEvNS0_6SpreadIT_EE\n{lines}\n"
    assert count_instructions(dump)["sm_90", "spread<float>"] == {"FFMA": 1, "LDG": 1}
