"""The Triton ops themselves, in Triton's interpreter: any numbers as rows and index, and what they must not read.

Run as ``interpreted_triton.py`` is, which has the tests of the public functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import assert_close, pyramid, random_boxes
from interpreted_triton import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    GOOD,
    HALF,
    HEIGHT,
    INF,
    NAN,
    OPS,
    STRIDES,
    WIDTH,
    box_rows,
    language_patched_once_a_launch,  # noqa: F401  (a fixture for this file too)
    maps_of,
)
from torch import Tensor

from rakd_ops import reference
from rakd_ops._layout import is_channels_last
from rakd_ops._triton import launch

# numpy's, of the interpreter, about boxes that overflow
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def indexed(boxes: Tensor, weights: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Rows and index by hand: any box whose first number is an image's is listed there, faulty or not."""
    order = [k for image in range(images) for k in range(len(boxes)) if boxes[k, 0] == image]
    begins = [sum(int(boxes[k, 0]) < image for k in order) for image in range(images + 1)]
    order += [k for k in range(len(boxes)) if k not in order]
    return torch.cat([boxes, weights], dim=1), torch.tensor(begins + order, dtype=torch.int32)


class Raw:
    """The ops themselves on a level for each column of weights, between NaN (what is read beside the maps shows)."""

    def __init__(self, boxes: Tensor, weights: Tensor, ratio: int) -> None:
        strides = STRIDES[: weights.shape[1]]
        self.maps = pyramid(2, 2, HEIGHT, WIDTH, strides, layout="strided")
        self.expert = pyramid(2, 2, HEIGHT, WIDTH, strides, layout="strided", seed=1)
        self.rows, self.index = indexed(boxes, weights, 2)
        self.geometry: tuple[Any, ...] = ([*strides], [2, 1], ratio)

    def loss(self) -> tuple[Tensor, Tensor]:
        strides, *bins = self.geometry
        return OPS.triton_distill_loss(self.maps, self.expert, self.rows, self.index, strides, strides, *bins)

    def gradient(self, factor: Tensor | None = None, sides: tuple[bool, bool] = (True, False)) -> list[Tensor]:
        """The total, then the gradients of the sides that are wanted."""
        strides, *bins = self.geometry
        total, gradients = OPS.triton_distill_gradient(
            self.maps, self.expert, self.rows, self.index, factor, strides, strides, *bins, *sides
        )
        return [total, *gradients]

    def align(self) -> Tensor:
        return OPS.triton_align(self.maps, self.rows, self.index, *self.geometry)

    def align_backward(self, output_gradient: Tensor) -> list[Tensor]:
        shapes = [n for m in self.maps for n in m.shape]
        last = [False] * len(self.maps)
        return OPS.triton_align_backward(output_gradient, self.rows, self.index, shapes, last, *self.geometry)


def same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


BAD = box_rows(
    (0, NAN, 1, 5, 5),
    (0, 1, 1, NAN, 5),
    (0, -INF, 1, INF, 5),
    (1, 1, 1, 5, INF),
    (0, 1e308, 1, -1e308, 5),
    (0, 15, 9, 2, 1),  # turned around on both axes, and on one
    (1, 9, 1, 4, 5),
    (1, 1, 7, 5, 3),
    (2, 1, 1, 5, 5),
    (-1, 1, 1, 5, 5),
    (0.5, 1, 1, 5, 5),
    (NAN, 1, 1, 5, 5),
    (INF, 1, 1, 5, 5),
    (1e300, 1, 1, 5, 5),
)


def good_and_bad(ratio: int, levels: int) -> tuple[Raw, Raw, list[int]]:
    """A call with faulty boxes among the others, the call without them, and where the others stand."""
    boxes = torch.cat([GOOD[:1], BAD[:7], GOOD[1:2], BAD[7:], GOOD[2:]])
    kept = [0, 8, len(boxes) - 1]
    assert torch.equal(boxes[kept], GOOD)
    weights = torch.linspace(0.5, 1.0, levels * len(boxes), dtype=DOUBLE).view(-1, levels)
    return Raw(boxes, weights, ratio), Raw(GOOD, weights[kept], ratio), kept


@pytest.mark.parametrize(("ratio", "levels"), [(0, 1), (2, 2)])
def test_faulty_boxes_count_zero(ratio: int, levels: int) -> None:
    """Whatever numbers a caller of the ops passes as boxes: loss and gradients are those without the faulty ones."""
    call, alone, kept = good_and_bad(ratio, levels)
    faulty = [k for k in range(len(call.rows)) if k not in kept]
    (total, losses), (expected, expected_losses) = call.loss(), alone.loss()
    assert not losses[faulty].any() and torch.equal(losses[kept], expected_losses)
    assert_close(total, expected, expected, 1e-15)
    both = (True, True)
    got, wanted = call.gradient(sides=both), alone.gradient(sides=both)
    assert all(gradient.any() for gradient in wanted[1:])
    assert torch.equal(got[0], total) and same_bits(got[1:], wanted[1:])
    pooled = call.align()
    assert not pooled[faulty].any() and torch.equal(pooled[kept], alone.align())
    gradient = torch.linspace(1.0, 2.0, pooled.numel(), dtype=DOUBLE).view(pooled.shape)
    assert same_bits(call.align_backward(gradient), alone.align_backward(gradient[kept]))


def test_enormous_boxes() -> None:
    """Boxes that cover everything, or nothing, by far: their samples are counted, not visited one by one."""
    boxes = box_rows((1, -1e30, -1e30, 1e30, 1e30), (1, 1e30, 1e30, 1e30, 1e30), (0, 0, 0, 1e17, 6), (0, 2, 2, 12, 9))
    weights = torch.ones(4, 2, dtype=DOUBLE)
    for ratio in (0, 2):
        assert all(bool(values.isfinite().all()) for values in Raw(boxes, weights, ratio).gradient())
    # Two samples a bin lie outside the maps: nothing is left but the last box.
    got, wanted = Raw(boxes, weights, 2).gradient(), Raw(boxes[3:], weights[3:], 2).gradient()
    assert same_bits(got[1:], wanted[1:])


def test_weight_of_zero_reads_nothing() -> None:
    """A level of weight zero may hold anything, and so may an image whose boxes have no weight."""
    weights = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.25, 0.0]], dtype=DOUBLE)
    call, poisoned = Raw(GOOD, weights, 2), Raw(GOOD, weights, 2)
    for feature in (poisoned.maps[1], poisoned.expert[1], poisoned.maps[0][1], poisoned.expert[0][1]):
        feature.fill_(NAN)
    assert same_bits(poisoned.gradient(), call.gradient()) and same_bits(poisoned.loss(), call.loss())
    assert call.gradient()[1][0].any() and not any(g[1].any() for g in call.gradient()[1:])
    assert torch.equal(poisoned.align(), call.align())


@pytest.mark.parametrize("ratio", [0, 1])
def test_cells_without_samples_are_not_read(ratio: int) -> None:
    """Between the samples of large bins as well as outside the boxes."""
    call, poisoned = Raw(GOOD, torch.ones(3, 2, dtype=DOUBLE), ratio), Raw(GOOD, torch.ones(3, 2, dtype=DOUBLE), ratio)
    for level, stride in enumerate(STRIDES):
        height, width = call.maps[level].shape[2:]
        y = reference.axis_matrix(GOOD[:, 2], GOOD[:, 4], stride, height, 2, ratio)
        x = reference.axis_matrix(GOOD[:, 1], GOOD[:, 3], stride, width, 1, ratio)
        for image in range(2):
            mine = GOOD[:, 0] == image
            read = torch.einsum("kpy,kqx->yx", y[mine], x[mine]) > 0
            assert not read.all()
            for feature in (poisoned.maps[level], poisoned.expert[level]):
                feature[image, :, ~read] = NAN
    assert same_bits(poisoned.gradient(), call.gradient()) and same_bits(poisoned.loss(), call.loss())
    assert torch.equal(poisoned.align(), call.align())


def test_ranges_and_order_of_any_numbers() -> None:
    """Entries that name no box, or a box of another image, are passed over; ranges end where the order does."""
    weights = torch.ones(3, 2, dtype=DOUBLE)
    alone = Raw(GOOD[:1], weights[:1], 2)
    wanted = alone.gradient()[1:]
    call = Raw(GOOD, weights, 2)
    for ranges, order in (
        ((0, 3, 3), (0, -1, 3)),
        ((-(2**31), 2**31 - 1, 0), (2**31 - 1, 0, 1)),
        ((-5, 3, -7), (-(2**31), 1, 0)),
    ):
        call.index = torch.tensor([*ranges, *order], dtype=torch.int32)
        assert same_bits(call.gradient()[1:], wanted), (ranges, order)


def test_factor() -> None:
    """It multiplies the weights: one number or one a box, of any floating dtype and stride."""
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [2.0, 0.125]], dtype=DOUBLE)
    factors = torch.tensor([3.0, 0.0, -0.5, 1.0, 2.0, 0.0], dtype=HALF)[::2]
    call = Raw(GOOD, weights, 2)
    scaled = Raw(GOOD, weights * factors.double()[:, None], 2)
    assert same_bits(call.gradient(factors), scaled.gradient())
    doubled = Raw(GOOD, weights * 2.0, 2).gradient()
    assert same_bits(call.gradient(torch.tensor(2.0)), doubled)
    assert same_bits(call.gradient(torch.tensor([2.0]).expand(3)), doubled)
    # A weight of zero stays zero, and what overflowed stays visible.
    overflowed = call.gradient(torch.tensor([0.0, INF, 0.0]))
    assert not bool(overflowed[1].isfinite().all()) and not overflowed[2].any()


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_rows_of_the_factors(ratio: int) -> None:
    """Each bin's weights, and the cells listed for it, are the reference's; border samples included."""
    boxes = torch.cat(
        [box_rows((0, -1, -1, 3, 4), (0, -7, 0, 47, 9), (0, 4, 4, 4, 4)), random_boxes(4, 1, 24, 40, seed=5)]
    )
    rows = torch.cat([boxes, torch.ones(len(boxes), 1, dtype=DOUBLE)], dim=1)
    stride, size, bins = 2.0, (12, 20), (3, 2)
    built, taps = launch.make_tables(rows, [(1, 1, *size)], [stride], bins, ratio, DOUBLE)
    weights = built.weights.view(len(boxes), -1)
    line, offset = 0, 0
    for axis in range(2):
        low, high = boxes[:, 2 - axis], boxes[:, 4 - axis]
        expected = reference.axis_matrix(low, high, stride, size[axis], bins[axis], ratio)
        for p in range(bins[axis]):
            for k in range(len(boxes)):
                first, end = built.spans[:, 0, k, line].tolist()
                row = torch.zeros(size[axis], dtype=DOUBLE)
                row[first:end] = weights[k, offset + first : offset + end]
                torch.testing.assert_close(row, expected[k, p], rtol=1e-14, atol=1e-16)
                if taps and end - first > taps:
                    listed = [cell for cell in built.cells[0, k, line].tolist() if cell >= 0]
                    assert listed == row.nonzero()[:, 0].tolist()
                if first < end:
                    box_first, box_end = built.extents[2 * axis : 2 * axis + 2, 0, k].tolist()
                    assert box_first <= first and end <= box_end
            line += 1
            offset += size[axis]


def test_same_bits_in_every_run() -> None:
    call = Raw(random_boxes(3, 2, HEIGHT, WIDTH), torch.ones(3, 2, dtype=DOUBLE), 2)
    assert same_bits(*(call.gradient(sides=(True, True)) for _ in range(2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(3, 6, dtype=DOUBLE)}, r"rows: expected contiguous torch.float64 \[3, 7\], got"),
        ({"rows": torch.zeros(3, 7)}, "rows: expected contiguous torch.float64"),
        ({"rows": torch.zeros(7, 3, dtype=DOUBLE).t()}, "rows: expected contiguous"),
        ({"index": torch.zeros(5, dtype=torch.int32)}, r"index: expected contiguous torch.int32 \[6\], got"),
        ({"index": torch.zeros(6, dtype=torch.int64)}, "index: expected contiguous torch.int32"),
        ({"expert": maps_of((2, 3), (DOUBLE,))}, r"expert: expected 2 images and \[2, 2\] channels as in apprentice"),
        ({"expert": maps_of((2,), (DOUBLE,))}, r"expert: expected 2 of \[B, C, H, W\]"),
        ({"maps": [torch.zeros(2, 2, 5, 9), torch.zeros(1, 2, 3, 5)]}, "apprentice: expected floating maps of one"),
        ({"maps": [torch.zeros(2, 2, 5, 9, dtype=torch.int32)] * 2}, "apprentice: expected floating maps of one"),
    ],
    ids=["columns", "dtype", "stride", "length", "int64", "channels", "levels", "batch", "integers"],
)
def test_form_of_arguments(changes: dict[str, Any], message: str) -> None:
    call = Raw(GOOD, torch.ones(3, 2, dtype=DOUBLE), 2)
    vars(call).update(changes)
    with pytest.raises(ValueError, match=message):
        call.gradient()


def test_form_of_factor_and_gradients() -> None:
    call = Raw(GOOD, torch.ones(3, 2, dtype=DOUBLE), 2)
    with pytest.raises(ValueError, match=r"factor: expected floating \[\] or \[3\] on cpu, got torch.float32 \[2\]"):
        call.gradient(torch.ones(2))
    with pytest.raises(ValueError, match=r"output_gradient: expected \[3, 2, 2, 1\] on cpu, got \[3, 2, 1, 1\]"):
        call.align_backward(torch.zeros(3, 2, 1, 1, dtype=DOUBLE))
    call.maps = [m.to(dtype) for m, dtype in zip(call.maps, (DOUBLE, FLOAT), strict=True)]
    with pytest.raises(ValueError, match="features: expected one dtype and number of channels"):
        call.align()


def test_opcheck() -> None:
    maps = maps_of((2, 3), (FLOAT, BFLOAT), ("channels_last", "contiguous"))
    maps = [m.detach() for m in maps]
    rows, index = indexed(GOOD[:1], torch.ones(1, 2, dtype=DOUBLE), 2)
    strides, bins = [*STRIDES], ([2, 1], 1)
    distill = (maps, maps, rows, index)
    torch.library.opcheck(OPS.triton_distill_loss.default, (*distill, strides, strides, *bins))
    factor = torch.ones(1)
    torch.library.opcheck(OPS.triton_distill_gradient.default, (*distill, factor, strides, strides, *bins, True, True))
    row, one = rows[:, :6].contiguous(), index.clone()
    torch.library.opcheck(OPS.triton_align.default, (maps[:1], row, one, [2.0], *bins))
    backward = (torch.rand(1, 2, 2, 1), row, one, list(maps[0].shape), [is_channels_last(maps[0])], [2.0], *bins)
    torch.library.opcheck(OPS.triton_align_backward.default, backward)
