"""Preparation of boxes on the GPU, run on the CPU: rows, the order of boxes by image, level weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_calls import NUMBERS, Call, boxes_in, every, expected_prepare, launches, prepare, typed
from test_kernels import INF, NAN, compiled, module
from torch import Tensor

from rakd_ops import reference

__all__ = ["compiled", "module"]  # fixtures

SIZE = (44, 148)
OPTIONS = Call(strides=(4, 8, 16)).options


def check(
    module: ModuleType, boxes: list[Tensor], images: int, weights: Tensor | None = None, of_levels: Tensor | None = None
) -> None:
    rows, index = map(torch.from_numpy, prepare(module, OPTIONS, boxes, weights, of_levels, images))
    expected_rows, expected_index = expected_prepare(OPTIONS, boxes, weights, of_levels, images)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-12, atol=1e-15)
    assert torch.equal(rows[:, :5], expected_rows[:, :5])
    assert torch.equal(index, expected_index)


@pytest.mark.parametrize("count", [0, 1, 3, 250, 300, 700])
@pytest.mark.parametrize("images", [1, 2, 300])
def test_boxes_in_no_order(module: ModuleType, count: int, images: int) -> None:
    """The order is stable; several blocks of threads find it, each for its boxes or ranges."""
    check(module, [boxes_in(SIZE, count, images, seed=count)], images)


def test_boxes_of_no_image_come_last(module: ModuleType) -> None:
    boxes = boxes_in(SIZE, 40, 3, seed=1)
    boxes[::3, 0] = torch.tensor([3.0, -1, 0.5, NAN, INF, 1e300, 2]).repeat(3)[: len(boxes[::3])]
    boxes[1, 1], boxes[4, 3], boxes[7, 2] = NAN, -INF, 1e9
    check(module, [boxes], 3)


@pytest.mark.parametrize(
    "counts", [(3, 0, 5), (0,), (0, 0), (300, 1), (2,) * 64, (1, 2) * 32, (2,) * 65, (1, 0, 3) * 50]
)
def test_lists(module: ModuleType, counts: tuple[int, ...]) -> None:
    """One launch for up to 64 images."""
    boxes = list(boxes_in(SIZE, sum(counts), 1, seed=2)[: sum(counts), 1:].contiguous().split(counts))
    assert launches(module, lambda: check(module, boxes, len(counts))) == (len(counts) + 63) // 64


def test_wrong_boxes_of_a_list_count_nothing(module: ModuleType) -> None:
    """They stay in the range of their image; their rows say that they are of none."""
    wrong = torch.tensor([[NAN, 0, 9, 9], [0, 0, INF, 9], [30, 0, 10, 9], [0, 9, 9, 0]], dtype=torch.float64)
    right = torch.tensor([[1.0, 2, 30, 20]], dtype=torch.float64)
    boxes = [torch.cat([right, wrong]), torch.cat([wrong, right])]
    rows, index = prepare(module, OPTIONS, boxes, None, None, 2)
    assert index.tolist() == [0, 5, 10, *range(10)]
    assert rows[:, 0].tolist() == [0, -1, -1, -1, -1, -1, -1, -1, -1, 1]
    assert not rows[1:9, 1:].any() and rows[0, 5:].any() and rows[9, 5:].any()


@pytest.mark.parametrize("dtype", NUMBERS)
def test_dtypes(module: ModuleType, dtype: torch.dtype) -> None:
    numbers = torch.tensor([[1, 20, 3, 44, 30], [0, 7, 6, 100, 30], [1, 2, 3, 4, 5], [2, 2, 3, 4, 5]]).to(dtype)
    if dtype != torch.uint8:
        numbers[2, 1] = -100
    weights, of_levels = torch.tensor([2, 0, 1, 3]).to(dtype), torch.arange(12).view(4, 3).to(dtype)
    check(module, [numbers], 2, weights, of_levels)
    check(module, [numbers[:3, 1:].contiguous(), numbers[3:, 1:].double().contiguous()], 2, weights, of_levels)
    check(module, [numbers.t().contiguous().t()], 2, weights, of_levels.t().contiguous().t())


def test_subnormal_and_huge_halves(module: ModuleType) -> None:
    weights = torch.tensor([2.0**-24, 1.5e-5, 65504.0, -6e-5], dtype=torch.float16)
    boxes = [torch.tensor([[0.0, 1, 2, 30, 20]]).expand(4, 5).contiguous()]
    for dtype in (torch.float16, torch.bfloat16):
        check(module, boxes, 1, weights.to(dtype))


def test_wrong_weights_count_nothing(module: ModuleType) -> None:
    boxes = boxes_in(SIZE, 6, 2, seed=5)
    weights = torch.ones(len(boxes), dtype=torch.float32)
    weights[1:4] = torch.tensor([NAN, INF, -2.0])
    of_levels = torch.rand(len(boxes), 3, generator=torch.Generator().manual_seed(1))
    of_levels[0, 1], of_levels[4, 0], of_levels[5, 2] = NAN, -1.0, INF
    check(module, [boxes], 2, weights, of_levels)


@pytest.mark.parametrize("assignment", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_level_weights(module: ModuleType, assignment: int, dtype: torch.dtype) -> None:
    """The rule of compiled code is that of the reference, for boxes of any image, in one launch."""
    options = {**OPTIONS, "assignment": assignment, "images": 2**62}
    rows = boxes_in(SIZE, 300, 5, seed=3).clamp(-6e4, 6e4).to(dtype)
    names: dict[str, Any] = {name: options[name] for name in ("strides", "sigma", "canonical_size", "canonical_level")}
    for boxes in ([rows], [rows[:200, 1:].contiguous(), rows[200:, 1:].contiguous()]):
        weights = torch.zeros(len(rows), 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        assert launches(module, lambda: module.level_weights(options, every(boxes), typed(weights))) == 1  # noqa: B023
        given: Any = boxes if len(boxes) > 1 else boxes[0]
        expected = reference.level_weights(given, **names, assignment=("soft", "hard", "uniform")[assignment])
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-12)


def test_every_schedule_gives_the_same_numbers(module: ModuleType) -> None:
    boxes = [boxes_in(SIZE, 600, 4, seed=7)]
    for seed in range(1, 4):
        module.schedule(seed, shuffle_blocks=True)
        check(module, boxes, 4)
