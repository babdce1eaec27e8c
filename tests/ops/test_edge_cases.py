"""Inputs at the edge of what makes sense: right values, finite gradients, nothing read or written out of bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DEVICE_OF, as_layout, backend_params, pyramid, random_boxes

from rakd_ops import level_weights, multilevel_roi_align, reference, soft_roi_distill
from rakd_ops._inputs import check_boxes
from rakd_ops._options import check_options
from rakd_ops.levels import ASSIGNMENTS

BACKENDS = backend_params("cpu", "cuda", "triton", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_boxes(backend: str, reduction: str) -> None:
    device = DEVICE_OF[backend]
    for none in (torch.zeros(0, 5, device=device), [torch.zeros(0, 4, device=device)] * 2):
        for layout in ("contiguous", "channels_last"):
            maps = pyramid(device=device, layout=layout, requires_grad=True)
            loss = soft_roi_distill(maps, pyramid(device=device, seed=1), none, reduction=reduction, backend=backend)
            assert loss.shape == ((0,) if reduction == "none" else ())
            assert loss.sum().item() == 0.0
            for gradient in torch.autograd.grad(loss.sum(), maps):
                assert torch.count_nonzero(gradient) == 0
            pooled = multilevel_roi_align(maps, none, backend=backend)
            assert pooled.shape == (0, 5, 7, 7)
            for gradient in torch.autograd.grad(pooled.sum(), maps):
                assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: str) -> None:
    device = DEVICE_OF[backend]
    maps = pyramid(batch=0, device=device, requires_grad=True)
    boxes = torch.zeros(0, 5, device=device)
    loss = soft_roi_distill(maps, [m.detach() for m in maps], boxes, backend=backend)
    pooled = multilevel_roi_align(maps, boxes, backend=backend)
    assert loss.item() == 0.0
    assert pooled.shape == (0, 5, 7, 7)
    for gradient, m in zip(torch.autograd.grad(loss + pooled.sum(), maps), maps, strict=True):
        assert gradient.shape == m.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_without_boxes_gets_zero_gradient(backend: str) -> None:
    device = DEVICE_OF[backend]
    maps = pyramid(batch=3, device=device, requires_grad=True)
    expert = pyramid(batch=3, device=device, seed=1)
    boxes = random_boxes(5, batch=1).to(device)
    boxes[:, 0] = 1
    loss = soft_roi_distill(maps, expert, boxes, backend=backend)
    to_first = boxes * boxes.new_tensor([0, 1, 1, 1, 1])
    alone = soft_roi_distill([m[1:2] for m in maps], [e[1:2] for e in expert], to_first, backend=backend)
    torch.testing.assert_close(loss, alone)
    for gradient in torch.autograd.grad(loss, maps):
        assert torch.count_nonzero(gradient[[0, 2]]) == 0
        assert torch.count_nonzero(gradient[1]) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_boxes_outside_and_without_area(backend: str, sampling_ratio: int) -> None:
    device = DEVICE_OF[backend]
    maps = pyramid(device=device, requires_grad=True)
    expert = [m.detach() - 2.0 for m in maps]
    outside = torch.tensor([[0, 500, 500, 600, 640], [1, -300, -90, -200, -70.0], [0, 20, 900, 50, 999]], device=device)
    options = {"sampling_ratio": sampling_ratio, "backend": backend}
    loss = soft_roi_distill(maps, expert, outside, reduction="none", **options)
    assert loss.tolist() == [0.0, 0.0, 0.0]
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(loss.sum(), maps))
    flat = torch.tensor([[0, 40.0, 30.0, 40.0, 30.0], [1, 40.0, 20.0, 40.0, 60.0]], device=device)
    loss = soft_roi_distill(maps, expert, flat, reduction="none", **options)
    # A fixed ratio samples the point or line itself; adaptive sampling takes no samples of nothing.
    expected = [0.0, 0.0] if sampling_ratio == 0 else [4.0, 4.0]
    torch.testing.assert_close(loss.cpu(), torch.tensor(expected, dtype=torch.float64))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), maps))


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda"))
@pytest.mark.parametrize("sampling_ratio", [0, 2, 3, 5])
def test_boxes_of_hardly_any_extent(backend: str, sampling_ratio: int) -> None:
    """A few units in the last place around cells' borders: rounding may put a sample past the start of the next bin."""
    steps = [(cell, low, extent) for cell in (1, 2, 6) for low in (-2, -1, 0) for extent in (0, 1, 2, 5, 9)]
    spans = [[(4.0 * c + 2.0) * (1 + j * 2**-52) for j in (low, low + extent)] for c, low, extent in steps]
    rows = [[0, x[0], y[0], x[1], y[1]] for x in spans for y in spans]
    boxes = torch.tensor(rows, dtype=torch.float64)
    options = {"strides": (4,), "sampling_ratio": sampling_ratio, "output_size": (7, 5)}
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, 10, 12, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    expected = reference.soft_roi_distill(maps[:1], maps[1:], boxes, **options)
    wanted = torch.autograd.grad(expected, maps)
    moved = [m.detach().to(DEVICE_OF[backend]).requires_grad_() for m in maps]
    loss = soft_roi_distill(moved[:1], moved[1:], boxes.to(DEVICE_OF[backend]), **options, backend=backend)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-12, atol=1e-14)
    for got, gradient in zip(torch.autograd.grad(loss, moved), wanted, strict=True):
        torch.testing.assert_close(got.cpu(), gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling_ratio", [64, 200])
def test_samples_that_rounding_brings_onto_the_map_count(backend: str, sampling_ratio: int) -> None:
    """Bins so small that many samples fall on one number, at a position where the map ends."""
    sides = [(a * 2.0**-48, b * 2.0**-48) for a, b in ((0, 1), (1, 0), (2, 3), (64, 1))]
    rows = [[0, end - a, 4, end + b, 20] for end in (-2.0, 50.0) for a, b in sides]  # positions -1 and 12
    rows += [[0, 4, end - a, 20, end + b] for end in (-2.0, 42.0) for a, b in sides]
    boxes = torch.tensor(rows, dtype=torch.float64)
    features = torch.ones(1, 1, 10, 12, dtype=torch.float64)
    options = {"strides": (4,), "sampling_ratio": sampling_ratio, "output_size": (2, 3)}
    expected = multilevel_roi_align([features], boxes, **options, backend="reference")
    assert (expected.amax(dim=(1, 2, 3)) > 0).all()  # each box has samples on the map
    device = DEVICE_OF[backend]
    pooled = multilevel_roi_align([features.to(device)], boxes.to(device), **options, backend=backend)
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
def test_huge_boxes_cost_what_the_map_costs(backend: str) -> None:
    """Adaptive sampling of a box a billion pixels wide visits the samples that can touch the map, not all."""
    device = DEVICE_OF[backend]
    maps = [torch.ones(1, 2, 16, 24, device=device, dtype=torch.float64, requires_grad=True)]
    boxes = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [0, 0, 0, 1e15, 64.0]], device=device, dtype=torch.float64)
    loss = soft_roi_distill(
        maps,
        [torch.zeros_like(maps[0])],
        boxes,
        strides=(4,),
        sampling_ratio=0,
        backend=backend,
        reduction="none",
    )
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_of_one_row_or_column(backend: str, size: tuple[int, int], layout: str) -> None:
    device = DEVICE_OF[backend]
    feature = as_layout(torch.randn(2, 20, *size, dtype=torch.float64, device=device), layout).requires_grad_()
    boxes = torch.tensor([[0, 0.0, 0.0, 4.0 * size[1], 4.0 * size[0]], [1, 1.0, 1.0, 2.0, 2.0]], device=device)
    results = []
    for chosen in (backend, "reference"):
        loss = soft_roi_distill([feature], [feature.detach() * 2], boxes, strides=(4,), backend=chosen)
        results.append((loss.detach(), *torch.autograd.grad(loss, feature)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_map_beyond_32_bit_offsets(backend: str, layout: str) -> None:
    """More than 2^31 elements, and a box on the last ones. On the CPU NumPy's zeros take no memory until touched."""
    height, width = 32_768, 40_000
    shape = (1, 2, height, width) if layout == "contiguous" else (1, height, width, 2)
    if DEVICE_OF[backend] == "cpu":
        feature = torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(torch.bfloat16)
    else:
        feature = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE_OF[backend])
    feature = feature if layout == "contiguous" else feature.permute(0, 3, 1, 2)
    assert (height - 1) * feature.stride(2) + (width - 1) * feature.stride(3) + feature.stride(1) > 2**31
    feature[:, 1, -20:, -20:] = torch.arange(20, dtype=torch.bfloat16, device=feature.device)
    box = torch.tensor([[0, width - 16.0, height - 16.0, width - 2.0, height - 2.0]], device=feature.device)
    options = {"strides": (1,), "backend": backend}
    output = multilevel_roi_align([feature], box, **options)
    assert torch.count_nonzero(output[0, 0]) == 0
    # Bins are two cells wide; the ramp along x is the cell's number in the written square.
    torch.testing.assert_close(output[0, 1].cpu().float(), (torch.arange(7.0) * 2 + 4.5).expand(7, 7))
    with torch.no_grad():
        loss = soft_roi_distill(
            [feature], [torch.zeros_like(feature[:1, :1, :1, :1]).expand_as(feature)], box, **options
        )
    assert loss.item() == pytest.approx(float((torch.arange(7.0) * 2 + 4.5).square().mean()) / 2, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_outside_all_boxes_do_not_matter(backend: str) -> None:
    """Untouched cells are not read: whatever they hold, even NaN, neither loss nor gradient notices."""
    device = DEVICE_OF[backend]
    maps = pyramid(height=256, width=256, device=device)
    boxes = torch.tensor([[0, 100.0, 100.0, 140.0, 130.0]], dtype=torch.float64, device=device)
    poisoned = []
    for m in maps:
        copy = torch.full_like(m, float("nan"))
        stride = 256 // m.shape[2]
        low, high = 100 // stride - 2, 140 // stride + 3
        low = max(low, 0)
        copy[:, :, low:high, low:high] = m[:, :, low:high, low:high]
        poisoned.append(copy.requires_grad_())
    expert = pyramid(height=256, width=256, device=device, seed=1)
    loss = soft_roi_distill(poisoned, expert, boxes, backend=backend)
    torch.testing.assert_close(loss, soft_roi_distill(maps, expert, boxes, backend=backend))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, poisoned))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output_size", [3, 17])
def test_a_level_of_weight_zero_is_not_read(backend: str, output_size: int) -> None:
    """Whatever a map holds, it counts nothing for a box whose weight there is zero; nor does another box's NaN."""
    device = DEVICE_OF[backend]
    maps, expert = pyramid(device=device, requires_grad=True), pyramid(device=device, seed=1)
    boxes = torch.tensor([[0, 5.0, 5.0, 60.0, 50.0], [1, 3.0, 4.0, 70.0, 60.0]], dtype=torch.float64, device=device)
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.5, 1.0, 0.0, 0.0]], dtype=torch.float64, device=device)
    options = {"level_weights": weights, "reduction": "sum", "output_size": output_size, "backend": backend}
    expected = soft_roi_distill(maps, expert, boxes, **options)
    wanted = torch.autograd.grad(expected, maps)
    with torch.no_grad():
        maps[2][:] = float("nan")  # weight zero for both boxes
        maps[0][0] = float("inf")  # and for the first, which is alone in image 0
        expert[3][1] = float("nan")
    loss = soft_roi_distill(maps, expert, boxes, **options)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    for got, gradient in zip(torch.autograd.grad(loss, maps), wanted, strict=True):
        assert torch.equal(got, gradient)
    pooled = multilevel_roi_align(maps, boxes, level_weights=weights, output_size=output_size, backend=backend)
    assert pooled.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_reaches_no_level_of_weight_zero(backend: str) -> None:
    device = DEVICE_OF[backend]
    maps, expert = pyramid(device=device, requires_grad=True), pyramid(device=device, seed=1)
    boxes = torch.tensor([[0, 5.0, 5.0, 60.0, 50.0]], dtype=torch.float64, device=device)
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64, device=device)
    loss = soft_roi_distill(maps, expert, boxes, level_weights=weights, reduction="none", backend=backend)
    gradients = torch.autograd.grad(loss, maps, torch.full_like(loss, float("inf")))
    assert [bool(gradient.isfinite().all()) for gradient in gradients] == [True, False, True, True]
    assert all(not gradients[level].any() for level in (0, 2, 3))


FAULTY = [
    [7, 0, 0, 90, 60],
    [-1, 0, 0, 90, 60],
    [0.5, 0, 0, 90, 60],
    [float("nan"), 0, 0, 90, 60],
    [float("inf"), 0, 0, 90, 60],
    [0, float("nan"), 0, 90, 60],
    [0, 0, 0, float("inf"), 60],
    [0, 90, 0, 0, 60],
    [0, 0, 60, 90, 0],
    [1e300, 0, 0, 90, 60],
]


def test_faulty_boxes_and_weights_count_zero_where_nobody_can_raise() -> None:
    """Prepared in plain PyTorch, as every backend but the CPU's own op does it without a wait; by value."""
    right = random_boxes(3)
    mixed = torch.cat([right[:2], torch.tensor(FAULTY, dtype=torch.float64), right[2:]])
    keep = torch.tensor([0, 1, 2 + len(FAULTY)])
    of_box = torch.arange(1.0, len(mixed) + 1, dtype=torch.float64)
    options = check_options()
    alone = check_boxes(right, of_box[keep], None, 2, right.device, 4)
    inputs = check_boxes(mixed, of_box, None, 2, right.device, 4)
    rows, index = reference.prepare_boxes(inputs, options)
    expected_rows, expected_index = reference.prepare_boxes(alone, options)
    assert torch.equal(rows[keep], expected_rows)
    faulty = torch.ones(len(mixed), dtype=torch.bool).index_fill(0, keep, False)
    assert torch.equal(rows[faulty][:, 0], torch.full((len(FAULTY),), -1.0, dtype=torch.float64))
    assert torch.count_nonzero(rows[faulty][:, 1:]) == 0
    begins, order = index[:3].tolist(), index[3:]
    assert begins == expected_index[:3].tolist()
    assert order[: begins[-1]].tolist() == [keep[i] for i in expected_index[3:].tolist()]
    assert sorted(order.tolist()) == list(range(len(mixed)))
    wild = torch.tensor([[1.0, float("nan"), -1.0, 2.0]], dtype=torch.float64).expand(3, 4)
    weighted = check_boxes(right, torch.tensor([1.0, float("inf"), 2.0]), wild, 2, right.device, 4, "mean")
    rows, _ = reference.prepare_boxes(weighted, options)
    factors = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)[:, None] / 3
    assert torch.equal(rows[:, 5:], torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=torch.float64) * factors)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8,), (2, 4), (3.0, 6.5, 14.0, 100.0)])
@pytest.mark.parametrize("sigma", [1e-12, 0.3, 1.0, 1e6])
def test_level_rule_is_one_rule(assignment: str, strides: tuple[float, ...], sigma: float) -> None:
    """Python's and the compiled code's level weights agree, also at the boundaries between levels."""
    boxes = random_boxes(300, height=2000, width=2000, seed=2)
    exact = [
        [0, 0, 0, s, s] for s in (0, 1, 7, 14, 28, 56, 112, 224, 448, 896, 1e4, 224 * (1 - 1e-9), 112 * (1 - 1e-5))
    ]
    exact.append([0, -1e308, 5, 1e308, 5])  # infinitely wide and without height: its area counts as 0
    boxes = torch.cat([boxes, torch.tensor(exact, dtype=torch.float64)])
    options = {"strides": strides, "assignment": assignment, "sigma": sigma}
    compiled = level_weights(boxes, **options)
    torch.testing.assert_close(compiled, reference.level_weights(boxes, **options), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(compiled.sum(dim=1), torch.ones(len(boxes), dtype=torch.float64))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", backend_params("cpu"))
def test_every_half_number_is_read_and_written_as_it_is(dtype: torch.dtype, layout: str, backend: str) -> None:
    """Samples in the cells' middles: pooling copies the map, and its transpose the gradient, subnormals included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).reshape(1, 32, 64, 32)
    feature = as_layout(values, layout).requires_grad_()
    box = [torch.tensor([[0.0, 0.0, 32.0, 64.0]])]
    pooled = multilevel_roi_align(
        [feature], box, strides=(1,), output_size=(64, 32), sampling_ratio=1, assignment="uniform", backend=backend
    )
    assert torch.equal(pooled, values)
    (gradient,) = torch.autograd.grad(pooled, feature, -values)
    assert torch.equal(gradient, -values)


def test_maps_of_more_cells_than_32_bits_count() -> None:
    # Kernels count in blocks, so that a last block's end must be a number of 32 bits too.
    most, box = 2**31 - 64, torch.tensor([[0.0, 2.0, 0.0, 6.0, 1.0]])
    for dimension in (1, 2, 3):
        shape = [1, 1, 1, 1]
        shape[dimension] = most + 1
        feature = torch.zeros(1, dtype=torch.bfloat16).expand(shape)
        with pytest.raises(ValueError, match=r"features\[0\]: expected at most 2147483584 channels, rows and columns"):
            multilevel_roi_align([feature], box, strides=(1,))
    row = torch.ones(1, dtype=torch.bfloat16).expand(1, 1, 1, most)
    assert multilevel_roi_align([row], box, strides=(1,), output_size=1).item() == 1.0
