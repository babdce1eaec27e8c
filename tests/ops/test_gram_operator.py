"""The CPU's Gram operator: many boxes on the same cells, where it is chosen, against the reference."""

import pytest
import torch
from cases import pyramid

from rakd_ops import reference, soft_roi_distill


def crowd(count, image_height, image_width, objects, seed, batch=2):
    """Boxes around a few places, of sizes that make bins of a fraction of a cell to several cells."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, 6, generator=generator, dtype=torch.float64)
    place = torch.rand(objects, 2, generator=generator, dtype=torch.float64)[torch.arange(count) % objects]
    centre = (place + 0.1 * (rows[:, :2] - 0.5)) * torch.tensor([image_width, image_height])
    size = 8.0 + rows[:, 2:4] * torch.tensor([image_width / 2, image_height / 2])
    image = torch.arange(count) % batch
    return torch.cat([image[:, None], centre - size / 2, centre + size / 2], dim=1)


def gradients(distill, apprentice, expert, boxes, **options):
    loss = distill(apprentice, expert, boxes, **options)
    return [loss, *torch.autograd.grad(loss, apprentice)]


def check(apprentice, expert, boxes, tolerance, **options):
    actual = gradients(soft_roi_distill, apprentice, expert, boxes, backend="cpu", **options)
    wanted = gradients(reference.soft_roi_distill, apprentice, expert, boxes, **options)
    for value, expected in zip(actual, wanted, strict=True):
        scale = float(expected.detach().abs().max()) or 1.0
        torch.testing.assert_close(value, expected, rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(7, 7), (19, 19), (14, 5)])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_crowded_boxes_agree_with_the_reference(layout, size, ratio):
    apprentice = pyramid(2, 70, dtype=torch.float64, layout=layout, requires_grad=True)
    expert = pyramid(2, 70, dtype=torch.float64, layout=layout, seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    for seed, (count, objects) in enumerate([(60, 1), (90, 3), (150, 40)]):
        boxes = crowd(count, height, width, objects, seed)
        check(apprentice, expert, boxes, 1e-12, output_size=size, sampling_ratio=ratio)


def test_float32_stays_within_rounding():
    apprentice = pyramid(2, 40, dtype=torch.float32, requires_grad=True)
    expert = pyramid(2, 40, dtype=torch.float32, seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    boxes = crowd(200, height, width, 2, 5)
    actual = gradients(soft_roi_distill, apprentice, expert, boxes, output_size=19, backend="cpu")
    double = [m.detach().double().requires_grad_() for m in apprentice]
    wanted = gradients(reference.soft_roi_distill, double, [m.double() for m in expert], boxes, output_size=19)
    for value, expected in zip(actual, wanted, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=0.0, atol=2e-6 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_cells_that_no_sample_touches_may_hold_anything(value):
    """The operator's windows reach over cells between samples; what stands there must not get into the result."""
    apprentice = pyramid(1, 64, 144, 144, strides=(4,))
    expert = pyramid(1, 64, 144, 144, strides=(4,), seed=1)
    # Bins of four cells with one sample each, between two cells: the other two rows and columns are not read.
    base = torch.tensor([0.0, 16.0, 16.0, 16.0 + 4 * 28, 16.0 + 4 * 28], dtype=torch.float64)
    boxes = base.repeat(80, 1)
    options = {"strides": (4.0,), "output_size": 7, "sampling_ratio": 1}
    clean = gradients(
        soft_roi_distill, [m.requires_grad_() for m in apprentice], expert, boxes, backend="cpu", **options
    )
    used = clean[1].abs().sum(dim=(0, 1)) > 0
    spoilt = apprentice[0].detach().clone()
    spoilt[:, :, ~used] = value
    assert not torch.isfinite(spoilt).all()
    again = gradients(soft_roi_distill, [spoilt.requires_grad_()], expert, boxes, backend="cpu", **options)
    for before, after in zip(clean, again, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-12, atol=0.0)
