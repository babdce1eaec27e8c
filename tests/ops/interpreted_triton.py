"""The Triton kernels against the reference, in Triton's interpreter on the CPU: small shapes, every option.

``test_triton_interpreted.py`` runs this file in a process of its own, where TRITON_INTERPRET=1 is set before
triton is imported. By hand: ``TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, pyramid, random_boxes
from test_backends import check_align, check_distill
from triton.runtime import interpreter

from rakd_ops import _library, available_backends, multilevel_roi_align, reference, soft_roi_distill
from rakd_ops._triton import operations, preparation
from rakd_ops.levels import ASSIGNMENTS, weigh_levels

STRIDES = (2.0, 4.0)
HEIGHT, WIDTH = 10, 18
INF, NAN = math.inf, math.nan
OPS = torch.ops.rakd_ops

# numpy's, of the interpreter, about boxes that overflow
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def language_patched_once_a_launch() -> Iterator[None]:
    """The interpreter patches Triton's language anew in every call inside a kernel, a third of these tests' time."""
    if not hasattr(interpreter, "_LangPatchScope"):  # of another Triton, which may patch in another way
        yield
        return
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        patched.clear()  # what a launch patches it takes back at its end
        launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


def small_case(boxes: torch.Tensor | None = None, **changes: Any) -> Case:
    options = {
        "strides": STRIDES,
        "output_size": (2, 3),
        "sampling_ratio": 2,
        "assignment": "soft",
        "canonical_size": 8.0,
        "canonical_level": 1,
    }
    options |= {key: changes.pop(key) for key in list(changes) if key in options}
    call: dict[str, Any] = {
        "batch": 2,
        "channels": 3,
        "height": HEIGHT,
        "width": WIDTH,
        "strides": options["strides"],
        "layouts": ("contiguous", "contiguous"),
        "expert_scale": 1.0,
        "boxes": random_boxes(3, 2, HEIGHT, WIDTH, seed=2) if boxes is None else boxes,
        "box_weights": None,
        "options": options,
    }
    return Case(**{**call, **changes})


def rows(*boxes: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 5)


def test_backend_says_it_is_there() -> None:
    assert available_backends()["triton"] is True
    assert OPS.triton_align.default is not OPS.align.default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    case = small_case(random_boxes(2, 2, HEIGHT, WIDTH, seed=2), strides=(2.0,), output_size=(2, 2))
    check_distill(case, dtype, "triton")
    check_align(case, dtype, "triton")


@pytest.mark.parametrize(
    "changes",
    [
        {
            "layouts": ("channels_last", "strided"),
            "sampling_ratio": 0,
            "assignment": "hard",
            "reduction": "none",
        },
        {
            "layouts": ("strided", "transposed"),
            "sampling_ratio": 1,
            "assignment": "uniform",
            "reduction": "sum",
        },
        {
            "layouts": ("transposed", "channels_last"),
            "expert_scale": 1.5,
            "sampling_ratio": 3,
            "channels": 1,
            "strides": (2.0,),
        },
        {
            "expert_scale": 0.5,
            "sampling_ratio": 0,
            "box_weights": torch.tensor([2.0, -0.5, 0.0]).double(),
            "strides": (4.0,),
        },
        {"strides": (3.7,), "output_size": (1, 9), "batch": 1, "boxes": rows((0, 1, 2, 15, 9))},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_options(changes: dict[str, Any]) -> None:
    case = small_case(**changes)
    check_distill(case, torch.float64, "triton")
    check_align(case, torch.float64, "triton")


@pytest.mark.parametrize(("ratio", "strides"), [(0, (2.0,)), (2, STRIDES)])
def test_unusual_boxes(ratio: int, strides: tuple[float, ...]) -> None:
    """Outside, of no area, on cells' borders, far larger than the image, and an image without boxes."""
    boxes = rows(
        (1, -90, -90, -80, -80),
        (1, 5, 5, 5, 5),
        (1, -1, -1, 13, 7),
        (1, -1e3, -50, 1e3, 60),
        (1, 17, 9, 19, 11),
    )
    case = small_case(boxes, sampling_ratio=ratio, strides=strides)
    check_distill(case, torch.float64, "triton")
    check_align(case, torch.float64, "triton")


def test_no_boxes() -> None:
    case = small_case(rows())
    check_distill(case, torch.float64, "triton")
    check_align(case, torch.float64, "triton")


def test_more_than_one_block_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels, boxes, bins and a bin's cells beyond the kernels' block sizes, made small for that."""
    for module, names in (
        (preparation, ("BOX_BLOCK", "CELL_BLOCK")),
        (operations, ("BIN_BLOCK", "POOL_CHANNELS", "GATHER_CHANNELS")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 2)
    for ratio in (0, 1):
        boxes = rows((0, -1, -1, 18, 10), (0, 1, 0.5, 17, 9), (0, 5, 3, 9, 6))
        case = small_case(boxes, strides=(3.0,), batch=1, sampling_ratio=ratio)
        check_distill(case, torch.float64, "triton")
        check_align(case, torch.float64, "triton")


def raw_arguments(boxes: torch.Tensor, ratio: int) -> tuple[Any, ...]:
    # Maps between NaN: what is read beside them shows.
    maps = pyramid(2, 2, HEIGHT, WIDTH, (4.0,), layout="strided")
    expert = pyramid(2, 2, HEIGHT, WIDTH, (4.0,), layout="strided", seed=1)
    coefficients = torch.linspace(0.5, 1.0, len(boxes), dtype=torch.float64)
    return maps, expert, boxes, coefficients, [4.0], [4.0], [2, 1], ratio, 0, 1.0, 8.0, 1.0


@pytest.mark.parametrize("ratio", [0, 2])
def test_any_numbers_as_boxes(ratio: int) -> None:
    """The ops themselves take any numbers: senseless boxes count as zero, the others as ever."""
    good = rows((0, 2, 2, 12, 9), (1, 3, 1, 7, 11))
    bad = rows(
        (0, NAN, 1, 5, 5),
        (0, 1, 1, NAN, 5),
        (0, -INF, 1, INF, 5),
        (0, 1, 1, 5, INF),
        (0, 1e308, 1, -1e308, 5),
        (2, 1, 1, 5, 5),
        (-1, 1, 1, 5, 5),
        (0.5, 1, 1, 5, 5),
        (NAN, 1, 1, 5, 5),
        (INF, 1, 1, 5, 5),
        (1e300, 1, 1, 5, 5),
    )
    boxes = torch.cat([good[:1], bad, good[1:]])
    kept = [0, len(boxes) - 1]
    arguments = raw_arguments(boxes, ratio)
    total, losses = OPS.triton_distill_loss(*arguments)
    assert losses[1:-1].tolist() == [0.0] * len(bad)
    alone = (*arguments[:2], good, arguments[3][kept], *arguments[4:])
    expected, expected_losses = OPS.triton_distill_loss(*alone)
    assert torch.equal(losses[kept], expected_losses) and torch.equal(total, expected)
    _, gradients = OPS.triton_distill_gradient(*arguments, True, False)
    _, expected_gradients = OPS.triton_distill_gradient(*alone, True, False)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(got, wanted)
    pooled = OPS.triton_align(arguments[0], boxes, *arguments[4:5], *arguments[6:])
    assert not pooled[1:-1].any() and bool(pooled.isfinite().all())


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_reversed_and_enormous_boxes_are_finite(ratio: int) -> None:
    boxes = rows((0, 15, 9, 2, 1), (1, -1e30, -1e30, 1e30, 1e30), (1, 1e30, 1e30, 1e30, 1e30), (0, 0, 5, 1e17, 6))
    arguments = raw_arguments(boxes, ratio)
    total, gradients = OPS.triton_distill_gradient(*arguments, True, False)
    assert bool(total.isfinite()) and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("assignment", range(3))
@pytest.mark.parametrize("sigma", [1.0, 5e-324])
def test_level_weights(assignment: int, sigma: float) -> None:
    sides = torch.tensor([0.0, 1.0, 55.999999999, 56.0, 112.0, 113.0, 224.0, 448.0, 1e5, 1e200], dtype=torch.float64)
    boxes = torch.zeros(len(sides), 5, dtype=torch.float64)
    boxes[:, 3] = sides
    boxes[:, 4] = sides
    strides = (4.0, 8.0, 16.0, 32.0)
    rule = preparation.Rule(assignment, sigma, 224.0, 4.0)
    scales = preparation.Scales.of(boxes, None, 1, strides, rule, 1.0)
    expected = weigh_levels(boxes, strides, ASSIGNMENTS[assignment], sigma, 224.0, 4.0)
    torch.testing.assert_close(scales.values, expected, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_rows_of_the_factors(ratio: int) -> None:
    """Each bin's weights, and the cells listed for it, are the reference's; border samples included."""
    boxes = torch.cat([rows((0, -1, -1, 3, 4), (0, -7, 0, 47, 9), (0, 4, 4, 4, 4)), random_boxes(4, 1, 24, 40, seed=5)])
    stride, size, bins = 2.0, (12, 20), (3, 2)
    built = preparation.Bins.of(boxes, [(1, 1, *size)], [stride], bins, ratio, torch.float64)
    line, offset = 0, 0
    for axis in range(2):
        low, high = boxes[:, 2 - axis], boxes[:, 4 - axis]
        expected = reference.axis_matrix(low, high, stride, size[axis], bins[axis], ratio)
        for p in range(bins[axis]):
            for k in range(len(boxes)):
                first, end = built.spans[:, 0, k, line].tolist()
                row = torch.zeros(size[axis], dtype=torch.float64)
                row[first:end] = built.weights[k, offset + first : offset + end]
                torch.testing.assert_close(row, expected[k, p], rtol=1e-14, atol=1e-16)
                if built.taps and end - first > built.taps:
                    listed = [cell for cell in built.cells[0, k, line].tolist() if cell >= 0]
                    assert listed == row.nonzero()[:, 0].tolist()
                if first < end:
                    box_first, box_end = built.extents[2 * axis : 2 * axis + 2, 0, k].tolist()
                    assert box_first <= first and end <= box_end
            line += 1
            offset += size[axis]


def test_same_bits_in_every_run() -> None:
    arguments = raw_arguments(random_boxes(3, 2, HEIGHT, WIDTH), 2)
    first, second = (OPS.triton_distill_gradient(*arguments, True, True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_opcheck() -> None:
    maps = pyramid(1, 2, 8, 8, (2.0,), torch.float32, "channels_last")
    boxes = rows((0, 1, 1, 6, 7))
    geometry = ([2, 1], 1, 0, 1.0, 8.0, 1.0)
    distill = (maps, maps, boxes, torch.ones(1, dtype=torch.float64), [2.0], [2.0], *geometry)
    torch.library.opcheck(OPS.triton_distill_loss.default, distill)
    torch.library.opcheck(OPS.triton_distill_gradient.default, (*distill, True, True))
    torch.library.opcheck(OPS.triton_align.default, (maps, boxes, [2.0], *geometry))
    shapes = list(maps[0].shape)
    backward = (
        torch.rand(1, 2, 2, 1),
        boxes,
        shapes,
        [_library._is_channels_last(maps[0])],
        [2.0],
        *geometry,
    )
    torch.library.opcheck(OPS.triton_align_backward.default, backward)


def test_compile_fullgraph() -> None:
    maps = pyramid(1, 2, 8, 8, (2.0,), torch.float32, requires_grad=True)
    expert = pyramid(1, 2, 8, 8, (2.0,), torch.float32, seed=1)
    options: dict[str, Any] = {"strides": (2.0,), "output_size": 2, "backend": "triton"}

    def step(boxes: torch.Tensor) -> torch.Tensor:
        loss = soft_roi_distill(maps, expert, boxes, **options)
        return loss + multilevel_roi_align(maps, boxes, **options).square().sum()

    boxes = rows((0, 1, 1, 6, 7), (0, 0, 2, 8, 5))
    expected = torch.autograd.grad(step(boxes), maps)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(boxes), maps), expected)
