"""The Triton backend against the reference, in Triton's interpreter on the CPU: small shapes, every option.

``test_triton_interpreted.py`` runs this file in a process of its own, where TRITON_INTERPRET=1 is set before
triton is imported. By hand: ``TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Case, as_layout, assert_close, pyramid, random_boxes
from test_backends import check_align, check_distill, weigh
from torch import Tensor
from triton import language
from triton.runtime import interpreter

from rakd_ops import available_backends, multilevel_roi_align, reference, soft_roi_distill
from rakd_ops._layout import is_channels_last
from rakd_ops._triton import launch

STRIDES = (2.0, 4.0)
HEIGHT, WIDTH = 10, 18
INF, NAN = math.inf, math.nan
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
OPS = torch.ops.rakd_ops

# numpy's, of the interpreter, about boxes that overflow
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def language_patched_once_a_launch() -> Iterator[None]:
    """The interpreter patches Triton's language anew in every call inside a kernel, a third of these tests' time.

    A tenth goes into a table of dtypes that it makes anew for every constant.
    """
    if not hasattr(interpreter, "_LangPatchScope"):  # of another Triton, which may patch in another way
        yield
        return
    patch, launch_grid, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    make_dtype = interpreter._get_np_dtype
    dtype_of_scalar = functools.cache(make_dtype)

    def np_dtype(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, language.block_type) else kind  # a block has no hash
        return make_dtype(scalar) if isinstance(scalar, language.pointer_type) else dtype_of_scalar(scalar)

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        patched.clear()  # a launch takes back what it patched at its end
        launch_grid(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


def small_case(boxes: Tensor | None = None, **changes: Any) -> Case:
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


def box_rows(*boxes: tuple[float, ...]) -> Tensor:
    return torch.tensor(boxes, dtype=DOUBLE).reshape(-1, 5)


def maps_of(
    channels: Sequence[int],
    dtypes: Sequence[torch.dtype],
    layouts: Sequence[str] = ("contiguous",),
    scale: float = 1.0,
    seed: int = 0,
) -> list[Tensor]:
    """Maps of two images on ``STRIDES``, or on its first; each level has channels, dtype and layout of its own."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for level, many in enumerate(channels):
        step = STRIDES[level] * scale
        shape = (2, many, math.ceil(HEIGHT / step), math.ceil(WIDTH / step))
        feature = torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtypes[level % len(dtypes)])
        maps.append(as_layout(feature, layouts[level % len(layouts)]).requires_grad_())
    return maps


def check_pair(
    maps: list[Tensor], expert: list[Tensor], boxes: Any, tolerances: dict[torch.dtype, float], **options: Any
) -> None:
    """Loss and gradients against the reference in float64; each gradient has its map's dtype and layout."""
    options = {"strides": STRIDES[: len(maps)], "output_size": (2, 3), "canonical_size": 8.0, "canonical_level": 1} | (
        options
    )
    every = maps + expert
    exact = [m.detach().double().requires_grad_() for m in every]
    expected = reference.soft_roi_distill(exact[: len(maps)], exact[len(maps) :], boxes, **options)
    expected_gradients = torch.autograd.grad(weigh(expected), exact)
    loss = soft_roi_distill(maps, expert, boxes, **options, backend="triton")
    assert loss.dtype == (DOUBLE if any(m.dtype == DOUBLE for m in every) else FLOAT)
    assert_close(loss, expected, expected, tolerances[loss.dtype])
    gradients = torch.autograd.grad(weigh(loss), every)
    for feature, got, wanted in zip(every, gradients, expected_gradients, strict=True):
        assert got.dtype == feature.dtype
        layout = torch.channels_last if is_channels_last(feature) else torch.contiguous_format
        assert got.is_contiguous(memory_format=layout)
        # float16 is no finer than 1e-6, however small a gradient.
        assert_close(got, wanted, wanted, tolerances[got.dtype], 1e-6 if got.dtype == HALF else 0.0)


GOOD = box_rows((0, 2, 2, 12, 9), (1, 3, 1, 7, 10), (0, 1, 0, 15, 8))
SINGLE = {DOUBLE: 1e-5, FLOAT: 1e-5, HALF: 1e-2, BFLOAT: 1e-2}
EXACT = {DOUBLE: 1e-12, FLOAT: 1e-6, HALF: 1e-2, BFLOAT: 1e-2}  # where any map is float64


def test_backend_says_it_is_there() -> None:
    assert available_backends()["triton"] is True
    assert OPS.triton_align.default is not OPS.align.default


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, HALF, BFLOAT])
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
        {"strides": (3.7,), "output_size": (1, 9), "batch": 1, "boxes": box_rows((0, 1, 2, 15, 9))},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_options(changes: dict[str, Any]) -> None:
    case = small_case(**changes)
    check_distill(case, DOUBLE, "triton")
    check_align(case, DOUBLE, "triton")


@pytest.mark.parametrize(("channels", "expert_scale"), [((1, 5), 1.0), ((4, 2), 0.5)])
def test_channels_per_level(channels: tuple[int, ...], expert_scale: float) -> None:
    maps = maps_of(channels, (DOUBLE,), ("channels_last", "contiguous"))
    expert = maps_of(channels, (DOUBLE,), ("strided",), expert_scale, seed=1)
    expert_strides = [s * expert_scale for s in STRIDES]
    check_pair(maps, expert, random_boxes(3, 2, HEIGHT, WIDTH, seed=2), EXACT, expert_strides=expert_strides)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ((FLOAT,), (BFLOAT,)),
        ((HALF,), (FLOAT,)),
        ((BFLOAT,), (HALF,)),
        ((DOUBLE,), (HALF,)),
        ((BFLOAT,), (DOUBLE,)),
        ((BFLOAT, FLOAT), (FLOAT, HALF)),  # levels differ as well
        ((FLOAT, FLOAT), (HALF, DOUBLE)),
    ],
    ids=lambda dtypes: "+".join(str(dtype)[6:] for dtype in dtypes),
)
def test_dtype_pairs(own: tuple[torch.dtype, ...], other: tuple[torch.dtype, ...]) -> None:
    channels = (3, 2)[: len(own)]
    maps, expert = maps_of(channels, own, ("channels_last", "transposed")), maps_of(channels, other, seed=1)
    tolerances = EXACT if DOUBLE in own + other else SINGLE
    check_pair(maps, expert, random_boxes(2, 2, HEIGHT, WIDTH, seed=2), tolerances)


def test_own_level_weights_and_boxes_in_any_order() -> None:
    """Rows [K, 5] that go back and forth between images, and a list per image, with weights of the caller's."""
    boxes = box_rows((1, 2, 2, 12, 9), (0, 3, 1, 7, 10), (1, 0, 0, 5, 5), (0, 6, 2, 17, 8))
    weights = torch.tensor([[0.5, 2.0], [0.0, 1.5], [1.0, 0.0], [0.25, 0.75]], dtype=FLOAT)
    maps, expert = maps_of((2, 3), (DOUBLE,)), maps_of((2, 3), (DOUBLE,), seed=1)
    check_pair(maps, expert, boxes, EXACT, level_weights=weights, reduction="none")
    listed = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    check_pair(maps, expert, listed, EXACT, level_weights=weights[[1, 3, 0, 2]])
    features = maps_of((2, 2), (DOUBLE,))
    options: dict[str, Any] = {"strides": STRIDES, "output_size": 2, "level_weights": weights}
    expected = reference.multilevel_roi_align(features, boxes, **options)
    pooled = multilevel_roi_align(features, boxes, **options, backend="triton")
    assert_close(pooled, expected, expected, 1e-12)
    wanted = torch.autograd.grad(weigh(expected), features)
    for got, exact in zip(torch.autograd.grad(weigh(pooled), features), wanted, strict=True):
        assert_close(got, exact, exact, 1e-12)


@pytest.mark.parametrize(("ratio", "strides"), [(0, (2.0,)), (2, STRIDES)])
def test_unusual_boxes(ratio: int, strides: tuple[float, ...]) -> None:
    """Outside, of no area, on cells' borders, far larger than the image, and an image without boxes."""
    boxes = box_rows(
        (1, -90, -90, -80, -80),
        (1, 5, 5, 5, 5),
        (1, -1, -1, 13, 7),
        (1, -1e3, -50, 1e3, 60),
        (1, 17, 9, 19, 11),
    )
    case = small_case(boxes, sampling_ratio=ratio, strides=strides)
    check_distill(case, DOUBLE, "triton")
    check_align(case, DOUBLE, "triton")


def test_samples_that_rounding_brings_onto_the_map_count() -> None:
    """Bins so small that many samples fall on one number, at a position where the map ends."""
    ends = ((-1.0, HEIGHT + 1.0), (-1.0, WIDTH + 1.0))
    spans = [[(x - 2.0**-48, x + n * 2.0**-48) for x in axis for n in (0, 2)] for axis in ends]
    rows = [(1, x1, 2, x2, 5) for x1, x2 in spans[1]] + [(1, 2, y1, 5, y2) for y1, y2 in spans[0]]
    check_align(small_case(box_rows(*rows), sampling_ratio=100, strides=(2.0,), output_size=(1, 1)), DOUBLE, "triton")


def test_no_boxes() -> None:
    case = small_case(box_rows())
    check_distill(case, DOUBLE, "triton")
    check_align(case, DOUBLE, "triton")


@pytest.mark.parametrize("ratio", [0, 1])
def test_more_than_one_block_of_everything(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels, boxes, bins and a bin's cells beyond the kernels' block sizes, made small for that."""
    for name in ("BOX_BLOCK", "CELL_BLOCK", "BIN_BLOCK", "POOL_CHANNELS", "GATHER_CHANNELS"):
        monkeypatch.setattr(launch, name, 2)
    boxes = box_rows((0, -1, -1, 18, 10), (0, 1, 0.5, 17, 9), (0, 5, 3, 9, 6))
    case = small_case(boxes, strides=(3.0,), batch=1, sampling_ratio=ratio)
    check_distill(case, DOUBLE, "triton")
    check_align(case, DOUBLE, "triton")
    if ratio == 0:  # blocks of channels have nothing to do with samples
        maps, expert = maps_of((1, 5), (DOUBLE,)), maps_of((1, 5), (DOUBLE,), seed=1)
        check_pair(maps, expert, boxes, EXACT, sampling_ratio=ratio)


def test_faulty_boxes_and_weights_of_the_public_functions() -> None:
    """What the preparation makes of them: zero; in the mean they count."""
    bad = box_rows(
        (0, 1, NAN, 5, 5), (0, 1, 1, INF, 5), (0, 15, 9, 2, 1), (1, 9, 1, 4, 5), (2, 1, 1, 5, 5), (0.5, 1, 1, 5, 5)
    )
    boxes = torch.cat([GOOD[:2], bad, GOOD[2:]])
    maps, expert = maps_of((2, 3), (DOUBLE,)), maps_of((2, 3), (DOUBLE,), seed=1)
    options: dict[str, Any] = {"strides": STRIDES, "output_size": 2, "backend": "triton"}
    loss = soft_roi_distill(maps, expert, boxes, **options)
    weights = torch.ones(len(boxes))
    weights[1] = NAN
    without = soft_roi_distill(maps, expert, boxes, box_weights=weights, **options)
    for value, good in ((loss, GOOD), (without, GOOD[[0, 2]])):
        expected = soft_roi_distill(maps, expert, good, **options, reduction="sum") / len(boxes)
        assert_close(value, expected, expected, 1e-14)
        wanted = torch.autograd.grad(expected, maps + expert)
        for got, exact in zip(torch.autograd.grad(value, maps + expert), wanted, strict=True):
            assert_close(got, exact, exact, 1e-14)


def test_compile_fullgraph() -> None:
    maps = pyramid(1, 2, 8, 8, (2.0,), FLOAT, requires_grad=True)
    expert = pyramid(1, 2, 8, 8, (2.0,), BFLOAT, seed=1)
    options: dict[str, Any] = {"strides": (2.0,), "output_size": 2, "backend": "triton"}

    def step(boxes: Tensor) -> Tensor:
        loss = soft_roi_distill(maps, expert, boxes, **options)
        return loss + multilevel_roi_align(maps, boxes, **options).square().sum()

    boxes = box_rows((0, 1, 1, 6, 7), (0, 0, 2, 8, 5))
    expected = torch.autograd.grad(step(boxes), maps)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(boxes), maps), expected)
