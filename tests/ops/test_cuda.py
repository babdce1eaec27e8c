"""What only a GPU can show: captured graphs, streams, no synchronisation, several devices, many runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import backend_params, pyramid, random_boxes

from rakd_ops import multilevel_roi_align, reference, soft_roi_distill

pytestmark = [param for backend in backend_params("cuda") for param in backend.marks]


def inputs(device: str = "cuda") -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    maps = pyramid(2, 40, 256, 512, dtype=torch.float32, device=device, requires_grad=True)
    expert = pyramid(2, 40, 256, 512, dtype=torch.float32, device=device, seed=1)
    return maps, expert, random_boxes(60, 2, 256, 512).to(device)


def step(maps: list[torch.Tensor], expert: list[torch.Tensor], boxes: torch.Tensor) -> list[torch.Tensor]:
    loss = soft_roi_distill(maps, expert, boxes, backend="cuda")
    pooled = multilevel_roi_align(maps, boxes, backend="cuda")
    return [loss, pooled, *torch.autograd.grad(loss + pooled.square().mean(), maps)]


def test_same_bits_in_a_hundred_runs() -> None:
    call = inputs()
    first = step(*call)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, step(*call), strict=True))


def test_a_step_can_be_captured_in_a_graph() -> None:
    maps, expert, boxes = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(maps, expert, boxes)  # warm-up outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(maps, expert, boxes)
    for seed in (3, 4):  # other values in the same memory
        with torch.no_grad():
            for m in maps:
                m.copy_(torch.randn_like(m))
            boxes.copy_(random_boxes(60, 2, 256, 512, seed=seed))
        graph.replay()
        for a, b in zip(captured, step(maps, expert, boxes), strict=True):
            assert torch.equal(a, b)


def test_a_step_does_not_synchronise() -> None:
    call = inputs()
    step(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(run: Callable[[], object]) -> list[str]:
    """Names of this package's kernels that a call launches."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "rakd::gpu" in event.name]


def test_launches() -> None:
    maps, expert, boxes = inputs()
    assert len(kernels(lambda: soft_roi_distill(maps, expert, boxes, backend="cuda"))) == 2
    with torch.no_grad():
        assert len(kernels(lambda: soft_roi_distill(maps, expert, boxes, backend="cuda"))) == 2
        assert len(kernels(lambda: multilevel_roi_align(maps, boxes, backend="cuda"))) == 1


@pytest.mark.parametrize("output_size", [(41, 45), (2, 3000), (1500, 1)])
def test_any_output_size(output_size: tuple[int, int]) -> None:
    maps, expert, boxes = inputs()
    boxes = boxes[:4]
    loss = soft_roi_distill(maps, expert, boxes, output_size=output_size, backend="cuda")
    exact = [m.detach().double().requires_grad_() for m in maps]
    expected = reference.soft_roi_distill(exact, [e.double() for e in expert], boxes, output_size=output_size)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, wanted in zip(torch.autograd.grad(loss, maps), torch.autograd.grad(expected, exact), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("output_size", [7, 19])
def test_both_forms_of_a_training_step(output_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is two launches, and computes the same as the other, in the same bits each time."""
    maps, expert, boxes = inputs()

    def training_step() -> tuple[torch.Tensor, ...]:
        loss = soft_roi_distill(maps, expert, boxes, output_size=output_size, backend="cuda")
        return loss, *torch.autograd.grad(loss, maps)

    results = {}
    for form, names in (("pooled", ("distill_pool", "spread")), ("gram", ("make_gram", "gram_gradient"))):
        monkeypatch.setenv("RAKD_CUDA_FORM", form)
        launched = kernels(training_step)
        assert len(launched) == 2 and all(name in kernel for name, kernel in zip(names, launched, strict=True))
        results[form] = training_step()
        assert all(torch.equal(a, b) for a, b in zip(results[form], training_step(), strict=True))
    for a, b in zip(results["pooled"], results["gram"], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    monkeypatch.setenv("RAKD_CUDA_FORM", "other")
    with pytest.raises(RuntimeError, match="RAKD_CUDA_FORM"):
        training_step()


def test_another_stream() -> None:
    call = inputs()
    expected = step(*call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(*call)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none: several are needed")
def test_several_devices_in_one_process() -> None:
    expected = [t.cpu() for t in step(*inputs("cuda:0"))]
    got = [t.cpu() for t in step(*inputs("cuda:1"))]
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_invalid_boxes_count_nothing() -> None:
    maps, expert, boxes = inputs()
    wrong = torch.tensor([[7, 0, 0, 90, 90], [-1, 0, 0, 90, 90], [0, float("nan"), 0, 90, 90]], device="cuda")
    expected = soft_roi_distill(maps, expert, boxes, reduction="sum", backend="cuda")
    loss = soft_roi_distill(maps, expert, torch.cat([boxes, wrong.double()]), reduction="sum", backend="cuda")
    assert torch.equal(loss, expected)
