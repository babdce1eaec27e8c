"""The CPU's Gram operator: many boxes on the same cells, where it is chosen, against the reference."""

from itertools import product

import pytest
import torch
from cases import as_layout, pyramid

from rakd_ops import reference, soft_roi_distill

BOTH_LAYOUTS = ("contiguous", "channels_last")
EACH_SIDE = ("apprentice", "expert", "both")  # whose gradients are wanted


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


def check_in_float64(apprentice, expert, boxes, wanted_of, tolerance, layouts=(None,), **options):
    """Compare with the reference in float64: gradients of "apprentice", "expert", "both", or of several in turn.

    In each of the layouts, or as the maps come; the reference takes most of the time and does not depend on it.
    """
    wanted_of = (wanted_of,) if isinstance(wanted_of, str) else wanted_of
    names = ("apprentice", "expert")
    given = dict(zip(names, (apprentice, expert), strict=True))

    def values_and_gradients(distill, dtype, sides, layout=None, **options):
        maps = {name: [m.detach().to(dtype or m.dtype) for m in given[name]] for name in names}
        if layout is not None:
            maps = {name: [as_layout(m, layout) for m in maps[name]] for name in names}
        leaves = [m.requires_grad_() for name in sides for m in maps[name]]
        loss = distill(maps["apprentice"], maps["expert"], boxes, **options)
        found = iter(torch.autograd.grad(loss, leaves))
        return {"loss": [loss.detach()], **{name: [next(found) for _ in given[name]] for name in sides}}

    needed = [name for name in names if {name, "both"} & set(wanted_of)]
    expected = values_and_gradients(reference.soft_roi_distill, torch.float64, needed, **options)
    for side, layout in product(wanted_of, layouts):
        sides = names if side == "both" else (side,)
        got = values_and_gradients(soft_roi_distill, None, sides, layout, backend="cpu", **options)
        for name, values in got.items():
            for value, exact in zip(values, expected[name], strict=True):
                torch.testing.assert_close(value.double(), exact, rtol=0.0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("size", [(7, 7), (19, 19), (14, 5)])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_crowded_boxes_agree_with_the_reference(size, ratio):
    # Whole blocks of 32 channels and a rest; two of them take the reference twice the time of one.
    channels = 70 if ratio == 2 else 34
    apprentice, expert = pyramid(2, channels, dtype=torch.float64), pyramid(2, channels, dtype=torch.float64, seed=1)
    options = {"layouts": BOTH_LAYOUTS, "output_size": size, "sampling_ratio": ratio}
    height, width = (4 * n for n in apprentice[0].shape[2:])
    for seed, (count, objects) in enumerate([(60, 1), (90, 3), (150, 40)]):
        boxes = crowd(count, height, width, objects, seed)
        check_in_float64(apprentice, expert, boxes, "apprentice", 1e-12, **options)


def test_float32_stays_within_rounding():
    apprentice, expert = pyramid(2, 40, dtype=torch.float32), pyramid(2, 40, dtype=torch.float32, seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    boxes = crowd(200, height, width, 2, 5)
    check_in_float64(apprentice, expert, boxes, "apprentice", 2e-6, BOTH_LAYOUTS, output_size=19)


# Channels-last maps are worked on in blocks of 32 channels, which the operator writes itself where it stands for all
# boxes (many bins); with few bins it stands for some, with few boxes for none.
# One block, several, and a rest beside either; with 19 bins more of that would take the reference seconds.
@pytest.mark.parametrize(
    "bins, count, channels",
    [*((19, 200, c) for c in (32, 40, 70)), *((7, count, c) for count in (120, 3) for c in (32, 40, 64, 70, 96))],
)
def test_wide_blocks(bins, count, channels):
    apprentice = pyramid(2, channels, dtype=torch.float32, layout="channels_last")
    expert = pyramid(2, channels, dtype=torch.float32, layout="channels_last", seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    check_in_float64(apprentice, expert, crowd(count, height, width, 2, 5), EACH_SIDE, 2e-6, output_size=bins)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_forms_on_the_same_cells(layout):
    """Many boxes with narrow bins, which go into the operator, beside and upon a few whose bins are too wide for it."""
    apprentice = pyramid(1, 40, 192, 256, strides=(4,), dtype=torch.float32, layout=layout)
    expert = pyramid(1, 40, 192, 256, strides=(4,), dtype=torch.float32, layout=layout, seed=1)
    generator = torch.Generator().manual_seed(3)
    centre = torch.tensor([[70.0, 80.0], [200.0, 60.0]]).double()[torch.arange(160) % 2]
    corner = centre + 8.0 * torch.rand(160, 2, generator=generator, dtype=torch.float64)
    narrow = torch.cat([torch.zeros(160, 1, dtype=torch.float64), corner - 35.0, corner + 35.0], dim=1)
    wide = torch.tensor([[0.0, 2.0, 6.0, 250.0, 190.0], [0.0, 10.0, 5.0, 245.0, 160.0]], dtype=torch.float64)
    boxes = torch.cat([narrow, wide])
    check_in_float64(apprentice, expert, boxes, EACH_SIDE, 2e-6, strides=(4.0,), output_size=7)


@pytest.mark.parametrize("channels", [24, 40])
@pytest.mark.parametrize("cells", [0.6, 1.4, 2.2, 3.0, 3.8, 4.6])
@pytest.mark.parametrize("ratio", [1, 2, 6])
def test_bins_of_all_widths(channels, cells, ratio):
    """Bins of so many cells, and a few wider ones: from windows of 3 x 3 cells to the widest, and past them."""
    apprentice = pyramid(1, channels, 160, 192, strides=(4,), dtype=torch.float32, layout="channels_last")
    expert = pyramid(1, channels, 160, 192, strides=(4,), dtype=torch.float32, layout="channels_last", seed=1)
    generator = torch.Generator().manual_seed(3)
    corner = 20.0 * torch.rand(150, 2, generator=generator, dtype=torch.float64)
    width = torch.full((150, 1), cells, dtype=torch.float64)
    width[::15] += 0.8
    boxes = torch.cat([torch.zeros_like(width), corner, corner + 4.0 * 7 * width], dim=1)
    options = {"strides": (4.0,), "output_size": 7, "sampling_ratio": ratio}
    check_in_float64(apprentice, expert, boxes, "both", 2e-6, **options)


@pytest.mark.parametrize("bins, count", [(19, 200), (7, 120), (7, 3)])
@pytest.mark.parametrize("channels", [40, 64])
def test_the_loss_alone(bins, count, channels):
    """Without a gradient the operator serves, too, unless the losses of the boxes are wanted."""
    apprentice, expert = pyramid(2, channels, dtype=torch.float32), pyramid(2, channels, dtype=torch.float32, seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    boxes = crowd(count, height, width, 2, 5)
    weights = torch.linspace(-1.0, 2.0, count, dtype=torch.float64)
    options = {"output_size": bins, "box_weights": weights, "reduction": "sum"}
    expected = reference.soft_roi_distill(
        [m.double() for m in apprentice], [m.double() for m in expert], boxes, **options
    )
    for (dtype, tolerance), layout in product(((torch.float64, 1e-12), (torch.float32, 1e-6)), BOTH_LAYOUTS):
        maps = [[as_layout(m.to(dtype), layout) for m in side] for side in (apprentice, expert)]
        loss = soft_roi_distill(*maps, boxes, backend="cpu", **options)
        of_boxes = soft_roi_distill(*maps, boxes, backend="cpu", **{**options, "reduction": "none"})
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0.0)
        torch.testing.assert_close(of_boxes.double().sum(), expected, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)])
def test_wide_blocks_of_half_types(dtype, tolerance):
    apprentice = pyramid(1, 48, dtype=dtype, layout="channels_last")
    expert = pyramid(1, 48, dtype=dtype, layout="channels_last", seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    boxes = crowd(200, height, width, 2, 5, batch=1)
    check_in_float64(apprentice, expert, boxes, "both", tolerance, output_size=19, box_weights=torch.full((200,), 1e4))


def test_wide_blocks_on_one_layout_alone():
    """Where only one of the networks' maps are channels-last the gradient follows its map."""
    apprentice = pyramid(2, 40, dtype=torch.float32, layout="channels_last")
    expert = pyramid(2, 40, dtype=torch.float32, seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    for maps in ((apprentice, expert), (expert, apprentice)):
        check_in_float64(*maps, crowd(200, height, width, 2, 5), "both", 2e-6, output_size=19)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("channel", [0, 20, 39])
def test_a_value_that_is_not_finite_spoils_its_own_channel_alone(value, channel):
    """Blocks that the operator writes itself are then done patch by patch, in two halves."""
    apprentice = pyramid(1, 40, dtype=torch.float32, layout="channels_last", requires_grad=True)
    expert = pyramid(1, 40, dtype=torch.float32, layout="channels_last", seed=1)
    height, width = (4 * n for n in apprentice[0].shape[2:])
    options = {"output_size": 19, "backend": "cpu"}
    boxes = crowd(100, height, width, 1, 5, batch=1)
    _, clean, *coarser = gradients(soft_roi_distill, apprentice, expert, boxes, **options)
    middle = (0, channel, apprentice[0].shape[2] // 2, apprentice[0].shape[3] // 2)
    assert clean[middle] != 0.0
    with torch.no_grad():
        apprentice[0][middle] = value
    loss, spoilt, *others = gradients(soft_roi_distill, apprentice, expert, boxes, **options)
    with torch.no_grad():
        assert not torch.isfinite(soft_roi_distill(apprentice, expert, boxes, **options))
    assert not torch.isfinite(loss)
    assert not torch.isfinite(spoilt[middle])
    assert torch.isfinite(spoilt[:, :channel]).all() and torch.isfinite(spoilt[:, channel + 1 :]).all()
    untouched = clean[0, channel] == 0.0
    assert (spoilt[0, channel][untouched] == 0.0).all()
    scale = float(clean.abs().max())
    for after, before in (
        (spoilt[:, :channel], clean[:, :channel]),
        (spoilt[:, channel + 1 :], clean[:, channel + 1 :]),
    ):
        torch.testing.assert_close(after, before, rtol=0.0, atol=2e-6 * scale)
    assert all(torch.equal(a, b) for a, b in zip(others, coarser, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_cells_that_no_sample_touches_may_hold_anything(value, layout, dtype, tolerance):
    """The operator's windows reach over cells between samples; what stands there must not get into the result."""
    apprentice = pyramid(1, 64, 144, 144, strides=(4,), dtype=dtype, layout=layout)
    expert = pyramid(1, 64, 144, 144, strides=(4,), dtype=dtype, layout=layout, seed=1)
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
    with torch.no_grad():
        again.append(soft_roi_distill([spoilt], expert, boxes, backend="cpu", **options))
    for before, after in zip([*clean, clean[0].detach()], again, strict=True):
        torch.testing.assert_close(after, before, rtol=0.0, atol=tolerance * float(before.detach().abs().max()))
