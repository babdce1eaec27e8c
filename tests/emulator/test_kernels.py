"""The real CUDA kernels, run on the CPU: against the reference, for several block sizes and schedules.

Everything a kernel may not do is an error here: reading memory that nothing wrote gives NaN, writing outside of an
array or leaving an output element unwritten is seen, barriers must be met by all threads, and threads run in orders
that differ from seed to seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import build
import numpy as np
import pytest
import torch
from kernel_calls import BINDING, KERNELS, OTHER_THREADS, TYPES, Call, launches
from torch import Tensor

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    return build.load(BINDING, [KERNELS])


@pytest.fixture
def module(compiled: ModuleType) -> Iterator[ModuleType]:
    yield compiled
    compiled.schedule()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes_and_layouts(module: ModuleType, dtype: str, layout: str) -> None:
    call = Call(dtype, layout=layout)
    call.right(module)


@pytest.mark.parametrize("options", [
    {"output_size": (7, 7), "channels": 3, "boxes": 3},
    {"output_size": (1, 5), "sampling_ratio": 1},
    {"sampling_ratio": 0},
    {"sampling_ratio": 5, "strides": (2,)},
    {"assignment": "hard", "strides": (4, 8, 16)},
    {"assignment": "uniform", "strides": (4, 16)},
    {"expert_strides": (3.0, 7.0)},
    {"expert_strides": (2.0, 4.0), "sampling_ratio": 0, "dtype": "float64"},
    {"batch": 3, "channels": 32},
    {"boxes": 40, "channels": 2, "size": (20, 40)},
    {"boxes": 150, "channels": 2, "size": (20, 40), "batch": 1, "threads": (32, 64, 64)},  # rounds of boxes
    {"boxes": 0},
    {"channels": (3, 70)},
    {"channels": (65, 1), "layout": "channels_last", "expert_strides": (3.0, 8.0)},  # one level shares its tables
    {"channels": (40, 33, 2), "strides": (4, 8, 16), "dtype": "float64"},
    {"size": (3, 200)},
    {"size": (200, 3)},
])  # fmt: skip
def test_options(module: ModuleType, options: dict[str, Any]) -> None:
    call = Call(**options)
    call.right(module)


@pytest.mark.parametrize("options", [
    {"output_size": (19, 19), "sampling_ratio": 3, "channels": 5, "boxes": 3},
    {"output_size": (41, 45), "channels": 3, "boxes": 2},
    {"output_size": (29, 30), "channels": 2, "boxes": 2, "dtype": "float64", "layout": "channels_last"},
    {"output_size": (2, 3000), "channels": 2, "boxes": 1, "size": (20, 40)},  # tables beyond shared memory
    {"output_size": (1500, 1), "channels": 33, "boxes": 1, "size": (20, 40), "dtype": "float64"},
    {"output_size": (1, 1200), "channels": 2, "boxes": 1, "expert_strides": (3.0, 7.0), "dtype": "float64"},
    {"output_size": (2, 2), "sampling_ratio": 0, "channels": 1, "boxes": 2, "strides": (1,), "size": (4, 6000)},
])  # fmt: skip
def test_output_sizes_and_maps_of_any_size(module: ModuleType, options: dict[str, Any]) -> None:
    """Where pooled values, or the tables themselves, exceed what a block can hold."""
    call = Call(**options)
    call.right(module)


@pytest.mark.parametrize("options", [{}, {"expert_strides": (3.0, 7.0)}, {"output_size": (2, 2000), "channels": 2}])
def test_launches(module: ModuleType, options: dict[str, Any]) -> None:
    """A training step is four, with preparation; there are no launches that only fill or add."""
    call = Call(boxes=2, **options)
    for wanted in ((True, True), (True, False), (False, True)):
        assert launches(module, lambda wanted=wanted: call.distill(module, wanted)) == 4
    assert launches(module, lambda: call.losses(module)) == 4
    assert launches(module, lambda: call.align(module)) == 5  # prepared once, forward two, backward two
    nothing = Call(boxes=0, **options)
    assert launches(module, lambda: nothing.distill(module)) == 2


def test_boxes_of_hardly_any_extent(module: ModuleType) -> None:
    """A few units in the last place around cells' borders: rounding may put a sample past the start of the next bin."""
    steps = [(cell, low, extent) for cell in (1, 2, 6) for low in (-2, -1, 0) for extent in (0, 1, 2, 5, 9)]
    spans = [[(4.0 * c + 2.0) * (1 + j * 2**-52) for j in (low, low + extent)] for c, low, extent in steps]
    rows = [[0, x[0], y[0], x[1], y[1]] for x, y in zip(spans, spans[::-1], strict=True)]
    for ratio, size in ((2, (3, 7)), (3, (7, 5)), (5, (3, 7))):
        call = Call("float64", strides=(4,), channels=1, sampling_ratio=ratio, output_size=size, size=(40, 60), batch=1)
        call.boxes = torch.tensor(rows, dtype=torch.float64)
        call.coefficients = torch.ones(len(rows), dtype=torch.float64)
        call.right(module)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cells_that_no_sample_touches_may_hold_anything(module: ModuleType, layout: str) -> None:
    """Bins of two cells and more: one sample leaves cells unread, and some bins weigh fewer cells than others."""
    call = Call(layout=layout, strides=(4,), channels=2, sampling_ratio=1, output_size=(3, 5), batch=1)
    call.boxes = torch.tensor([[0.0, 9.3, 7.1, 61.7, 33.9], [0.0, 21.0, 5.0, 117.5, 38.0]], dtype=torch.float64)
    call.coefficients = torch.ones(2, dtype=torch.float64)
    clean = call.distill(module)
    call.check(clean, call.expected_distill())
    call.apprentice[0][:, :, ~clean[1].abs().sum(dim=(0, 1)).bool()] = float("inf")
    assert not torch.isfinite(call.apprentice[0]).all()
    for again, before in zip(call.distill(module), clean, strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize("threads", OTHER_THREADS)
def test_block_sizes(module: ModuleType, threads: tuple[int, ...]) -> None:
    call = Call(threads=threads)
    call.right(module)


def test_every_schedule_gives_the_same_bits(module: ModuleType) -> None:
    call = Call(boxes=6, channels=5)

    def run() -> list[Tensor]:
        return call.losses(module) + call.distill(module) + call.align(module)

    first = run()
    for seed in range(1, 6):
        module.schedule(seed, shuffle_blocks=True)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_only_the_gradients_asked_for(module: ModuleType) -> None:
    for steps in (None, (3.0, 7.0)):
        call = Call(expert_strides=steps, channels=4)
        whole = call.distill(module)
        for wanted, kept in (((True, False), (0, 1, 2)), ((False, True), (0, 3, 4))):
            other = call.distill(module, wanted)
            assert all(torch.equal(a, whole[i]) for a, i in zip(other, kept, strict=True))


def test_boxes_that_make_no_sense_stay_in_bounds_and_count_nothing(module: ModuleType) -> None:
    """Wrong batch indices and coordinates that are not numbers: no access outside, and no effect on the others."""
    wrong = [
        [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0.5, 0, 0, 9, 9], [NAN, 0, 0, 9, 9], [INF, 0, 0, 9, 9], [1e300, 0, 0, 9, 9],
        [0, NAN, 0, 9, 9], [0, 0, NAN, 9, 9], [0, 0, 0, NAN, 9], [0, 0, 0, 9, INF], [0, -INF, 0, 9, 9],
        [0, -INF, -INF, INF, INF], [0, 0, 0, 1e308, 9], [0, -1e308, 0, 1e308, 9],
        [1, 30, 30, 10, 10], [0, 1e18, 0, 2e18, 9],
    ]  # fmt: skip
    for ratio in (0, 2):
        call = Call(sampling_ratio=ratio, channels=3)
        sensible = len(call.boxes)
        expected_losses = call.losses(module)[0]
        call.boxes = torch.cat([call.boxes, torch.tensor(wrong, dtype=torch.float64)])
        call.coefficients = torch.cat([call.coefficients, torch.ones(len(wrong), dtype=torch.float64)])
        losses = call.losses(module)[0]
        assert torch.equal(losses[:sensible], expected_losses)
        nonsense = ~call.boxes.isfinite().all(1) | (call.boxes[:, 0] != call.boxes[:, 0].clamp(0, 1).floor())
        assert int(nonsense.sum()) == 12
        nonsense |= (call.boxes[:, 1:3] > call.boxes[:, 3:]).any(dim=1)
        assert int(nonsense.sum()) == 13  # one is turned around
        assert torch.count_nonzero(losses[nonsense]) == 0
        for tensor in (losses, *call.distill(module), *call.align(module)):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("dtypes", [
    ("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32"), ("float32", "float16"),
    ("bfloat16", "float16"), ("float64", "float32"), ("float32", "float64"), ("float64", "bfloat16"),
    (("float16", "float32"), ("bfloat16", "float32")), (("float32", "float64"), "float32"),
    (("bfloat16", "float16"), ("bfloat16", "float16")),
])  # fmt: skip
def test_dtype_pairs(module: ModuleType, dtypes: tuple[Any, Any]) -> None:
    """The sides may differ, and levels may: those that agree are subtracted at load, the others once pooled."""
    for options in ({"channels": 35}, {"channels": (3, 40), "layout": "channels_last"}):
        Call(dtypes[0], expert_dtype=dtypes[1], **options).right(module)


def test_level_weights_that_are_given(module: ModuleType) -> None:
    call = Call(channels=(5, 9))
    call.level_weights = torch.rand(len(call.boxes), 2, generator=torch.Generator().manual_seed(3)).half()
    call.level_weights[::2, 0] = 0.0
    call.right(module)


def test_a_level_of_weight_zero_is_not_read(module: ModuleType) -> None:
    call = Call()
    call.level_weights = torch.tensor([[0.0, 1.5]]).expand(len(call.boxes), 2).contiguous()
    expected = call.losses(module) + call.distill(module) + call.align(module)
    call.check(expected[2:7], call.expected_distill())
    for side in call.maps:
        side[0].fill_(NAN)
    got = call.losses(module) + call.distill(module) + call.align(module)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_box", [False, True])
def test_factor(module: ModuleType, dtype: torch.dtype, of_box: bool) -> None:
    """The incoming gradient, one number or one a box, multiplies all weights."""
    call = Call(channels=5)
    call.factor = (torch.linspace(-2.0, 3.0, len(call.boxes)) if of_box else torch.tensor(-1.75)).to(dtype)
    call.check(call.distill(module), call.expected_distill())


def test_a_factor_that_is_not_finite_reaches_what_counts(module: ModuleType) -> None:
    """Mixed-precision training looks for it in the gradients; a box of no image, or of weight zero, stays out of it."""
    call = Call(channels=3, boxes=2)
    call.boxes = torch.tensor([[0.0, 8, 4, 40, 30], [9, 8, 4, 40, 30], [1, 60, 20, 90, 40]], dtype=torch.float64)
    call.coefficients = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    call.factor = torch.tensor(INF)
    _, *gradients = call.distill(module)
    for gradient in gradients:
        assert not gradient[0].isfinite().all()
        assert not gradient[1].any()


def test_an_index_that_lies_stays_in_bounds(module: ModuleType) -> None:
    """A caller of the raw op may pass any index: no box is taken for another image's, none from outside."""
    call = Call(channels=3)
    rows, index = call.prepare(module)
    count, order = len(rows), index[3:]
    right = call.distill(module)

    def distill(ranges: list[int], places: list[int]) -> list[Tensor]:
        given = [rows, np.array(ranges + places, dtype=np.int32)]
        call.prepare = lambda module, weighted=True: given  # type: ignore[method-assign]
        return call.distill(module)

    def same(got: list[Tensor], expected: list[Tensor], image: slice = slice(None)) -> bool:
        return all(torch.equal(a[image], b[image]) for a, b in zip(got[1:], expected[1:], strict=True))

    ascending = [*range(count)]
    split = distill([0, 3, count], ascending)
    assert same(distill([-5, 3, 2**31 - 1], ascending), split)
    assert same(distill([0, count, count], [*order]), right, slice(0, 1))  # image 1's boxes are not image 0's
    wild = distill([0, count, count], [-1, 2**31 - 1, count, -(2**31), *order[: count - 4]])
    assert all(tensor.isfinite().all() for tensor in wild)
    assert not distill([2**31 - 1, -(2**31), 2], [0] * count)[1].any()
    nobody, foreign = rows.copy(), rows.copy()
    nobody[0, 5:] = 0.0
    foreign[0, 0] = 7.0  # no image's number
    rows = nobody
    without = distill([*index[:3]], [*order])
    rows = foreign
    assert all(torch.equal(a, b) for a, b in zip(distill([*index[:3]], [*order]), without, strict=True))
