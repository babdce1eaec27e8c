"""Gradients: against finite differences, in every way autograd asks for them, and refused where they make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICE_OF, backend_params, pyramid, random_boxes
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from rakd_ops import multilevel_roi_align, soft_roi_distill

BACKENDS = backend_params("cpu", "cuda", "triton", "reference")
SMALL: dict[str, Any] = {"batch": 2, "channels": 2, "height": 8, "width": 12, "strides": (2, 4)}


def small_maps(backend: str, seed: int = 0) -> list[torch.Tensor]:
    return pyramid(**SMALL, device=DEVICE_OF[backend], seed=seed, requires_grad=True)


def small_boxes(backend: str) -> torch.Tensor:
    return random_boxes(4, SMALL["batch"], SMALL["height"], SMALL["width"], seed=1).to(DEVICE_OF[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expert_strides", [None, (3.0, 5.0)])
@pytest.mark.parametrize("channels", [2, (1, 3)])
def test_gradcheck_distill(backend: str, expert_strides: Any, channels: Any) -> None:
    """The losses of the boxes against finite differences; their mean and sum have the gradients that follow."""
    sizes = {**SMALL, "channels": channels}
    apprentice = pyramid(**sizes, device=DEVICE_OF[backend], requires_grad=True)
    expert = pyramid(**sizes, device=DEVICE_OF[backend], seed=1, requires_grad=True)
    if expert_strides is not None:
        steps = {**sizes, "strides": expert_strides}
        expert = pyramid(**steps, device=DEVICE_OF[backend], seed=1, requires_grad=True)

    def loss(*maps: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        return soft_roi_distill(
            maps[:2], maps[2:], small_boxes(backend), strides=(2, 4), expert_strides=expert_strides,
            output_size=(2, 3), canonical_size=8.0, canonical_level=1, reduction=reduction, backend=backend,
        )  # fmt: skip

    maps = (*apprentice, *expert)
    assert torch.autograd.gradcheck(loss, maps)
    for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum)):
        reduced, expected = loss(*maps, reduction=reduction), reduce(loss(*maps))
        torch.testing.assert_close(reduced, expected, rtol=1e-12, atol=1e-14)
        for got, wanted in zip(torch.autograd.grad(reduced, maps), torch.autograd.grad(expected, maps), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_gradcheck_align(backend: str, assignment: str) -> None:
    def pool(*maps: torch.Tensor) -> torch.Tensor:
        return multilevel_roi_align(
            maps, small_boxes(backend), strides=(2, 4), output_size=(3, 2), sampling_ratio=0, assignment=assignment,
            canonical_size=8.0, canonical_level=1, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(pool, tuple(small_maps(backend)))


def losses(backend: str, reduction: str = "mean", dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    device = DEVICE_OF[backend]
    maps = pyramid(dtype=dtype, device=device, requires_grad=True)
    expert = pyramid(dtype=dtype, device=device, seed=1)
    loss = soft_roi_distill(maps, expert, random_boxes(6).to(device), reduction=reduction, backend=backend)
    return loss.sum(), maps, expert


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_second_backward_is_right(backend: str, reduction: str, dtype: torch.dtype) -> None:
    """Neither scaling a gradient nor changing a returned one may leak into a later backward."""
    loss, maps, _ = losses(backend, reduction, dtype)
    first = torch.autograd.grad(loss, maps, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(5.0)
    doubled = torch.autograd.grad(2.0 * loss, maps, retain_graph=True)
    again = torch.autograd.grad(loss, maps)
    for a, b, c in zip(kept, doubled, again, strict=True):
        torch.testing.assert_close(b, 2 * a)
        torch.testing.assert_close(c, a)


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_and_last_backward_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    """Beside a float64 map the loss is float64, and so is the factor that comes back."""
    device = DEVICE_OF[backend]
    maps = pyramid(dtype=dtype, device=device, requires_grad=True)
    for expert_dtype in (dtype, torch.float64):
        expert = pyramid(dtype=expert_dtype, device=device, seed=1)
        loss = 0.3 * soft_roi_distill(maps, expert, random_boxes(6).to(device), backend=backend)
        first = torch.autograd.grad(loss, maps, retain_graph=True)
        assert all(map(torch.equal, torch.autograd.grad(loss, maps), first))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_without_retaining_is_torchs_error(backend: str) -> None:
    loss, _, _ = losses(backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(backend: str, reduction: str) -> None:
    """At the first derivative: a graph of it would lack our part, and another term let that go unnoticed."""
    loss, maps, _ = losses(backend, reduction)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, maps, create_graph=True)
    pooled = multilevel_roi_align(maps, random_boxes(6).to(maps[0].device), backend=backend)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(pooled.square().sum() + maps[0].sum(), maps[0], create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_in_leaves(backend: str) -> None:
    loss, maps, _ = losses(backend)
    loss.backward(retain_graph=True)
    once = [m.grad.clone() for m in maps]
    (3.0 * loss).backward()
    for m, g in zip(maps, once, strict=True):
        torch.testing.assert_close(m.grad, 4 * g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend: str) -> None:
    device = DEVICE_OF[backend]
    boxes = random_boxes(6).to(device)
    maps, expert = (
        pyramid(device=device, requires_grad=True),
        pyramid(device=device, seed=1, requires_grad=True),
    )
    everything = torch.autograd.grad(soft_roi_distill(maps, expert, boxes, backend=backend), maps + expert)
    for a, e in zip(everything[:4], everything[4:], strict=True):
        torch.testing.assert_close(a, -e)
    frozen = [m.detach() for m in maps]
    of_expert = torch.autograd.grad(soft_roi_distill(frozen, expert, boxes, backend=backend), expert)
    for a, b in zip(of_expert, everything[4:], strict=True):
        torch.testing.assert_close(a, b)
    # One level alone.
    mixed = [m if level == 2 else m.detach() for level, m in enumerate(maps)]
    (third,) = torch.autograd.grad(soft_roi_distill(mixed, expert, boxes, backend=backend), maps[2])
    torch.testing.assert_close(third, everything[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad(backend: str) -> None:
    with torch.no_grad():
        loss, _, _ = losses(backend)
    assert not loss.requires_grad
    with torch.inference_mode():
        loss, _, _ = losses(backend)
    assert not loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_expert_under_inference_mode(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """An expert is often run under inference_mode, whose tensors autograd refuses to keep."""
    device = DEVICE_OF[backend]
    maps = pyramid(dtype=dtype, device=device, requires_grad=True)
    with torch.inference_mode():
        expert = [2.0 * m for m in pyramid(dtype=dtype, device=device, seed=1)]
        boxes = random_boxes(6).to(device) + 0.0
    loss = soft_roi_distill(maps, expert, boxes, reduction=reduction, backend=backend).sum()
    pooled = multilevel_roi_align(maps, boxes, backend=backend)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss + pooled.float().sum(), maps))


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_is_refused(backend: str, reduction: str) -> None:
    """It is not implemented; a silent zero would be worse."""
    maps = pyramid(device=DEVICE_OF[backend])
    boxes = random_boxes(6).to(DEVICE_OF[backend])

    def loss(first: torch.Tensor) -> torch.Tensor:
        return soft_roi_distill([first, *maps[1:]], maps, boxes, reduction=reduction, backend=backend)

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        loss(forward_ad.make_dual(maps[0] + 1.0, maps[0]))


def test_the_reference_has_forward_mode_and_second_derivatives() -> None:
    maps = pyramid(1, 1, 16, 16, (4, 8), requires_grad=True)
    expert, boxes = pyramid(1, 1, 16, 16, (4, 8), seed=1), torch.tensor([[0.0, 1.0, 2.0, 13.0, 15.0]])
    options = {"strides": (4, 8), "output_size": 2, "canonical_size": 16.0, "backend": "reference"}

    def loss(*own: torch.Tensor) -> torch.Tensor:
        return soft_roi_distill(list(own), expert, boxes, **options)

    assert torch.autograd.gradcheck(loss, maps, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, maps)


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp"])
def test_transforms_of_torch_func_are_refused_in_our_words(backend: str, transform: str) -> None:
    maps, boxes = pyramid(device=DEVICE_OF[backend]), random_boxes(6).to(DEVICE_OF[backend])

    def loss(first: torch.Tensor) -> torch.Tensor:
        return soft_roi_distill([first, *maps[1:]], maps, boxes, backend=backend)

    def pool(first: torch.Tensor) -> torch.Tensor:
        return multilevel_roi_align([first, *maps[1:]], boxes, backend=backend).sum()

    first = maps[0][None] if transform == "vmap" else maps[0]
    for function in (loss, pool):
        with pytest.raises(RuntimeError, match=r"rakd_ops: torch.func transforms .* backend='reference'"):
            if transform == "jvp":
                torch.func.jvp(function, (first,), (first,))
            else:
                getattr(torch.func, transform)(function)(first)


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
@pytest.mark.parametrize("reduction", ["mean", "none", "pooled"])
def test_batched_gradients_are_refused_in_our_words(backend: str, reduction: str) -> None:
    maps, boxes = small_maps(backend), small_boxes(backend)
    if reduction == "pooled":
        result = multilevel_roi_align(maps, boxes, strides=SMALL["strides"], backend=backend)
    else:
        others = small_maps(backend, seed=1)
        result = soft_roi_distill(maps, others, boxes, strides=SMALL["strides"], reduction=reduction, backend=backend)
    vectors = torch.ones((3, *result.shape), device=result.device)
    with pytest.raises(RuntimeError, match=r"rakd_ops: .*batched gradients do not see through"):
        torch.autograd.grad(result, maps, vectors, is_grads_batched=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_what_hooks_on_saved_tensors_keep_stays_as_it_was(backend: str, factor: float) -> None:
    maps, others, boxes = small_maps(backend), small_maps(backend, seed=1), small_boxes(backend)
    kept: list[torch.Tensor] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        loss = soft_roi_distill(maps, others, boxes, strides=SMALL["strides"], backend=backend)
    before = [saved.clone() for saved in kept]
    (factor * loss).backward()
    for own in maps:
        own.grad.add_(1.0)  # as gradient clipping does, in place
    assert kept
    assert all(torch.equal(saved, copy) for saved, copy in zip(kept, before, strict=True))


def test_torch_func_grad_of_the_reference() -> None:
    maps, expert, boxes = pyramid(requires_grad=True), pyramid(seed=1), random_boxes(6)

    def loss(first: torch.Tensor) -> torch.Tensor:
        return soft_roi_distill([first, *(m.detach() for m in maps[1:])], expert, boxes, backend="reference")

    (expected,) = torch.autograd.grad(loss(maps[0]), maps[0])
    torch.testing.assert_close(torch.func.grad(loss)(maps[0].detach()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend: str) -> None:
    plain, maps, expert = losses(backend)
    expected = torch.autograd.grad(plain, maps)

    def block(*inputs: torch.Tensor) -> torch.Tensor:
        scaled = [2.0 * m for m in inputs]
        return soft_roi_distill(scaled, [2.0 * e for e in expert], random_boxes(6).to(plain.device), backend=backend)

    loss = checkpoint(block, *maps, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(loss, maps), expected, strict=True):
        torch.testing.assert_close(a, 4 * b)


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton"))
def test_float16_gradients_survive_with_a_loss_scale(backend: str) -> None:
    """The mean over many boxes and channels underflows in float16 unless the loss scale is applied before rounding."""
    device = DEVICE_OF[backend]
    maps = [m.half().requires_grad_() for m in pyramid(channels=64, device=device)]
    expert = [m.half() for m in pyramid(channels=64, device=device, seed=1)]
    boxes = random_boxes(200).to(device)
    exact = [m.detach().double().requires_grad_() for m in maps]
    loss = soft_roi_distill(maps, expert, boxes, backend=backend)
    gradients = torch.autograd.grad(loss * 2.0**16, maps)
    wanted = torch.autograd.grad(
        soft_roi_distill(exact, [e.double() for e in expert], boxes, backend="reference"), exact
    )
    for got, expected in zip(gradients, wanted, strict=True):
        scaled = expected * 2.0**16
        assert float((got.double() - scaled).abs().max()) <= 1e-3 * float(scaled.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_boxes_and_weights_are_refused(backend: str) -> None:
    maps = pyramid(device=DEVICE_OF[backend])
    boxes = random_boxes(3).to(DEVICE_OF[backend])
    with pytest.raises(ValueError, match=r"boxes: .*gradient"):
        soft_roi_distill(maps, maps, boxes.clone().requires_grad_(), backend=backend)
    with pytest.raises(ValueError, match=r"box_weights: .*gradient"):
        weights = torch.ones(3, device=boxes.device, requires_grad=True)
        soft_roi_distill(maps, maps, boxes, box_weights=weights, backend=backend)
    with pytest.raises(ValueError, match=r"boxes: .*gradient"):
        multilevel_roi_align(maps, boxes.clone().requires_grad_(), backend=backend)
