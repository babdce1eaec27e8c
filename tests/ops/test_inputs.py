"""Bad input: every refusal names the argument, what was expected and what came, before any kernel runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import pyramid, random_boxes
from torchvision import tv_tensors

from rakd_ops import (
    SoftRoIDistillLoss,
    available_backends,
    level_weights,
    multilevel_roi_align,
    reference,
    soft_roi_distill,
)

MAPS = pyramid()
BOXES = random_boxes(3)
NAN, INF = float("nan"), float("inf")


def with_box(*row: float) -> torch.Tensor:
    return torch.cat([BOXES, torch.tensor([row], dtype=torch.float64)])


# argument -> (value, error, pattern); options of all three functions
OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("strides", (4, 8, 16), ValueError, r"(apprentice|features): expected 3 maps, one per stride, got 4"),
    ("strides", (4, 8, 16, 16), ValueError, r"strides: expected increasing strides"),
    ("strides", (32, 16, 8, 4), ValueError, r"strides: expected increasing strides"),
    ("strides", (4, 8, 16, -32), ValueError, r"strides\[3\]: expected a positive finite number, got -32"),
    ("strides", (4, 8, 16, NAN), ValueError, r"strides\[3\]: .* got nan"),
    ("strides", (4, 8, 16, "32"), TypeError, r"strides\[3\]: expected a number, got str"),
    ("strides", 4, TypeError, r"strides: expected a sequence of numbers, got int"),
    ("strides", (4, 8, 16, 128), ValueError, r"strides: expected strides that fit the maps' heights"),
    ("strides", (4, 16, 32, 64), ValueError, r"strides: expected strides that fit the maps' heights"),
    ("strides", (), ValueError, r"strides: expected 1 to 16 strides, got 0"),
    ("output_size", 0, ValueError, r"output_size: expected an integer of at least 1, got 0"),
    ("output_size", (7, 0), ValueError, r"output_size\[1\]: expected an integer of at least 1, got 0"),
    ("output_size", (7, 7, 7), ValueError, r"output_size: expected one integer or two"),
    ("output_size", 7.0, TypeError, r"output_size: expected an integer, got 7.0"),
    ("sampling_ratio", -1, ValueError, r"sampling_ratio: expected an integer of at least 0, got -1"),
    ("sampling_ratio", 1.5, TypeError, r"sampling_ratio: expected an integer, got 1.5"),
    (
        "sampling_ratio",
        2**63,
        ValueError,
        r"sampling_ratio: expected an integer of at most 10000, got 9223372036854775808",
    ),
    ("output_size", 2**40, ValueError, r"output_size: expected an integer of at most 10000"),
    ("strides", (4, 8, 16, 10**400), ValueError, r"strides\[3\]: expected a positive finite number"),
    ("sampling_ratio", True, TypeError, r"sampling_ratio: expected an integer, got True"),
    (
        "assignment",
        "fuzzy",
        ValueError,
        r"assignment: expected one of 'soft', 'hard', 'uniform', got 'fuzzy'",
    ),
    ("assignment", 1, ValueError, r"assignment: expected one of"),
    ("output_size", b"ab", TypeError, r"output_size: expected an integer, got b'ab'"),
    ("sigma", 0, ValueError, r"sigma: expected a positive finite number, got 0"),
    ("sigma", -1.0, ValueError, r"sigma: expected a positive"),
    ("sigma", NAN, ValueError, r"sigma: .* got nan"),
    ("sigma", "1", TypeError, r"sigma: expected a number, got str"),
    ("canonical_size", 0.0, ValueError, r"canonical_size: expected a positive"),
    ("canonical_level", INF, ValueError, r"canonical_level: expected a finite number, got inf"),
    ("backend", np.array(["cpu", "cpu"]), ValueError, r"backend: expected one of 'auto', 'cuda', .* got array"),
    ("backend", "gpu", ValueError, r"backend: expected one of 'auto', 'cuda', .* got 'gpu'"),
]

BOX_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (with_box(2, 0, 0, 1, 1), ValueError, r"boxes: expected batch indices from 0 to 1, got \[2.0.* in row 3"),
    (with_box(-1, 0, 0, 1, 1), ValueError, r"boxes: expected batch indices from 0 to 1"),
    (with_box(0.5, 0, 0, 1, 1), ValueError, r"boxes: expected whole batch indices, got \[0.5"),
    (with_box(0, NAN, 0, 1, 1), ValueError, r"boxes: expected finite numbers, got \[0.0, nan"),
    (with_box(NAN, 0, 0, 1, 1), ValueError, r"boxes: expected finite numbers"),
    (with_box(0, 0, 0, INF, 1), ValueError, r"boxes: expected finite numbers"),
    (with_box(0, 5, 0, 4, 1), ValueError, r"boxes: expected x1 <= x2 and y1 <= y2, got"),
    (with_box(0, 0, 5, 1, 4), ValueError, r"boxes: expected x1 <= x2"),
    ([BOXES[:, 1:], with_box(0, 5, 0, 4, 1)[:, 1:]], ValueError, r"boxes\[1\]: expected x1 <= x2 .* in row 3"),
    (BOXES[:, 1:], ValueError, r"boxes: expected shape \[K, 5\].* got \[3, 4\]"),
    (BOXES[0], ValueError, r"boxes: expected shape \[K, 5\]"),
    (BOXES.tolist(), ValueError, r"boxes: expected 2 tensors, one per image, got 3"),
    ([BOXES[:, 1:]], ValueError, r"boxes: expected 2 tensors, one per image, got 1"),
    ([BOXES, BOXES], ValueError, r"boxes\[0\]: expected shape \[K, 4\]"),
    ([BOXES[:, 1:].tolist()] * 2, TypeError, r"boxes\[0\]: expected a tensor, got list"),
    (BOXES.bool(), TypeError, r"boxes: expected real numbers, got torch.bool"),
    (BOXES.to(torch.complex64), TypeError, r"boxes: expected real numbers"),
    (BOXES.numpy(), TypeError, r"boxes: expected a tensor, got ndarray"),
    (BOXES.to("meta"), ValueError, r"boxes: expected device cpu as the maps, got meta"),
    (None, TypeError, r"boxes: expected a tensor, got NoneType"),
    (BOXES.to_sparse(), TypeError, r"boxes: expected a dense tensor, got one of layout torch.sparse_coo"),
    (torch.nested.nested_tensor([BOXES], layout=torch.jagged), TypeError, r"boxes: .* got a nested tensor"),
]


def changed(level: int, feature: Any) -> list[Any]:
    return [feature if i == level else m for i, m in enumerate(MAPS)]


MAP_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (MAPS[:3], ValueError, r": expected 4 maps, one per stride, got 3"),
    (MAPS[0], ValueError, r": expected 4 maps, one per stride, got 1"),
    (7, TypeError, r": expected a map, or a sequence or dict of maps, got int"),
    (changed(1, "map"), TypeError, r"\[1\]: expected a tensor, got str"),
    (changed(1, MAPS[1][0]), ValueError, r"\[1\]: expected shape \[B, C, H, W\], got \[5, 8, 12\]"),
    (changed(2, MAPS[2][:1]), ValueError, r"\[2\]: expected 2 images as in .*, got \[1, 5, 4, 6\]"),
    (
        changed(3, MAPS[3].long()),
        TypeError,
        r"\[3\]: expected float32, float64, float16 or bfloat16, got torch.int64",
    ),
    (changed(3, MAPS[3].to_sparse()), TypeError, r"\[3\]: expected a dense map, got one of layout torch.sparse_coo"),
    (changed(3, torch.nested.nested_tensor(list(MAPS[3]), layout=torch.jagged)), TypeError, r"\[3\]: .* nested tensor"),
    (changed(3, MAPS[3][..., :0]), ValueError, r"\[3\]: expected at least one channel, row and column"),
    (changed(3, MAPS[3].to("meta")), ValueError, r"\[3\]: expected device cpu as in .*, got meta"),
    (list(reversed(MAPS)), ValueError, r"strides: expected strides that fit the maps' heights"),
]


@pytest.mark.parametrize(("name", "value", "error", "pattern"), OPTIONS)
def test_options(name: str, value: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        soft_roi_distill(MAPS, MAPS, BOXES, **{name: value})
    with pytest.raises(error, match=pattern):
        multilevel_roi_align(MAPS, BOXES, **{name: value})
    if name != "backend":
        with pytest.raises(error, match=pattern):
            reference.soft_roi_distill(MAPS, MAPS, BOXES, **{name: value})


@pytest.mark.parametrize(("boxes", "error", "pattern"), BOX_ERRORS)
def test_boxes(boxes: Any, error: type[Exception], pattern: str) -> None:
    for function in (soft_roi_distill, reference.soft_roi_distill):
        with pytest.raises(error, match=pattern):
            function(MAPS, MAPS, boxes)
    with pytest.raises(error, match=pattern):
        multilevel_roi_align(MAPS, boxes)


@pytest.mark.parametrize(("maps", "error", "pattern"), MAP_ERRORS)
def test_maps(maps: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=r"(apprentice|strides)" + r".*" + pattern.removeprefix("strides")):
        soft_roi_distill(maps, MAPS, BOXES)
    with pytest.raises(error, match=r"(features|strides)" + r".*" + pattern.removeprefix("strides")):
        multilevel_roi_align(maps, BOXES)
    with pytest.raises(error, match=r"(expert|expert_strides).*" + pattern.removeprefix("strides")):
        soft_roi_distill(MAPS, maps, BOXES)


def test_channels() -> None:
    narrow = changed(2, MAPS[2][:, :4])
    with pytest.raises(ValueError, match=r"expert\[2\]: expected 4 channels as in apprentice\[2\], got .*2, 5, 4, 6"):
        soft_roi_distill(narrow, MAPS, BOXES)
    with pytest.raises(ValueError, match=r"expert\[2\]: expected 5 channels as in apprentice\[2\], got .*2, 4, 4, 6"):
        soft_roi_distill(MAPS, narrow, BOXES)
    assert soft_roi_distill(narrow, narrow, BOXES).item() == 0.0
    remedy = r"features\[2\]: expected 5 channels as in features\[0\], got .*1x1 convolution each"
    with pytest.raises(ValueError, match=remedy):
        multilevel_roi_align(narrow, BOXES)


def test_the_default_strides_are_named_where_the_number_of_maps_differs() -> None:
    message = r"apprentice: expected 4 maps, one per stride, got 3 \(four strides, \(4, 8, 16, 32\), are the default"
    with pytest.raises(ValueError, match=message):
        soft_roi_distill(MAPS[1:], MAPS[1:], BOXES)
    assert soft_roi_distill(MAPS[1:], MAPS[1:], BOXES, strides=(8, 16, 32)).item() == 0.0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_map_alone_is_one_level(backend: str) -> None:
    options = {"strides": (8,), "backend": backend}
    expected = soft_roi_distill([MAPS[1]], [2.0 * MAPS[1]], BOXES, **options)
    assert torch.equal(soft_roi_distill(MAPS[1], 2.0 * MAPS[1], BOXES, **options), expected)
    pooled = multilevel_roi_align(MAPS[1], BOXES, **options)
    assert torch.equal(pooled, multilevel_roi_align([MAPS[1]], BOXES, **options))


def test_boxes_of_tv_tensors_are_read_by_their_format() -> None:
    corners = BOXES[:, 1:]
    size = corners[:, 2:] - corners[:, :2]
    forms = {
        "XYXY": corners,
        "XYWH": torch.cat([corners[:, :2], size], dim=1),
        "CXCYWH": torch.cat([corners[:, :2] + size / 2, size], dim=1),
    }
    plain = [corners, corners[:1]]
    expected = soft_roi_distill(MAPS, [2.0 * m for m in MAPS], plain)
    for name, values in forms.items():
        carried = {"format": name, "canvas_size": (64, 96)}
        wrapped, first = (tv_tensors.BoundingBoxes(rows, **carried) for rows in (values, values[:1]))
        for backend in ("auto", "reference"):
            loss = soft_roi_distill(MAPS, [2.0 * m for m in MAPS], [wrapped, first], backend=backend)
            torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(level_weights([wrapped]), level_weights([corners]))
    small = tv_tensors.BoundingBoxes([[200, 10, 100, 20]], format="XYWH", canvas_size=(400, 400), dtype=torch.uint8)
    assert torch.equal(level_weights([small]), level_weights([torch.tensor([[200.0, 10.0, 300.0, 30.0]])]))
    turned = tv_tensors.BoundingBoxes(torch.rand(1, 5), format="CXCYWHR", canvas_size=(64, 96))
    with pytest.raises(ValueError, match=r"boxes\[0\]: expected boxes in format XYXY, XYWH or CXCYWH, got CXCYWHR"):
        soft_roi_distill(MAPS, MAPS, [turned, turned])


BOX_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)


@pytest.mark.parametrize("dtype", [*BOX_DTYPES, torch.uint8, torch.uint16])
def test_boxes_and_weights_of_any_real_dtype(dtype: torch.dtype) -> None:
    whole = torch.tensor([[1, 8, 4, 40, 60], [0, 0, 16, 96, 48], [1, 3, 5, 24, 12]])
    boxes, weights, levels = whole.to(dtype), torch.tensor([2, 0, 1]), torch.tensor([[1, 0, 2, 1]]).expand(3, 4)
    expert = [2.0 * m for m in MAPS]
    for options in ({}, {"box_weights": weights}, {"level_weights": levels}):
        expected = soft_roi_distill(MAPS, expert, whole.double(), **options, backend="reference")
        typed = {name: value.to(dtype) for name, value in options.items()}
        torch.testing.assert_close(soft_roi_distill(MAPS, expert, boxes, **typed), expected, rtol=1e-12, atol=0)
        lists = [boxes[1:2, 1:], boxes[::2, 1:]]  # rows in another order, views with strides of their own
        order = torch.tensor([1, 0, 2])
        typed = {name: value[order] for name, value in typed.items()}
        torch.testing.assert_close(soft_roi_distill(MAPS, expert, lists, **typed), expected, rtol=1e-12, atol=0)


def test_expert_strides() -> None:
    with pytest.raises(ValueError, match=r"expert_strides: expected 4 strides as in strides, got 3"):
        soft_roi_distill(MAPS, MAPS, BOXES, expert_strides=(4, 8, 16))
    with pytest.raises(ValueError, match=r"expert_strides: expected 4 strides as in strides, got 1"):
        SoftRoIDistillLoss(expert_strides=(4,))
    with pytest.raises(ValueError, match=r"expert_strides: expected strides that fit the maps'"):
        soft_roi_distill(MAPS, MAPS, BOXES, expert_strides=(2, 4, 8, 16))
    twice = pyramid(height=128, width=192)
    wide = pyramid(height=64, width=300)
    with pytest.raises(ValueError, match=r"expert_strides: expected strides that fit the maps' widths"):
        soft_roi_distill(MAPS, wide, BOXES)
    # As padding, which the caller has to state, or as images of another size, which would be misread.
    larger = pyramid(height=64 + 30, width=96 + 20)
    with pytest.raises(ValueError, match=r"expert_strides: .* heights .*; give expert_strides, equal to strides if"):
        soft_roi_distill(MAPS, larger, BOXES)
    assert soft_roi_distill(MAPS, larger, BOXES, expert_strides=(4, 8, 16, 32)).isfinite()
    odd = [torch.rand(2, 3, n, 96 // s) for s, n in ((4, 15), (8, 8), (16, 4), (32, 2))]  # rounded up, and down
    even = [torch.rand(2, 3, n, 96 // s) for s, n in ((4, 16), (8, 7), (16, 3), (32, 2))]
    assert soft_roi_distill(odd, even, BOXES).isfinite()
    with pytest.raises(ValueError, match=r"expert_strides: expected strides that fit"):
        soft_roi_distill(MAPS, twice, BOXES)
    assert soft_roi_distill(MAPS, twice, BOXES, expert_strides=(2, 4, 8, 16)).isfinite()


def test_box_weights_and_reduction() -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (torch.ones(2), ValueError, r"box_weights: expected shape \[3\], one per box, got \[2\]"),
        (torch.ones(3, 1), ValueError, r"box_weights: expected shape \[3\]"),
        (torch.ones(3).to_sparse(), TypeError, r"box_weights: expected a dense tensor, got one of layout torch.sparse"),
        (
            torch.tensor([1.0, NAN, 1.0]),
            ValueError,
            r"box_weights: expected finite numbers, got nan in row 1",
        ),
        ([1.0, 1.0, 1.0], TypeError, r"box_weights: expected a tensor, got list"),
        (torch.ones(3, device="meta"), ValueError, r"box_weights: expected device cpu"),
    ]
    for weights, error, pattern in cases:
        with pytest.raises(error, match=pattern):
            soft_roi_distill(MAPS, MAPS, BOXES, box_weights=weights)
    levels: list[tuple[Any, type[Exception], str]] = [
        (torch.ones(3, 3), ValueError, r"level_weights: expected shape \[3, 4\], one per box and level, got \[3, 3\]"),
        (torch.ones(12), ValueError, r"level_weights: expected shape \[3, 4\]"),
        (torch.ones(3, 4).neg(), ValueError, r"level_weights: expected finite .* not negative, got .* in row 0"),
        (torch.ones(3, 4) / torch.tensor([[1.0], [1.0], [0.0]]), ValueError, r"level_weights: .* in row 2"),
        ([[1.0] * 4] * 3, TypeError, r"level_weights: expected a tensor, got list"),
        (torch.ones(3, 4, requires_grad=True), ValueError, r"level_weights: .*gradient"),
        (torch.ones(3, 4, device="meta"), ValueError, r"level_weights: expected device cpu"),
    ]
    for weights, error, pattern in levels:
        with pytest.raises(error, match=pattern):
            soft_roi_distill(MAPS, MAPS, BOXES, level_weights=weights)
        with pytest.raises(error, match=pattern):
            multilevel_roi_align(MAPS, BOXES, level_weights=weights)
        with pytest.raises(error, match=pattern):
            reference.soft_roi_distill(MAPS, MAPS, BOXES, level_weights=weights)
    with pytest.raises(ValueError, match=r"reduction: expected one of 'mean', 'sum', 'none', got 'max'"):
        soft_roi_distill(MAPS, MAPS, BOXES, reduction="max")


def test_level_weights_checks_too() -> None:
    with pytest.raises(ValueError, match="sigma"):
        level_weights(BOXES, sigma=0)
    with pytest.raises(ValueError, match="x1 <= x2"):
        level_weights(with_box(0, 5, 0, 4, 1))
    with pytest.raises(ValueError, match=r"boxes: expected batch indices of at least 0, got \[-1.0"):
        level_weights(with_box(-1, 0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"boxes: expected shape \[K, 5\]"):
        level_weights(BOXES[:, 1:])
    assert level_weights([BOXES[:2, 1:], BOXES[2:, 1:]]).shape == (3, 4)


def test_a_backend_that_cannot_run_says_why() -> None:
    state = available_backends()
    assert set(state) == {"cuda", "triton", "cpu", "reference"}
    assert state["reference"] is True
    assert state["cpu"] is True, "the compiled CPU library must be there when the tests run"
    for name, reason in state.items():
        assert reason is True or (isinstance(reason, str) and reason)
        if name in ("cuda", "triton"):
            with pytest.raises(RuntimeError, match=f"backend: '{name}' cannot"):
                soft_roi_distill(MAPS, MAPS, BOXES, backend=name)


def test_compiled_code_refuses_what_python_could_not_see() -> None:
    """Under torch.compile values are not looked at in Python; the op itself must still refuse them."""
    compiled = torch.compile(lambda maps, boxes: soft_roi_distill(maps, maps, boxes), fullgraph=True, backend="eager")
    assert compiled(MAPS, BOXES).isfinite()
    wrong = ((2, 0, 0, 1, 1), (-1, 0, 0, 1, 1), (0.5, 0, 0, 1, 1), (0, NAN, 0, 1, 1), (0, 0, 0, INF, 1))
    for row in (*wrong, (0, 50, 40, 4, 1), (0, 4, 40, 50, 1)):
        with pytest.raises(RuntimeError, match="boxes: expected"):
            compiled(MAPS, with_box(*row))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_refuses_strides_that_do_not_fit(dynamic: bool | None) -> None:
    """Sizes may be unknown while tracing; the op sees them."""
    torch.compiler.reset()

    def loss(maps: Any, expert: Any, strides: Any, expert_strides: Any) -> torch.Tensor:
        return soft_roi_distill(maps, expert, BOXES, strides=strides, expert_strides=expert_strides)

    def pooled(maps: Any, strides: Any) -> torch.Tensor:
        return multilevel_roi_align(maps, BOXES, strides=strides)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="eager")
    own, twice = (4, 8, 16, 32), (2, 4, 8, 16)
    larger = [m.repeat(1, 1, 2, 2) for m in MAPS]
    torch.testing.assert_close(compiled(MAPS, larger, own, twice), loss(MAPS, larger, own, twice))
    for maps, expert, strides, expert_strides, name in (
        (MAPS[::-1], MAPS[::-1], own, own, "strides"),
        (MAPS, MAPS[::-1], own, own, "expert_strides"),
        (MAPS, larger, own, own, "expert_strides"),
        (MAPS, MAPS, own, twice, "expert_strides"),
    ):
        with pytest.raises(RuntimeError, match=rf"[ ,]{name}: expected strides that fit the maps"):
            compiled(maps, expert, strides, expert_strides)
    align = torch.compile(pooled, fullgraph=True, dynamic=dynamic, backend="eager")
    torch.testing.assert_close(align(MAPS, own), pooled(MAPS, own))
    with pytest.raises(RuntimeError, match=r"[ ,]strides: expected strides that fit the maps"):
        align(MAPS[::-1], own)


def test_compiled_numbers_are_checked() -> None:
    torch.compiler.reset()
    annealed = torch.compile(lambda sigma: soft_roi_distill(MAPS, MAPS, BOXES, sigma=sigma), backend="eager")
    for sigma in (1.0, 0.9, 0.8):
        annealed(sigma)
    for sigma in (-0.5, 0.0):
        with pytest.raises(ValueError, match="sigma: expected a positive finite number"):
            annealed(sigma)
    for name, step in (
        ("sigma", lambda: soft_roi_distill(MAPS, MAPS, BOXES, sigma=0.0)),
        ("sigma", lambda: soft_roi_distill(MAPS, MAPS, BOXES, sigma=-1.0)),
        ("sigma", lambda: soft_roi_distill(MAPS, MAPS, BOXES, sigma=NAN)),
        ("canonical_size", lambda: soft_roi_distill(MAPS, MAPS, BOXES, canonical_size=0)),
    ):
        torch.compiler.reset()
        with pytest.raises(ValueError, match=f"{name}: expected a positive finite number"):
            torch.compile(step, backend="eager")()


def test_numpy_numbers_are_numbers() -> None:
    options = {
        "output_size": np.int64(3),
        "sampling_ratio": np.int32(1),
        "sigma": np.float32(0.5),
        "canonical_level": np.int64(3),
    }
    plain = {"output_size": 3, "sampling_ratio": 1, "sigma": 0.5, "canonical_level": 3}
    expert = [2.0 * m for m in MAPS]
    loss = soft_roi_distill(MAPS, expert, BOXES, **options)
    assert torch.equal(loss, soft_roi_distill(MAPS, expert, BOXES, **plain))
    assert not torch.equal(loss, soft_roi_distill(MAPS, expert, BOXES))


def test_options_of_the_module_may_be_assigned_anew() -> None:
    expert = [2.0 * m for m in MAPS]
    module = SoftRoIDistillLoss()
    first = module(MAPS, expert, BOXES)
    module.sigma = 0.5  # annealed
    assert torch.equal(module(MAPS, expert, BOXES), soft_roi_distill(MAPS, expert, BOXES, sigma=0.5))
    assert not torch.equal(module(MAPS, expert, BOXES), first)
    module.sigma = -1.0
    with pytest.raises(ValueError, match="sigma: expected a positive finite number"):
        module(MAPS, expert, BOXES)


def test_maps_of_several_dtypes_are_pooled_in_the_widest() -> None:
    mixed = [m.to(dtype) for m, dtype in zip(MAPS, (torch.float32, torch.bfloat16) * 2, strict=True)]
    pooled = multilevel_roi_align(mixed, BOXES)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, multilevel_roi_align([m.float() for m in mixed], BOXES))
