"""What only a GPU can show of the CUDA library: kernels launched, streams, several devices, many runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import backend_params, gpu_inputs, gpu_step, gpu_warm_up, pyramid, random_boxes

from rakd_ops import level_weights, multilevel_roi_align, reference, soft_roi_distill

pytestmark = [param for backend in backend_params("cuda") for param in backend.marks]


def test_same_bits_in_a_hundred_runs() -> None:
    call = gpu_inputs()
    first = gpu_step(*call)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, gpu_step(*call), strict=True))


def test_a_captured_backward_can_be_replayed_alone() -> None:
    maps, expert, boxes = gpu_inputs()
    gpu_warm_up(maps, expert, boxes)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        loss = soft_roi_distill(maps, expert, boxes, backend="cuda")
    with torch.cuda.graph(backward, pool=forward.pool()):
        gradients = torch.autograd.grad(0.5 * loss, maps)
    forward.replay()
    once = torch.autograd.grad(0.5 * soft_roi_distill(maps, expert, boxes, backend="cuda"), maps)
    for _ in range(2):
        backward.replay()
        assert all(torch.equal(a, b) for a, b in zip(gradients, once, strict=True))


def kernels(run: Callable[[], object]) -> list[str]:
    """Names of all kernels and copies that a call launches, whoever's they are."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if "Synchronize" not in name]


TRAINING = ("prepare_boxes", "build_tables", "roi_align_forward", "roi_align_backward")


@pytest.mark.parametrize("form", ["list", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("weights", [False, True])
def test_launches(form: str, dtype: torch.dtype, weights: bool) -> None:
    """All kernels of a call are counted: boxes are neither copied nor converted beside ours."""
    maps, expert, rows = gpu_inputs(images=8)
    rows = rows.to(dtype)
    boxes: Any = [rows[rows[:, 0] == i][:, 1:] for i in range(8)] if form == "list" else rows
    options: dict[str, Any] = {"backend": "cuda"}
    of_boxes: dict[str, Any] = {}
    if weights:
        count = sum(map(len, boxes)) if form == "list" else len(boxes)
        of_boxes = {"box_weights": torch.rand(count).cuda(), "level_weights": torch.rand(count, 4).half().cuda()}

    def loss(**more: Any) -> torch.Tensor:
        return soft_roi_distill(maps, expert, boxes, **options, **of_boxes, **more)

    def check(run: Callable[[], object], expected: Sequence[str]) -> None:
        launched = kernels(run)
        assert len(launched) == len(expected), launched
        assert all(name in kernel for name, kernel in zip(expected, launched, strict=True)), launched

    check(loss, TRAINING)
    losses = [loss(), loss()]  # kernels() runs a call twice
    one = torch.ones_like(losses[0])
    check(lambda: torch.autograd.grad(losses.pop(), maps, one), ["scale_gradients"])
    each = loss(reduction="none")
    ones = torch.ones_like(each)
    check(lambda: torch.autograd.grad(each, maps, ones, retain_graph=True), TRAINING[1:])
    with torch.no_grad():
        check(loss, (*TRAINING[:3], "roi_align_backward"))
        check(lambda: multilevel_roi_align(maps, boxes, **options), TRAINING[:3])
    pooled = multilevel_roi_align(maps, boxes, **options)
    of_pooled = torch.ones_like(pooled)
    check(lambda: torch.autograd.grad(pooled, maps, of_pooled, retain_graph=True), (TRAINING[1], TRAINING[3]))
    check(lambda: level_weights(boxes), ["box_level_weights"])


@pytest.mark.parametrize("output_size", [(41, 45), (2, 3000), (1500, 1)])
def test_any_output_size(output_size: tuple[int, int]) -> None:
    maps, expert, boxes = gpu_inputs()
    boxes = boxes[:4]
    loss = soft_roi_distill(maps, expert, boxes, output_size=output_size, backend="cuda")
    exact = [m.detach().double().requires_grad_() for m in maps]
    expected = reference.soft_roi_distill(exact, [e.double() for e in expert], boxes, output_size=output_size)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, wanted in zip(torch.autograd.grad(loss, maps), torch.autograd.grad(expected, exact), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("output_size", [7, 19])
def test_a_training_step(output_size: int) -> None:
    """Its launches, and the same bits each time."""
    maps, expert, boxes = gpu_inputs()

    def training_step() -> tuple[torch.Tensor, ...]:
        loss = soft_roi_distill(maps, expert, boxes, output_size=output_size, backend="cuda")
        return loss, *torch.autograd.grad(loss, maps)

    launched = [name for name in kernels(training_step) if "rakd::gpu" in name]
    expected = (*TRAINING, "scale_gradients")
    assert len(launched) == len(expected), launched
    assert all(name in kernel for name, kernel in zip(expected, launched, strict=True)), launched
    assert all(torch.equal(a, b) for a, b in zip(training_step(), training_step(), strict=True))


def test_another_stream() -> None:
    call = gpu_inputs()
    expected = gpu_step(*call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = gpu_step(*call)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none: several are needed")
def test_several_devices_in_one_process() -> None:
    expected = [t.cpu() for t in gpu_step(*gpu_inputs("cuda:0"))]
    got = [t.cpu() for t in gpu_step(*gpu_inputs("cuda:1"))]
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", ["list", "rows"])
@pytest.mark.parametrize("output_size", [7, 19])
def test_wrong_boxes_count_nothing(form: str, output_size: int) -> None:
    """By value, loss and gradients: boxes of no image, not finite, turned around; whoever their neighbours are."""
    maps, expert, right = gpu_inputs()
    nan, inf = float("nan"), float("inf")
    wrong = torch.tensor(
        [[7, 0, 0, 90, 90], [-1, 0, 0, 90, 90], [0.5, 0, 0, 90, 90], [nan, 0, 0, 90, 90], [1e300, 0, 0, 90, 90],
         [0, nan, 0, 90, 90], [1, 0, 0, inf, 90], [0, 90, 0, 0, 90], [1, 0, 90, 90, 0]],
        dtype=torch.float64, device="cuda",
    )  # fmt: skip
    wrong = wrong[5:] if form == "list" else wrong
    mixed = torch.cat([right[:20], wrong, right[20:]])
    keep = torch.ones(len(mixed), dtype=torch.bool, device="cuda")
    keep[20 : 20 + len(wrong)] = False
    options: dict[str, Any] = {"output_size": output_size, "backend": "cuda"}
    results = []
    for rows in (right, mixed):
        boxes: Any = [rows[rows[:, 0] == i][:, 1:] for i in range(2)] if form == "list" else rows
        loss = soft_roi_distill(maps, expert, boxes, reduction="sum", **options)
        results.append((loss, *torch.autograd.grad(loss, maps)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    for got, expected in zip(results[1][1:], results[0][1:], strict=True):
        assert torch.equal(got, expected)
    exact = [m.detach().double().requires_grad_() for m in maps]
    expected = reference.soft_roi_distill(exact, [e.double() for e in expert], right, reduction="sum",
                                          output_size=output_size)  # fmt: skip
    torch.testing.assert_close(results[1][0].double(), expected, rtol=1e-5, atol=0)
    for got, wanted in zip(results[1][1:], torch.autograd.grad(expected, exact), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    losses = soft_roi_distill(maps, expert, mixed, reduction="none", output_size=output_size, backend="cuda")
    assert torch.count_nonzero(losses[~keep]) == 0 and (losses[keep] > 0).any()
    pooled = multilevel_roi_align(maps, mixed, output_size=output_size, backend="cuda")
    assert torch.count_nonzero(pooled[~keep]) == 0 and pooled[keep].any()


@pytest.mark.parametrize("channels", [40, (24, 40, 70, 130)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_channels_per_level_and_mixed_dtypes(channels: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    maps = pyramid(2, channels, 256, 512, dtype=dtypes[0], device="cuda", requires_grad=True)
    expert = pyramid(2, channels, 256, 512, dtype=dtypes[1], device="cuda", seed=1)
    boxes = random_boxes(60, 2, 256, 512).cuda()
    loss = soft_roi_distill(maps, expert, boxes, reduction="sum", backend="cuda")
    exact = [m.detach().double().requires_grad_() for m in maps]
    expected = reference.soft_roi_distill(exact, [e.double() for e in expert], boxes, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, wanted in zip(torch.autograd.grad(loss, maps), torch.autograd.grad(expected, exact), strict=True):
        assert got.dtype == dtypes[0]
        tolerance = 1e-5 if dtypes[0] == torch.float32 else 1e-2
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
