"""The host code of the CUDA ops, run by the emulator on tensors of the CPU.

With RAKD_TEST_EMULATED=1 in the environment every test of this folder that asks for the backend "cuda" gets this one;
``test_cuda_emulated.py`` runs them so, in processes of their own. By hand:
``RAKD_TEST_EMULATED=1 python -m pytest tests/ops/emulated_cuda.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, pyramid, random_boxes
from emulated_cases import GEOMETRY, RULE, STRIDES, distill_arguments, inputs, prepare, without_factor
from emulated_ops import OPS, library
from test_backends import check_align, check_distill
from torch import Tensor

from rakd_ops import multilevel_roi_align, reference, soft_roi_distill


def launches(call: Any) -> int:
    """How often a call launches kernels."""
    library().rakd_emulated_launches()
    call()
    return int(library().rakd_emulated_launches())


def step(maps: list[Tensor], expert: list[Tensor], boxes: Any, **options: Any) -> list[Tensor]:
    loss = soft_roi_distill(maps, expert, boxes, **options, backend="cuda")
    return [loss, *torch.autograd.grad(loss, maps)]


def as_lists(boxes: Tensor, images: int, dtype: torch.dtype) -> list[Tensor]:
    """One [K_b, 4] per image; columns of [K, 5], so not contiguous."""
    return [boxes[boxes[:, 0] == image].to(dtype)[:, 1:] for image in range(images)]


@pytest.mark.parametrize("form", ["list", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("weights", [False, True])
def test_launches(form: str, dtype: torch.dtype, weights: bool) -> None:
    """At most four for the loss with its gradient: prepare, tables, pool, gradient; its backward is one."""
    maps, expert = pyramid(8, 5, dtype=torch.float32, requires_grad=True), pyramid(8, 5, dtype=torch.float32, seed=1)
    rows = random_boxes(24, 8)
    boxes: Any = as_lists(rows, 8, dtype) if form == "list" else rows.to(dtype)
    options: dict[str, Any] = {"backend": "cuda"}
    of_boxes = {"box_weights": torch.rand(24), "level_weights": torch.rand(24, 4).half()} if weights else {}
    for output_size in (7, 19):
        loss = []
        options["output_size"] = output_size
        assert launches(lambda: loss.append(soft_roi_distill(maps, expert, boxes, **options, **of_boxes))) == 4  # noqa: B023
        assert launches(lambda: torch.autograd.grad(loss[0], maps)) == 1  # noqa: B023
    options["output_size"] = 7
    each = soft_roi_distill(maps, expert, boxes, **options, **of_boxes, reduction="none")
    assert launches(lambda: torch.autograd.grad(each, maps, torch.ones_like(each))) == 3
    with torch.no_grad():
        assert launches(lambda: soft_roi_distill(maps, expert, boxes, **options, **of_boxes)) == 4
        assert launches(lambda: multilevel_roi_align(maps, boxes, **options)) == 3
    pooled = multilevel_roi_align(maps, boxes, **options).sum()
    assert launches(lambda: torch.autograd.grad(pooled, maps)) == 2
    strides = [4.0, 8.0, 16.0, 32.0]
    assert launches(lambda: OPS.level_weights(boxes if form == "list" else [boxes], strides, *RULE)) == 1


def test_launches_without_boxes_and_of_many_images() -> None:
    maps, expert, boxes = inputs()
    assert launches(lambda: soft_roi_distill(maps, expert, boxes[:0], backend="cuda")) == 2
    with torch.no_grad():
        assert launches(lambda: soft_roi_distill(maps, expert, boxes[:0], backend="cuda")) == 2
        assert launches(lambda: multilevel_roi_align(maps, boxes[:0], backend="cuda")) == 1
    many = [torch.zeros(70, 1, 2, 2)]
    lists = [torch.zeros(1, 4)] * 70
    options = {"strides": (4,), "backend": "cuda"}
    assert launches(lambda: soft_roi_distill(many, many, lists, **options)) == 5  # prepared 64 images at a time
    assert launches(lambda: soft_roi_distill(many, many, torch.zeros(70, 5), **options)) == 4


@pytest.mark.parametrize("images", [3, 70])
def test_lists_and_unsorted_rows_give_the_same(images: int) -> None:
    maps = pyramid(images, 3, 20, 28, strides=(4, 8), dtype=torch.float32, requires_grad=True)
    expert = pyramid(images, 3, 20, 28, strides=(4, 8), dtype=torch.float32, seed=1)
    rows = random_boxes(2 * images, images, 20, 28, dtype=torch.float32)
    options = {"strides": (4, 8), "canonical_level": 2}
    results = []
    for boxes in (as_lists(rows, images, torch.float32), rows, rows[rows[:, 0].argsort(stable=True)]):
        loss, *gradients = step(maps, expert, boxes, **options)
        check = reference.soft_roi_distill(maps, expert, boxes, **options)
        torch.testing.assert_close(loss, check, rtol=1e-5, atol=0)
        results.append(gradients)
    # Boxes add up in the order of their numbers within an image, which is the same in all three.
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
def test_channels_per_level(layout: str) -> None:
    case = Case(2, (3, 64, 1, 33), 64, 96, (4, 8, 16, 32), (layout, "contiguous"), 1.0, random_boxes(12), None,
                {"output_size": 5})  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        check_distill(case, dtype, "cuda")


def test_same_bits_in_any_order() -> None:
    call = inputs()
    first = step(*call)
    try:
        for seed in range(1, 6):
            library().rakd_emulated_schedule(seed)
            assert all(torch.equal(a, b) for a, b in zip(first, step(*call), strict=True))
    finally:
        library().rakd_emulated_schedule(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_whole_vectors(dtype: torch.dtype, sampling_ratio: int) -> None:
    """Channels-last maps whose channels are read several at a time; boxes with bins many cells wide."""
    options = {"strides": (4, 8), "sampling_ratio": sampling_ratio, "canonical_level": 3}
    case = Case(2, 64, 160, 320, (4, 8), ("channels_last",) * 2, 1.0, random_boxes(12, 2, 160, 320), None, options)
    check_distill(case, dtype, "cuda")
    check_align(case, dtype, "cuda")


def test_tables_too_large_for_shared_memory() -> None:
    check_align(Case(1, 3, 64, 96, (4, 8), ("contiguous",) * 2, 1.0, random_boxes(2, 1), None,
                     {"strides": (4, 8), "output_size": 60, "sampling_ratio": 40}), torch.float32, "cuda")  # fmt: skip


@pytest.mark.parametrize("form", ["list", "rows"])
def test_boxes_that_count_nothing(form: str) -> None:
    """Nobody looks at boxes on a GPU before the kernels: another image's number, NaN, turned around; all by value."""
    nan, inf = float("nan"), float("inf")
    wrong = torch.tensor(
        [[7, 0, 0, 90, 60], [-1, 0, 0, 90, 60], [0.5, 0, 0, 90, 60], [nan, 0, 0, 90, 60], [inf, 0, 0, 90, 60],
         [1e300, 0, 0, 90, 60], [0, nan, 0, 90, 60], [0, 0, 0, inf, 60], [0, 90, 0, 0, 60], [0, 0, 60, 90, 0]],
        dtype=torch.float64,
    )  # fmt: skip
    if form == "list":
        wrong = wrong[6:]
    right = random_boxes(3)
    right[:, 0] = torch.tensor([0, 0, 1])
    mixed = torch.cat([right[:2], wrong, right[2:]])
    count = len(mixed)
    for output_size in ((3, 2), (16, 17)):  # either form
        maps, expert, _ = inputs(torch.float64)
        options = {"output_size": output_size, "reduction": "sum"}
        results = []
        for rows in (right, mixed):
            boxes: Any = as_lists(rows.clamp(min=-(10**9)), 2, torch.float64) if form == "list" else rows
            results.append(step(maps, expert, boxes, **options))
            options["reduction"] = "none"
            losses = soft_roi_distill(maps, expert, boxes, **options, backend="cuda")
            options["reduction"] = "sum"
        assert results[0][0] > 0
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
        assert all(torch.equal(a, b) for a, b in zip(results[1][1:], results[0][1:], strict=True))
        exact = reference.soft_roi_distill(maps, expert, right, output_size=output_size, reduction="sum")
        torch.testing.assert_close(results[1][0], exact.detach(), rtol=1e-12, atol=0)
        assert (losses != 0).tolist() == [True] * 2 + [False] * (count - 3) + [True]
    features = [m.detach() for m in maps]
    rows, index = prepare(mixed)
    pooled = OPS.align(features, rows, index, *GEOMETRY)
    assert not pooled[2:-1].any() and pooled[-1].any()
    shapes = [size for m in features for size in m.shape]
    ones = torch.ones_like(pooled)
    expected = OPS.align_backward(ones[:3], *prepare(right), shapes, [False] * 4, *GEOMETRY)
    got = OPS.align_backward(ones, rows, index, shapes, [False] * 4, *GEOMETRY)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_rows_and_index_of_anything_stay_in_bounds() -> None:
    """A caller of the raw ops may pass any numbers."""
    nan, inf = float("nan"), float("inf")
    images = torch.tensor([0, 1, 0, 3, nan, -1, 0, 0.5, 1e300], dtype=torch.float64)
    corners = torch.tensor([[0, 0, 60, 50]], dtype=torch.float64).repeat(9, 1)
    corners[1, 0], corners[2], corners[6] = nan, torch.tensor([inf, 0, -inf, 1]), torch.tensor([60, 50, 0, 0])
    rows = torch.cat([images[:, None], corners, torch.ones(9, 4, dtype=torch.float64)], dim=1)
    clean = None
    for index in (
        [0, 9, 9, *range(9)],
        [0, 1, 9, *range(9)],
        [-(2**31), 2**31 - 1, 7, -1, 99, 2**31 - 1, 5, *range(5)],
    ):
        given = {"rows": rows, "index": torch.tensor(index, dtype=torch.int32)}
        total, gradients = OPS.distill_gradient(*distill_arguments(**given), True, False)
        assert total > 0 and all(g.isfinite().all() for g in gradients)
        losses = OPS.distill_loss(*without_factor(distill_arguments(**given)))[1]
        assert (losses != 0).tolist() == [True] + [False] * 8
        if clean is None:
            clean = gradients
        assert all(torch.equal(a, b) for a, b in zip(gradients, clean, strict=True))


@pytest.mark.parametrize("of_box", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_factor(of_box: bool, dtype: torch.dtype) -> None:
    """The gradient that comes in, read on the device; one a box may have any stride."""
    factor = (torch.linspace(-2, 3, 24)[::2] if of_box else torch.tensor(-1.5)).to(dtype)
    arguments = distill_arguments()
    expected = distill_arguments(rows=torch.cat([arguments[2][:, :5], arguments[2][:, 5:]
                                                 * factor.double().expand(12)[:, None]], dim=1))  # fmt: skip
    total, gradients = OPS.distill_gradient(*expected, True, True)
    arguments[4] = factor
    got, got_gradients = OPS.distill_gradient(*arguments, True, True)
    torch.testing.assert_close(got, total, rtol=1e-12, atol=0)
    for a, b in zip(got_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
def test_scaling(dtype: torch.dtype, layout: str) -> None:
    """In place, whole vectors and odd ends; nothing is touched where the factor is 1."""
    shapes = [(2, 5, 61, 97), (1, 1, 1, 1), (2, 3, 1, 7), (0, 3, 2, 2), (1, 8, 3, 5)]
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    if layout == "channels_last":
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    if layout == "misaligned":
        maps = [torch.cat([m.new_full((1,), 7.0), m.flatten()])[1:].view(m.shape) for m in maps]
    before = [m.clone() for m in maps]
    for factor in (1.0, -1.7, 1.0, 1e-3):
        number = torch.tensor(factor, dtype=loss_dtype)
        assert launches(lambda: OPS.scale_gradients(maps, number)) == 1  # noqa: B023
        before = [(m.to(loss_dtype) * number).to(dtype) for m in before]
        assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))
    if layout == "misaligned":
        assert all(m._base is not None and m._base.flatten()[0] == 7 for m in maps)


def test_scaling_of_several_dtypes() -> None:
    maps = [torch.randn(2, 3, 5, 7).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    before = [m.clone() for m in maps]
    OPS.scale_gradients(maps, torch.tensor(0.5))
    assert all(torch.equal(a, 0.5 * b) for a, b in zip(maps, before, strict=True))
    maps.append(torch.randn(1, 2, 3, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="factor: expected float64 as some gradients are"):
        OPS.scale_gradients(maps, torch.tensor(2.0))
    OPS.scale_gradients(maps, torch.tensor(2.0, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=False))


def test_gradients_are_scaled_in_place_only_where_none_reads_them_again() -> None:
    maps, expert, boxes = inputs()
    loss = soft_roi_distill(maps, expert, boxes, backend="cuda")
    kept = torch.autograd.grad(3.0 * loss, maps, retain_graph=True)
    assert launches(lambda: torch.autograd.grad(loss, maps, retain_graph=True)) == 0
    once = torch.autograd.grad(loss, maps)
    for a, b in zip(kept, once, strict=True):
        torch.testing.assert_close(a, 3.0 * b)


def test_saved_gradients_that_a_hook_has_changed() -> None:
    maps, expert, boxes = inputs()
    expected = step(maps, expert, boxes)[1:]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.expand(2, *t.shape)[0] if t.dim() < 4 else
                                                  torch.stack([t, t], -1)[..., 0]):  # fmt: skip
        loss = soft_roi_distill(maps, expert, boxes, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, maps), expected, strict=True))


@pytest.mark.parametrize(
    ("gradients", "factor"),
    [
        ([], torch.ones(())),
        ([torch.ones(1, 2, 3, 4)] * 33, torch.ones(())),
        ([torch.ones(2, 3, 4)], torch.ones(())),
        ([torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).double()], torch.ones(())),
        ([torch.ones(1, 2, 3, 4, dtype=torch.int32)], torch.ones(())),
        ([torch.ones(2, 3, 4, 5).transpose(2, 3)], torch.ones(())),
        ([torch.ones(2, 3, 4, 10)[..., ::2]], torch.ones(())),
        ([torch.ones(2, 3, 4, 5)], torch.ones(1)),
        ([torch.ones(2, 3, 4, 5, dtype=torch.bfloat16)], torch.ones((), dtype=torch.bfloat16)),
    ],
)
def test_scaling_refuses(gradients: list[Tensor], factor: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"(gradients|factor): expected"):
        OPS.scale_gradients(gradients, factor)


MAP = torch.zeros(2, 40, 4, 4, dtype=torch.float64)
ROWS, INDEX = torch.zeros(12, 9, dtype=torch.float64), torch.zeros(15, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apprentice": []}, "apprentice: expected 1 to 16 maps"),
        ({"apprentice": [MAP] * 17}, "apprentice: expected 1 to 16 maps, one per stride, got 17"),
        ({"apprentice": [MAP[0]] * 4}, "apprentice: expected maps"),
        ({"expert": [MAP] * 3}, "expert: expected 1 to 16 maps, one per stride"),
        ({"expert_strides": [4.0]}, "expert: expected 1 to 16 maps, one per stride"),
        ({"expert": [MAP] * 3, "expert_strides": STRIDES[:3]}, "expert: expected 4 maps as in apprentice, got 3"),
        ({"strides": [4.0]}, "apprentice: expected 1 to 16 maps, one per stride"),
        ({"expert": [MAP.int()] * 4}, "expert: expected float32, float64, float16 or bfloat16 maps"),
        ({"expert": [MAP.to(torch.complex64)] * 4}, "expert: expected floating-point numbers or integers"),
        ({"expert": [MAP[:, :3]] * 4}, "expert: expected 40 channels as in apprentice on level 0, got 3"),
        ({"expert": [MAP[:1]] * 4}, "expert: expected maps"),
        ({"expert": [MAP[0]] * 4}, "expert: expected maps"),
        ({"expert": [MAP[:, :, :0]] * 4}, "expert: expected 1 to 2\\^31 - 64 .*, got 0 in dimension 2"),
        ({"apprentice": [MAP[:, :0]] * 4}, "apprentice: expected 1 to 2\\^31 - 64 .*, got 0 in dimension 1"),
        ({"rows": ROWS.float()}, "rows: expected contiguous float64"),
        ({"rows": ROWS[:, :8]}, "rows: expected contiguous float64 \\[K, 9\\]"),
        ({"rows": ROWS.t().contiguous().t()}, "rows: expected contiguous float64"),
        ({"index": INDEX.long()}, "index: expected contiguous int32 \\[15\\]"),
        ({"index": INDEX[:14]}, "index: expected contiguous int32 \\[15\\]"),
        ({"index": INDEX[None]}, "index: expected contiguous int32 \\[15\\]"),
        ({"factor": torch.ones(3)}, "factor: expected one number or \\[12\\]"),
        ({"factor": torch.ones(12, 1)}, "factor: expected one number or \\[12\\]"),
        ({"output_size": [3]}, "output_size: expected two numbers from 1 to 10000"),
        ({"output_size": [0, 3]}, "output_size: expected two numbers from 1 to 10000"),
        ({"output_size": [2**16, 2**15]}, "output_size: expected two numbers from 1 to 10000"),
        ({"sampling_ratio": -1}, "sampling_ratio: expected a number from 0 to 10000"),
    ],
)  # fmt: skip
def test_host_code_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.distill_gradient(*distill_arguments(**changes), True, True)


def test_host_code_refuses_other_features_and_gradients() -> None:
    rows, index = prepare(random_boxes(2), strides=[4.0])
    for maps, message in (
        ([torch.zeros(2, 3, 4, 4, dtype=torch.int32)], "features: expected float32, float64, float16 or bfloat16"),
        ([torch.zeros(2, 3, 4)], "features: expected maps \\[B, C, H, W\\]"),
        ([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)], "features: expected 1 to 16 maps, one per stride"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.align(maps, rows, index, [4.0], [3, 2], 2)
    two = prepare(random_boxes(2), strides=[4.0, 8.0])
    for other in (torch.zeros(2, 4, 2, 2), torch.zeros(2, 3, 2, 2).double()):
        with pytest.raises(RuntimeError, match="features: expected maps of one dtype and channel count"):
            OPS.align([torch.zeros(2, 3, 4, 4), other], *two, [4.0, 8.0], [3, 2], 2)
    gradient = torch.zeros(2, 3, 3, 2, dtype=torch.float64)
    rest = ([False], [4.0], [3, 2], 2)
    assert len(OPS.align_backward(gradient, rows, index, [2, 3, 4, 4], *rest)) == 1
    for wrong in (gradient[0], gradient[:1], gradient[:, :1], gradient[:, :, :1], gradient[..., :1]):
        with pytest.raises(RuntimeError, match="output_gradient: expected"):
            OPS.align_backward(wrong, rows, index, [2, 3, 4, 4], *rest)
    with pytest.raises(RuntimeError, match="shapes: expected four numbers per map"):
        OPS.align_backward(gradient, rows, index, [2, 3, 4], *rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [torch.zeros(3, 6)]}, "boxes: expected one tensor"),
        ({"boxes": [torch.zeros(3, 5)] * 2}, "boxes: expected one tensor \\[K, 5\\]"),
        ({"boxes": [torch.zeros(3, 4)] * 3}, "boxes: expected one tensor for each of 2 images, got 3"),
        ({"boxes": [torch.zeros(3, 4), torch.zeros(3, 5)]}, "boxes: expected one tensor"),
        ({"boxes": [torch.zeros(3)]}, "boxes: expected one tensor"),
        ({"boxes": [torch.zeros(3, 5, dtype=torch.complex64)]}, "boxes: expected floating-point numbers or integers"),
        ({"boxes": [torch.zeros(3, 5, dtype=torch.bool)]}, "boxes: expected floating-point numbers or integers"),
        ({"box_weights": torch.ones(3)}, "box_weights: expected \\[12\\]"),
        ({"level_weights": torch.ones(12, 3)}, "level_weights: expected \\[12, 4\\]"),
        ({"images": -1}, "images: expected 0 to"),
        ({"strides": []}, "strides: expected 1 to 16 numbers, got 0"),
        ({"strides": [4.0] * 17}, "strides: expected 1 to 16 numbers, got 17"),
        ({"assignment": 3}, "assignment: expected 0, 1 or 2, got 3"),
    ],
)
def test_preparation_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"boxes": [random_boxes(12)], "box_weights": None, "level_weights": None, "images": 2,
                                 "mean": True, "strides": STRIDES, "assignment": 0}  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        OPS.prepare_boxes(*{**arguments, **changes}.values(), *RULE[1:])
