"""The CPU library's registered ops as raw callers meet them: preparation by value, and arguments that are errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import pyramid, random_boxes
from torch import Tensor

from rakd_ops import available_backends, multilevel_roi_align, soft_roi_distill

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not True, reason="the CPU library is not installed")

STRIDES = [4.0, 8.0]
RULE = (STRIDES, 0, 1.0, 224.0, 4.0)  # soft
ops = torch.ops.rakd_ops


def arguments(images: int = 2, **changes: Any) -> dict[str, Any]:
    """Arguments of distill_loss that are right, but for the changes."""
    maps = pyramid(images, 3, 32, 48, (4, 8))
    boxes = [torch.tensor([[1.0, 2.0, 20.0, 30.0], [4.0, 4.0, 9.0, 9.0]])] * images
    rows, index = ops.prepare_boxes(boxes, None, None, images, False, *RULE)
    right = {"apprentice": maps, "expert": maps, "rows": rows, "index": index, "strides": STRIDES}
    return {**right, "expert_strides": STRIDES, "output_size": [3, 3], "sampling_ratio": 2, **changes}


def changed(tensor: Tensor, place: tuple[int, ...] | int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


RIGHT = arguments()
ROWS, INDEX, MAPS = RIGHT["rows"], RIGHT["index"], RIGHT["apprentice"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": ROWS[:, :-1].contiguous()}, "rows: expected contiguous float64"),
        ({"rows": ROWS.float()}, "rows: expected contiguous float64"),
        ({"rows": ROWS.T.contiguous().T}, "rows: expected contiguous float64"),
        ({"rows": changed(ROWS, (1, 0), 1.0)}, "rows: expected image 0 as in index, got 1 in row 1"),
        ({"rows": changed(ROWS, (1, 0), -1.0)}, "rows: expected image 0 as in index, got -1 in row 1"),
        ({"rows": changed(ROWS, (1, 2), float("nan"))}, "rows: expected finite numbers"),
        ({"rows": changed(ROWS, (3, 3), -50.0)}, "rows: expected finite numbers with x1 <= x2"),
        ({"index": INDEX.long()}, "index: expected contiguous int32"),
        ({"index": INDEX[:-1].clone()}, "index: expected contiguous int32"),
        ({"index": changed(INDEX, 0, -1)}, "index: expected no negative number"),
        ({"index": changed(INDEX, 1, 5)}, "index: expected the boxes of image 0 to end"),
        ({"index": changed(INDEX, 1, -1)}, "index: expected the boxes of image 0 to end"),
        ({"index": changed(INDEX, 3, 4)}, "index: expected increasing box numbers below 4"),
        ({"index": changed(INDEX, 3, -1)}, "index: expected increasing box numbers below 4"),
        ({"index": changed(INDEX, 4, 0)}, "index: expected increasing box numbers below 4"),
        ({"apprentice": [m[:, :0] for m in MAPS]}, "apprentice: expected 1 to"),
        ({"apprentice": [m.int() for m in MAPS]}, "apprentice: expected float32"),
        ({"apprentice": MAPS[:1]}, "apprentice: expected 1 to 16 maps, one per stride"),
        ({"expert": [m[:, :2] for m in MAPS]}, "expert: expected 2 images and 3 channels"),
        ({"expert": [m[:1] for m in MAPS]}, "expert: expected 2 images and 3 channels"),
        ({"output_size": [0, 3]}, "output_size: expected two numbers"),
        ({"output_size": [3]}, "output_size: expected two numbers"),
        ({"sampling_ratio": -1}, "sampling_ratio: expected a number"),
    ],
)
def test_wrong_arguments_are_errors(changes: dict[str, Any], message: str) -> None:
    ops.distill_loss(**RIGHT)
    with pytest.raises(RuntimeError, match=re.escape(f", {message}")):
        ops.distill_loss(**arguments(**changes))


@pytest.mark.parametrize("factor", [torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=torch.complex64)])
def test_a_wrong_factor_is_an_error(factor: Tensor) -> None:
    with pytest.raises(RuntimeError, match=", factor: expected"):
        ops.distill_gradient(**RIGHT, factor=factor, apprentice_gradient=True, expert_gradient=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("of_boxes", [False, True])
def test_the_factor_multiplies_the_weights(dtype: torch.dtype, of_boxes: bool) -> None:
    factor = torch.tensor([0.5, -2.0, 0.0, 3.0] if of_boxes else 1.5).to(dtype)
    rows = ROWS.clone()
    rows[:, 5:] *= factor.double().reshape(-1, 1)
    wanted = {"apprentice_gradient": True, "expert_gradient": True}
    expert = [m.roll(1, 3) for m in MAPS]
    got = ops.distill_gradient(**arguments(expert=expert), factor=factor, **wanted)
    expected = ops.distill_gradient(**arguments(expert=expert, rows=rows), factor=None, **wanted)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0.0)


def test_boxes_outside_all_ranges_count_nothing() -> None:
    """A raw caller may leave boxes out; their pooled values are zeros."""
    rows = changed(ROWS, (0, 0), -1.0)
    index = torch.tensor([0, 1, 3, 1, 2, 3, 0], dtype=torch.int32)
    pooled = ops.align(MAPS, rows, index, STRIDES, [3, 3], 2)
    expected = ops.align(MAPS, ROWS, INDEX, STRIDES, [3, 3], 2)
    assert bool((pooled[0] == 0.0).all()) and torch.equal(pooled[1:], expected[1:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_maps_of_one_cell_are_written_whole(layout: str) -> None:
    """A slice of such maps has the strides of channels-last maps, which a dense map of one cell cannot show."""
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    whole = torch.randn(2, 6, 1, 1, dtype=torch.float64).contiguous(memory_format=format)
    maps, expert = [whole[:, 1:4]], [torch.zeros(2, 3, 1, 1, dtype=torch.float64)]
    boxes = [torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.zeros(0, 4)]
    rows, index = ops.prepare_boxes(boxes, None, None, 2, False, [16.0], *RULE[1:])
    for _ in range(20):
        dirty = torch.full((6,), float("nan"), dtype=torch.float64)
        del dirty
        common = (rows, index, None, [16.0], [16.0], [2, 2], 2, True, False)
        _, (gradient,) = ops.distill_gradient(maps, expert, *common)
        assert bool((gradient[1] == 0.0).all()) and bool((gradient[0] != 0.0).all())


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64],
)
def test_preparation_of_boxes_of_any_dtype(dtype: torch.dtype) -> None:
    """The same numbers as float32; each tensor of a list may have a dtype and strides of its own."""
    boxes = random_boxes(9, 3, 120, 100)[:, 1:].round().clamp(0, 120)
    weights = torch.arange(9) % 4
    shares = torch.arange(18).reshape(2, 9).T
    groups = [boxes[:2], boxes[2:2], boxes[2:]]
    expected = ops.prepare_boxes([g.float() for g in groups], weights.float(), shares.double(), 3, True, *RULE)
    typed = [groups[0].to(dtype), groups[1].float(), groups[2].to(dtype).T.contiguous().T]
    got = ops.prepare_boxes(typed, weights.to(dtype), shares.to(dtype), 3, True, *RULE)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    rows, index = got
    assert rows[:, 0].tolist() == [0.0] * 2 + [2.0] * 7 and torch.equal(rows[:, 1:5], boxes.double())
    torch.testing.assert_close(rows[:, 5:], (shares * weights[:, None]).double() / 9.0, rtol=1e-15, atol=0.0)
    assert index.tolist() == [0, 2, 2, 9, *range(9)]


def test_the_order_is_stable() -> None:
    images = torch.tensor([2, 0, 2, 1, 0, 2, 0])
    boxes = torch.cat([images[:, None].float(), torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(7, 4)], 1)
    rows, index = ops.prepare_boxes([boxes], None, None, 4, False, *RULE)
    assert torch.equal(rows[:, :5], boxes.double())
    assert index.tolist() == [0, 3, 4, 7, 7, 1, 4, 6, 3, 0, 2, 5]


@pytest.mark.parametrize(
    "row, message",
    [
        ([2.0, 0.0, 0.0, 1.0, 1.0], "boxes: expected whole batch indices"),
        ([0.5, 0.0, 0.0, 1.0, 1.0], "boxes: expected whole batch indices"),
        ([-1.0, 0.0, 0.0, 1.0, 1.0], "boxes: expected whole batch indices"),
        ([0.0, 0.0, 0.0, -1.0, 1.0], "boxes: expected x1 <= x2"),
        ([0.0, 0.0, float("inf"), 1.0, 1.0], "boxes: expected finite numbers"),
    ],
)
def test_faulty_boxes_are_errors(row: list[float], message: str) -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0], row])
    with pytest.raises(RuntimeError, match=f", {message}.* in row 1"):
        ops.prepare_boxes([boxes], None, None, 2, False, *RULE)


def test_results_larger_than_any_memory_are_errors() -> None:
    n = 2**31 - 64
    one = torch.zeros(1, 1, 1, 1)
    maps = [one.expand(1, n, n, 1).requires_grad_()]
    with pytest.raises(RuntimeError, match=r"expected a tensor of fewer than 2\^60 values"):
        soft_roi_distill(maps, maps, torch.zeros(0, 5), strides=(1,))
    boxes = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]]).expand(60, 5)
    for size, message in ((10_000, "fewer than 2"), (1_000, "could not allocate")):
        with pytest.raises(RuntimeError, match=message):
            multilevel_roi_align([one.expand(1, n, 3, 3)], boxes, strides=(1,), output_size=size)


def test_level_weights_have_no_highest_image() -> None:
    boxes = torch.tensor([[1e6, 0.0, 0.0, 50.0, 90.0], [0.0, 3.0, 4.0, 9.0, 9.0]])
    weights = ops.level_weights([boxes], *RULE)
    rows, _ = ops.prepare_boxes([boxes[:, 1:]], None, None, 1, False, *RULE)
    assert weights.dtype == torch.float32 and ops.level_weights([boxes.double()], *RULE).dtype == torch.float64
    assert torch.equal(weights, rows[:, 5:].float())
