"""The specification itself: against torchvision, and against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, cases, pyramid, random_boxes
from hypothesis import HealthCheck, given, settings
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from rakd_ops import level_weights, multilevel_roi_align, reference, soft_roi_distill

CAREFUL = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BACKENDS = ("cpu", "reference")


@given(case=cases())
@CAREFUL
def test_pooling_is_torchvisions(case: Case) -> None:
    maps, _ = case.maps(torch.float64)
    options = case.options
    stride = options["strides"][0]
    # torchvision multiplies by the scale, so positions agree to rounding, and at the border of the map a sample may
    # fall on either side: keep boxes off the exact border cells by an amount that no rounding bridges.
    boxes = case.boxes + torch.tensor([0.0, 1e-7, 1e-7, 3e-7, 3e-7], dtype=torch.float64)
    single = {**options, "strides": (stride,)}
    output = reference.multilevel_roi_align(maps[:1], boxes, **single)
    expected = roi_align(maps[0], boxes, options["output_size"], 1.0 / stride, options["sampling_ratio"], aligned=True)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(output.square().sum(), maps[:1])
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), maps[:1])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


def test_hard_assignment_is_torchvisions_level_mapper() -> None:
    boxes = random_boxes(2000, 2, 900, 900, seed=5)
    exact = torch.tensor([[0, 0, 0, side, side] for side in (56, 112, 224, 448, 111.9999999, 112.0000001)])
    boxes = torch.cat([boxes, exact.double()])
    levels = LevelMapper(2, 5)([boxes[:, 1:]])
    weights = level_weights(boxes, assignment="hard")
    assert torch.equal(weights.argmax(dim=1), levels)
    assert torch.equal(weights.sum(dim=1), torch.ones(len(boxes), dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_pooling_is_torchvisions_multi_scale_roi_align(backend: str) -> None:
    maps = pyramid(height=256, width=512)
    boxes = random_boxes(80, 2, 256, 512)
    by_image = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    # torchvision's pooler uses aligned=False, whose samples lie half a cell further: undo that shift per level.
    levels = LevelMapper(2, 5)(by_image)
    shifts = 0.5 * torch.tensor([4, 8, 16, 32])[levels].double()[:, None]
    rows = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(by_image)])
    rows[:, 1:] += shifts
    expected = pooler(dict(zip("0123", maps, strict=True)), by_image, [(256, 512)] * 2)
    output = multilevel_roi_align(maps, rows, backend=backend)
    # aligned=False also enlarges boxes below one cell; the drawn ones are larger on their level.
    large = (rows[:, 3:] - rows[:, 1:3]).amin(dim=1) > torch.tensor([4, 8, 16, 32])[levels]
    assert int(large.sum()) > 60
    torch.testing.assert_close(output[large], expected[large], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_difference(backend: str) -> None:
    """Inside the maps RoIAlign of a constant is that constant, so the loss is its square whatever the weights."""
    maps = pyramid()
    expert = [m - 3.0 for m in maps]
    boxes = torch.tensor([[0, 20.0, 20.0, 70.0, 44.0], [1, 30.0, 10.0, 44.0, 50.0]], dtype=torch.float64)
    for assignment in ("soft", "hard", "uniform"):
        loss = soft_roi_distill(maps, expert, boxes, assignment=assignment, backend=backend)
        assert float(loss) == pytest.approx(9.0, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sample_between_four_pixels(backend: str) -> None:
    """One bin, one sample: the box's centre lies between cells 0 and 1 of both axes, so each of four weighs 1/4."""
    feature = torch.arange(12.0, dtype=torch.float64).reshape(1, 1, 3, 4).requires_grad_()
    box = torch.tensor([[0, 2.0, 2.0, 6.0, 6.0]], dtype=torch.float64)  # centre 4 px = cell 0.5
    options = {"strides": (4,), "output_size": 1, "sampling_ratio": 1, "backend": backend}
    output = multilevel_roi_align([feature], box, **options)
    assert output.item() == pytest.approx((0 + 1 + 4 + 5) / 4)
    loss = soft_roi_distill([feature], [torch.zeros_like(feature)], box, **options)
    assert loss.item() == pytest.approx(2.5**2)
    (gradient,) = torch.autograd.grad(loss, feature)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[:2, :2] = 2 * 2.5 / 4
    torch.testing.assert_close(gradient[0, 0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_border_rule(backend: str) -> None:
    """A sample at -1 still counts (clamped to cell 0), one just outside does not; the same at the far end."""
    feature = torch.tensor([[[[1.0, 2.0, 4.0]]]], dtype=torch.float64)
    options = {"strides": (1,), "output_size": 1, "sampling_ratio": 1, "backend": backend}

    def at(x: float) -> float:
        box = torch.tensor([[0, x + 0.5, 0.5, x + 0.5, 0.5]], dtype=torch.float64)  # a point on cell x of row 0
        return multilevel_roi_align([feature], box, **options).item()

    assert at(-1.0) == 1.0
    assert at(-1.0 - 1e-9) == 0.0
    assert at(0.25) == pytest.approx(1.25)
    assert at(2.0) == 4.0
    assert at(3.0) == 4.0
    assert at(3.0 + 1e-9) == 0.0


def test_soft_weights_by_hand() -> None:
    """A 224 px box lies on level 4 exactly: distances 2, 1, 0, 1 levels."""
    box = torch.tensor([[0, 0, 0, 224.0, 224.0]], dtype=torch.float64)
    raw = [math.exp(-2.0), math.exp(-0.5), 1.0, math.exp(-0.5)]
    expected = torch.tensor([[r / sum(raw) for r in raw]], dtype=torch.float64)
    torch.testing.assert_close(level_weights(box), expected, rtol=1e-14, atol=0)
    wide = level_weights(box, sigma=2.0)
    raw = [math.exp(-0.5), math.exp(-0.125), 1.0, math.exp(-0.125)]
    torch.testing.assert_close(wide, torch.tensor([[r / sum(raw) for r in raw]], dtype=torch.float64))
    assert level_weights(box, assignment="uniform").tolist() == [[0.25] * 4]
    assert level_weights(box.float()).dtype == torch.float32


def test_levels_are_clamped_and_tiny_sigma_selects() -> None:
    boxes = torch.tensor([[0, 0, 0, 1.0, 1.0], [0, 5, 5, 5, 5], [0, 0, 0, 1e5, 1e5]], dtype=torch.float64)
    weights = level_weights(boxes)
    assert weights[0].argmax() == 0
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[2], weights[0].flip(0))
    for sigma in (1e-3, 1e-200, 5e-324):
        assert level_weights(boxes, sigma=sigma).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_a_box_of_too_many_samples_is_named() -> None:
    boxes = torch.tensor([[0, 0, 0, 1e30, 1e30]], dtype=torch.float64)
    with pytest.raises(ValueError, match="boxes: with sampling_ratio=0 the reference takes at most 1048576 samples"):
        reference.soft_roi_distill(pyramid(), pyramid(seed=1), boxes, sampling_ratio=0)


def test_per_box_losses_add_up() -> None:
    maps, expert, boxes = pyramid(), pyramid(seed=1), random_boxes(9)
    weights = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)
    losses = reference.soft_roi_distill(maps, expert, boxes, reduction="none", box_weights=weights)
    plain = reference.soft_roi_distill(maps, expert, boxes, reduction="none")
    torch.testing.assert_close(losses, plain * weights)
    torch.testing.assert_close(
        reference.soft_roi_distill(maps, expert, boxes, reduction="sum", box_weights=weights), losses.sum()
    )
    torch.testing.assert_close(reference.soft_roi_distill(maps, expert, boxes, box_weights=weights), losses.sum() / 9)
