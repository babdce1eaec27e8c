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
from emulated_ops import OPS, library
from test_backends import check_align, check_distill
from torch import Tensor

from rakd_ops import multilevel_roi_align, soft_roi_distill


def launches(call: Any) -> int:
    """How often a call launches kernels."""
    library().rakd_emulated_launches()
    call()
    return int(library().rakd_emulated_launches())


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], Tensor]:
    maps = pyramid(2, 40, dtype=dtype, requires_grad=True)
    return maps, pyramid(2, 40, dtype=dtype, seed=1), random_boxes(12)


def step(maps: list[Tensor], expert: list[Tensor], boxes: Tensor, **options: Any) -> list[Tensor]:
    loss = soft_roi_distill(maps, expert, boxes, **options, backend="cuda")
    return [loss, *torch.autograd.grad(loss, maps)]


@pytest.mark.parametrize("count", [12, 0])
def test_launches(count: int) -> None:
    maps, expert, boxes = inputs()
    boxes = boxes[:count]
    wanted = 2 if count else 1  # without boxes nothing is pooled
    for output_size in (7, 19):
        loss = []
        options = {"output_size": output_size, "backend": "cuda"}
        assert launches(lambda: loss.append(soft_roi_distill(maps, expert, boxes, **options))) == wanted  # noqa: B023
        assert launches(lambda: torch.autograd.grad(loss[0], maps)) == 1  # noqa: B023
    with torch.no_grad():
        assert launches(lambda: soft_roi_distill(maps, expert, boxes, backend="cuda")) == wanted
        assert launches(lambda: multilevel_roi_align(maps, boxes, backend="cuda")) == wanted - 1
    pooled = multilevel_roi_align(maps, boxes, backend="cuda").sum()
    assert launches(lambda: torch.autograd.grad(pooled, maps)) == wanted


@pytest.mark.parametrize("form", ["pooled", "gram"])
def test_same_bits_in_any_order(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAKD_CUDA_FORM", form)
    call = inputs()
    first = step(*call)
    try:
        for seed in range(1, 6):
            library().rakd_emulated_schedule(seed)
            assert all(torch.equal(a, b) for a, b in zip(first, step(*call), strict=True))
    finally:
        library().rakd_emulated_schedule(0)


def test_form_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form's sums are rounded in their own way, by which they are told apart."""
    maps, expert, boxes = inputs()
    results = {}
    for form in ("pooled", "gram"):
        monkeypatch.setenv("RAKD_CUDA_FORM", form)
        results[form] = [step(maps, expert, boxes, output_size=n) for n in (7, 19)]
    monkeypatch.delenv("RAKD_CUDA_FORM")
    for size, form, other in ((7, "pooled", "gram"), (19, "gram", "pooled")):
        got = step(maps, expert, boxes, output_size=size)
        of_form, of_other = results[form][size == 19], results[other][size == 19]
        assert all(torch.equal(a, b) for a, b in zip(got, of_form, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(got, of_other, strict=True))
        for a, b in zip(of_form, of_other, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    monkeypatch.setenv("RAKD_CUDA_FORM", "other")
    with pytest.raises(RuntimeError, match=r"RAKD_CUDA_FORM: expected pooled, gram or nothing, got other"):
        step(maps, expert, boxes)


@pytest.mark.parametrize("form", ["pooled", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_whole_vectors(form: str, dtype: torch.dtype, sampling_ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels-last maps whose channels are read several at a time; boxes with bins many cells wide."""
    monkeypatch.setenv("RAKD_CUDA_FORM", form)
    options = {"strides": (4, 8), "sampling_ratio": sampling_ratio, "canonical_level": 3}
    case = Case(2, 64, 160, 320, (4, 8), ("channels_last",) * 2, 1.0, random_boxes(12, 2, 160, 320), None, options)
    check_distill(case, dtype, "cuda")
    check_align(case, dtype, "cuda")


def test_tables_too_large_for_shared_memory() -> None:
    check_align(Case(1, 3, 64, 96, (4, 8), ("contiguous",) * 2, 1.0, random_boxes(2, 1), None,
                     {"strides": (4, 8), "output_size": 60, "sampling_ratio": 40}), torch.float32, "cuda")  # fmt: skip


RULE = (0, 1.0, 224.0, 4.0)  # of soft assignment
GEOMETRY = ([4.0, 8.0, 16.0, 32.0], [3, 2], 2, *RULE)


def distill_arguments(**changes: Any) -> list[Any]:
    maps, expert, boxes = inputs(torch.float64)
    arguments = {
        "apprentice": [m.detach() for m in maps],
        "expert": expert,
        "boxes": boxes,
        "coefficients": torch.full((len(boxes),), 0.5, dtype=torch.float64),
        "strides": GEOMETRY[0],
        "expert_strides": GEOMETRY[0],
        "output_size": [3, 2],
        "sampling_ratio": 2,
        "assignment": 0,
        "sigma": 1.0,
        "canonical_size": 224.0,
        "canonical_level": 4.0,
    }
    assert set(changes) <= set(arguments)
    return list({**arguments, **changes}.values())


def test_boxes_that_count_nothing() -> None:
    """What on a GPU nobody looks at before the kernels: another image's number, NaN, turned around."""
    nan, inf = float("nan"), float("inf")
    wrong = torch.tensor(
        [[7, 0, 0, 90, 60], [-1, 0, 0, 90, 60], [0.5, 0, 0, 90, 60], [nan, 0, 0, 90, 60], [inf, 0, 0, 90, 60],
         [0, nan, 0, 90, 60], [0, 0, 0, inf, 60], [0, 90, 0, 0, 60], [1e300, 0, 0, 90, 60]],
        dtype=torch.float64,
    )  # fmt: skip
    right = random_boxes(3)
    mixed = torch.cat([right[:2], wrong, right[2:]])
    for output_size in ([3, 2], [16, 17]):  # either form
        few, many = (
            distill_arguments(
                boxes=boxes, coefficients=torch.ones(len(boxes), dtype=torch.float64), output_size=output_size
            )
            for boxes in (right, mixed)
        )
        total, gradients = OPS.distill_gradient(*few, True, True)
        got, got_gradients = OPS.distill_gradient(*many, True, True)
        assert total > 0
        torch.testing.assert_close(got, total, rtol=1e-14, atol=0)  # other blocks may share the sum
        assert all(torch.equal(a, b) for a, b in zip(got_gradients, gradients, strict=True))
        losses = OPS.distill_loss(*many)[1]
        assert torch.equal(losses != 0, torch.tensor([True] * 2 + [False] * 9 + [True]))
    features = few[0]
    pooled = OPS.align(features, mixed, *GEOMETRY)
    assert not pooled[2:11].any() and pooled[11].any()
    shapes = [size for m in features for size in m.shape]
    ones = torch.ones_like(pooled)
    expected = OPS.align_backward(ones[:3], right, shapes, [False] * 4, *GEOMETRY)
    got = OPS.align_backward(ones, mixed, shapes, [False] * 4, *GEOMETRY)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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
        ([torch.ones(2, 3, 4, 5).transpose(2, 3)], torch.ones(())),
        ([torch.ones(2, 3, 4, 10)[..., ::2]], torch.ones(())),
        ([torch.ones(2, 3, 4, 5)], torch.ones(1)),
        ([torch.ones(2, 3, 4, 5)], torch.ones((), dtype=torch.float64)),
        ([torch.ones(2, 3, 4, 5, dtype=torch.bfloat16)], torch.ones((), dtype=torch.bfloat16)),
    ],
)
def test_scaling_refuses(gradients: list[Tensor], factor: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"(gradients|factor): expected"):
        OPS.scale_gradients(gradients, factor)


MAP = torch.zeros(2, 40, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apprentice": []}, "apprentice|vector"),
        ({"apprentice": [MAP] * 17}, "apprentice: expected 1 to 16 maps"),
        ({"expert": [MAP] * 3}, "expert: expected as many maps and strides as apprentice"),
        ({"expert_strides": [4.0]}, "expert: expected as many maps and strides as apprentice"),
        ({"strides": [4.0]}, "strides: expected one per map"),
        ({"expert": [MAP.float()] * 4}, "expert: expected CUDA maps"),
        ({"expert": [MAP[:, :3]] * 4}, "expert: expected CUDA maps"),
        ({"expert": [MAP[:1]] * 4}, "expert: expected CUDA maps"),
        ({"expert": [MAP[0]] * 4}, "expert: expected CUDA maps"),
        ({"expert": [MAP[:, :, :0]] * 4}, "maps: expected 1 to"),
        ({"boxes": random_boxes(12).float()}, "boxes: expected contiguous float64"),
        ({"boxes": random_boxes(12)[:, :4]}, "boxes: expected contiguous float64"),
        ({"boxes": random_boxes(24)[::2]}, "boxes: expected contiguous float64"),
        ({"coefficients": torch.ones(3, dtype=torch.float64)}, "coefficients: expected contiguous float64"),
        ({"coefficients": torch.ones(12)}, "coefficients: expected contiguous float64"),
        ({"output_size": [3]}, "output_size: expected two positive numbers"),
        ({"output_size": [0, 3]}, "output_size: expected two positive numbers"),
        ({"assignment": 3}, "assignment: expected 0, 1 or 2"),
        ({"output_size": [2**16, 2**15]}, "output_size: expected fewer than 2\\^31 bins"),
    ],
)  # fmt: skip
def test_host_code_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, IndexError), match=message):
        OPS.distill_gradient(*distill_arguments(**changes), True, True)


def test_host_code_refuses_integers_and_other_gradients() -> None:
    maps = [torch.zeros(2, 3, 4, 4, dtype=torch.int32)]
    with pytest.raises(RuntimeError, match="maps: expected float32, float64, float16 or bfloat16"):
        OPS.align(maps, random_boxes(2), [4.0], [3, 2], 2, *RULE)
    gradient = torch.zeros(2, 3, 3, 2, dtype=torch.float64)
    shapes = [2, 3, 4, 4]
    assert len(OPS.align_backward(gradient, random_boxes(2), shapes, [False], [4.0], [3, 2], 2, *RULE)) == 1
    for wrong in (gradient[0], gradient[:1], gradient[:, :1], gradient[:, :, :1], gradient[..., :1]):
        with pytest.raises(RuntimeError, match="output_gradient: expected CUDA"):
            OPS.align_backward(wrong, random_boxes(2), shapes, [False], [4.0], [3, 2], 2, *RULE)
    with pytest.raises(RuntimeError, match="shapes: expected four numbers per map"):
        OPS.align_backward(gradient, random_boxes(2), shapes[:3], [False], [4.0], [3, 2], 2, *RULE)
