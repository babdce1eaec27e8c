"""Every backend against the reference in float64: one suite for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DEVICE_OF, LAYOUTS, Case, assert_close, backend_params, cases, pyramid, random_boxes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rakd_ops import multilevel_roi_align, reference, soft_roi_distill

# float32 against a float64 computation on the same values; halves are rounded on output only, so that the loss of half
# maps is as good as that of float32 ones.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
SUBNORMAL = 1e-6  # float16 is no finer than this, however small a gradient
BACKENDS = backend_params("cpu", "cuda", "triton")
CAREFUL = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BRIEF = settings(CAREFUL, max_examples=40)


def weigh(loss: torch.Tensor) -> torch.Tensor:
    """A scalar that gives each entry of a loss its own factor; large enough for float16's range."""
    return (
        loss * torch.linspace(50.0, 100.0, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    ).sum()


def to_device(options: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


Dtypes = torch.dtype | Sequence[torch.dtype]  # one for all levels, or one each


def check_distill(case: Case, dtype: Dtypes, backend: str, expert_dtype: Dtypes | None = None) -> None:
    device = DEVICE_OF[backend]
    maps = case.maps(dtype, device, expert_dtype)
    dtypes = [m.dtype for side in maps for m in side]
    computed = torch.float64 if torch.float64 in dtypes else torch.float32
    exact = [[m.detach().cpu().double().requires_grad_() for m in side] for side in maps]
    boxes = case.boxes.to(device)
    options = case.distill_options()
    expected = reference.soft_roi_distill(*exact, case.boxes, **options)
    expected_gradients = torch.autograd.grad(weigh(expected), exact[0] + exact[1])
    options = to_device(options, device)
    loss = soft_roi_distill(*maps, boxes, **options, backend=backend)
    gradients = torch.autograd.grad(weigh(loss), maps[0] + maps[1])
    assert loss.dtype == computed
    # Weights of either sign may cancel: errors are judged by the loss and gradients with their magnitudes.
    scale, gradient_scales = expected.detach(), expected_gradients
    if case.box_weights is not None:
        magnitudes = {**case.distill_options(), "box_weights": case.box_weights.abs()}
        scale = reference.soft_roi_distill(*exact, case.boxes, **magnitudes)
        gradient_scales = torch.autograd.grad(weigh(scale), exact[0] + exact[1])
    assert_close(loss, expected, scale, TOLERANCE[computed])
    for got, wanted, size, kind in zip(gradients, expected_gradients, gradient_scales, dtypes, strict=True):
        assert got.dtype == kind
        tolerance = max(TOLERANCE[kind], TOLERANCE[computed])
        assert_close(got, wanted, size, tolerance, SUBNORMAL if kind == torch.float16 else 0.0)
    # The value without gradients comes from another kernel path.
    with torch.no_grad():
        alone = soft_roi_distill(*maps, boxes, **options, backend=backend)
    assert_close(alone, expected, scale, TOLERANCE[computed])


def check_align(case: Case, dtype: torch.dtype, backend: str) -> None:
    device = DEVICE_OF[backend]
    case = case.one_width()
    maps, _ = case.maps(dtype, device)
    exact = [m.detach().cpu().double().requires_grad_() for m in maps]
    options = case.align_options()
    expected = reference.multilevel_roi_align(exact, case.boxes, **options)
    expected_gradients = torch.autograd.grad(weigh(expected), exact)
    output = multilevel_roi_align(maps, case.boxes.to(device), **to_device(options, device), backend=backend)
    assert output.dtype == dtype
    slack = SUBNORMAL if dtype == torch.float16 else 0.0
    assert_close(output, expected, expected, TOLERANCE[dtype], slack)
    factors = torch.linspace(50.0, 100.0, output.numel(), dtype=torch.float64, device=device).view(output.shape)
    factors = factors.transpose(2, 3).contiguous().transpose(2, 3)  # a gradient may have any layout
    gradients = torch.autograd.grad(output, maps, factors.to(dtype))
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(got, wanted, wanted, TOLERANCE[dtype], slack)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@CAREFUL
def test_distill_float64(backend: str, case: Case) -> None:
    check_distill(case, torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(case=cases())
@BRIEF
def test_distill_other_dtypes(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_distill(case, dtype, backend)


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), data=st.data())
@BRIEF
def test_distill_dtype_pairs(backend: str, case: Case, data: st.DataObject) -> None:
    """Expert, apprentice and levels may each have a dtype; each gradient has its map's."""
    dtypes = st.lists(DTYPES, min_size=len(case.strides), max_size=len(case.strides))
    check_distill(case, data.draw(st.one_of(DTYPES, dtypes)), backend, data.draw(st.one_of(DTYPES, dtypes)))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@CAREFUL
def test_align_float64(backend: str, case: Case) -> None:
    check_align(case, torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(case=cases())
@BRIEF
def test_align_other_dtypes(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_align(case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output_size", [7, 19])
def test_realistic_sizes(backend: str, layout: str, dtype: torch.dtype, output_size: int) -> None:
    """Many overlapping boxes and enough channels for whole vector blocks, as in training."""
    # Each pair of the other three meets both: the maps of a level have no more to do with another level's.
    odd = LAYOUTS.index(layout) + (dtype == torch.float32) + (output_size == 7)
    channels = (24, 40, 70, 130) if odd % 2 else 70
    case = Case(
        2, channels, 96, 192, (4, 8, 16, 32), (layout, layout), 1.0, random_boxes(60, 2, 96, 192, seed=3), None,
        {"output_size": output_size},
    )  # fmt: skip
    check_distill(case, dtype, backend)
    check_align(case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output_size", [3, 17])
def test_other_strides_of_an_expert_of_the_same_shape(backend: str, output_size: int) -> None:
    """Maps of 2 x 3 cells either way, that lie elsewhere."""
    options = {"strides": (4,), "output_size": output_size}
    case = Case(1, 3, 5, 9, (4,), ("contiguous",) * 2, 0.75, random_boxes(4, 1, 5, 9), None, options)
    maps, expert = case.maps(torch.float64)
    assert case.expert_strides == (3.0,) and maps[0].shape == expert[0].shape
    check_distill(case, torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_layout_follows_the_map(backend: str) -> None:
    for layout, channels_last in (("contiguous", False), ("channels_last", True)):
        maps = pyramid(layout=layout, device=DEVICE_OF[backend], requires_grad=True)
        boxes = random_boxes(4).to(DEVICE_OF[backend])
        loss = soft_roi_distill(maps, [m.detach() * 2 for m in maps], boxes, backend=backend)
        pooled = multilevel_roi_align(maps, boxes, backend=backend)
        for gradient in (*torch.autograd.grad(loss, maps), *torch.autograd.grad(pooled.sum(), maps)):
            expected = torch.channels_last if channels_last else torch.contiguous_format
            assert gradient.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_in_every_run(backend: str) -> None:
    device = DEVICE_OF[backend]
    maps = pyramid(channels=40, dtype=torch.float32, device=device, requires_grad=True)
    expert = pyramid(channels=40, dtype=torch.float32, device=device, seed=1)
    boxes = random_boxes(50).to(device)

    def run() -> list[torch.Tensor]:
        loss = soft_roi_distill(maps, expert, boxes, backend=backend)
        pooled = multilevel_roi_align(maps, boxes, backend=backend)
        return [
            loss,
            pooled,
            *torch.autograd.grad(loss, maps),
            *torch.autograd.grad(pooled.square().sum(), maps),
        ]

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
