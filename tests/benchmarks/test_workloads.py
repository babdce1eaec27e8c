"""The workloads are what they are said to be: sizes, boxes, tensors."""

from __future__ import annotations

import pytest
import torch

from benchmarks.workloads import (
    DISTILL_WORKLOADS,
    DTYPES,
    LAYOUTS,
    STRIDES,
    WORKLOADS,
    Workload,
    draw_boxes,
    draw_objects,
    draw_proposals,
    draw_uniform,
    make_inputs,
)

TABLE = {  # images, boxes, bins
    "train": (2, 256, 7),
    "train19": (2, 256, 19),
    "gt": (2, 16, 7),
    "large": (2, 256, 7),
    "batch8": (8, 1024, 7),
}
MICRO = Workload(2, 5, 3, "proposals", channels=4, height=64, width=96)


def test_sizes_match_the_published_table() -> None:
    assert {name: (w.batch, w.boxes, w.output_size) for name, w in DISTILL_WORKLOADS.items()} == TABLE
    for workload in DISTILL_WORKLOADS.values():
        assert (workload.channels, workload.height, workload.width, workload.sampling_ratio) == (
            256,
            512,
            1760,
            2,
        )
    assert STRIDES == (4, 8, 16, 32)
    assert DISTILL_WORKLOADS["train"].map_size(32) == (16, 55)
    assert {w.boxes for w in WORKLOADS["align"].values()} == {1000}


@pytest.mark.parametrize("name", list(TABLE))
def test_boxes_are_counted_per_image_and_finite(name: str) -> None:
    workload = DISTILL_WORKLOADS[name]
    boxes = draw_boxes(workload, torch.Generator().manual_seed(3))
    assert boxes.shape == (workload.boxes, 5)
    assert boxes.dtype == torch.float32
    assert torch.isfinite(boxes).all()
    assert (boxes[:, 3] > boxes[:, 1]).all()
    assert (boxes[:, 4] > boxes[:, 2]).all()
    counts = torch.bincount(boxes[:, 0].long(), minlength=workload.batch)
    assert counts.tolist() == [workload.boxes_per_image] * workload.batch


def test_objects_have_the_published_heights_and_aspect_ratios() -> None:
    workload = DISTILL_WORKLOADS["gt"]
    boxes = draw_objects(4000, workload, torch.Generator().manual_seed(0))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert height.min() >= 25 and height.max() <= 250
    assert height.min() < 27 and height.max() > 248
    aspect = width / height
    assert aspect.min() >= 0.4 - 1e-9 and aspect.max() <= 2.5 + 1e-9
    assert abs(float(aspect.log().mean())) < 0.03  # log-uniform between reciprocal ends
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= workload.width and boxes[:, 3].max() <= workload.height


def test_proposals_are_jittered_copies_of_six_objects() -> None:
    workload = DISTILL_WORKLOADS["train"]
    objects = draw_objects(6, workload, torch.Generator().manual_seed(5))
    proposals = draw_proposals(120, workload, torch.Generator().manual_seed(5))
    source = objects[torch.arange(120) % 6]
    size, source_size = proposals[:, 2:] - proposals[:, :2], source[:, 2:] - source[:, :2]
    shift = (proposals[:, :2] + proposals[:, 2:] - source[:, :2] - source[:, 2:]) / 2
    assert (shift.abs() <= 0.25 * source_size + 1e-9).all()
    assert (size / source_size).log().abs().max() <= 0.375 + 1e-9
    assert shift.abs().max() > 1


def test_uniform_boxes_reach_the_whole_image() -> None:
    workload = DISTILL_WORKLOADS["large"]
    boxes = draw_uniform(2000, workload, torch.Generator().manual_seed(0))
    assert (boxes[:, 2] - boxes[:, 0]).max() > 0.9 * workload.width
    assert boxes.min() >= 0 and boxes[:, 2].max() <= workload.width


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_inputs_have_dtype_layout_and_gradients(layout: str, dtype: str) -> None:
    inputs = make_inputs(MICRO, dtype, layout, "cpu", seed=1)
    for level, (apprentice, expert) in enumerate(zip(inputs.apprentice, inputs.expert, strict=True)):
        assert apprentice.shape == expert.shape == (2, 4, 64 // STRIDES[level], 96 // STRIDES[level])
        assert apprentice.dtype == expert.dtype == DTYPES[dtype]
        assert apprentice.is_contiguous(memory_format=LAYOUTS[layout])
        assert apprentice.is_leaf and apprentice.requires_grad
        assert not expert.requires_grad
        assert not torch.equal(apprentice, expert)
    again = make_inputs(MICRO, dtype, layout, "cpu", seed=1)
    assert torch.equal(inputs.boxes, again.boxes)
    assert torch.equal(inputs.expert[0], again.expert[0])
    assert make_inputs(MICRO, dtype, layout, "cpu", seed=1, networks=1).expert == []
