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
    """How often a call launches."""
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
        assert launches(lambda n=output_size: step(maps, expert, boxes, output_size=n)) == wanted
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
