"""torch.compile, opcheck, autocast, and use as a module: what trainers wrap around a loss."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from typing import Any

import pytest
import torch
from cases import DEVICE_OF, backend_params, pyramid, random_boxes
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rakd_ops import SoftRoIDistillLoss, level_weights, multilevel_roi_align, reference, soft_roi_distill
from rakd_ops._layout import is_channels_last

BACKENDS = backend_params("cpu", "cuda", "triton")
BINS = ([2, 3], 2)
STRIDES = [4.0, 8.0, 16.0, 32.0]
RULE = (STRIDES, 0, 1.0, 224.0, 4.0)


@pytest.mark.parametrize("backend", BACKENDS)
# Inductor runs what the others are the first parts of: they only tell where an error comes from.
@pytest.mark.parametrize(
    "compiler", [*(pytest.param(part, marks=pytest.mark.slow) for part in ("eager", "aot_eager")), "inductor"]
)
def test_compile_fullgraph(backend: str, compiler: str) -> None:
    device = DEVICE_OF[backend]
    layer = nn.Conv2d(3, 3, 1).to(device)
    expert = pyramid(channels=3, dtype=torch.float32, device=device, seed=1)

    def step(maps: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        features = [layer(m) for m in maps]
        mean = soft_roi_distill(features, expert, boxes, backend=backend)
        losses = soft_roi_distill(features, expert, boxes, reduction="none", backend=backend)
        pooled = multilevel_roi_align(features, boxes, output_size=2, backend=backend)
        return 3.0 * mean + losses.square().sum() + pooled.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for count, seed in ((5, 0), (8, 1)):  # another number of boxes: recompiled or dynamic, and right
        maps = pyramid(channels=3, dtype=torch.float32, device=device, seed=seed + 5)
        boxes = random_boxes(count, seed=seed).to(device)
        results = []
        for function in (step, compiled):
            layer.zero_grad()
            loss = function(maps, boxes)
            loss.backward()
            results.append((loss.detach(), layer.weight.grad.clone()))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=backend_params("cuda")[0].marks)])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("contiguous", torch.bfloat16),
        ("channels_last", torch.bfloat16),
        ("strided", torch.float32),
    ],
)
def test_opcheck(device: str, layout: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"channels": (5, 3, 4, 9), "layout": layout, "device": device}
    apprentice, expert = pyramid(dtype=torch.float32, **options), pyramid(dtype=dtype, **options, seed=1)
    boxes = random_boxes(4).to(device)
    ops = torch.ops.rakd_ops
    groups = [boxes[:3, 1:].float(), boxes[3:, 1:]]
    weights = (torch.rand(4, device=device), torch.rand(4, 4, device=device).half())
    if layout == "contiguous" and dtype == torch.float32:  # these take no maps
        for arguments in (([boxes], None, None), (groups, *weights)):
            torch.library.opcheck(ops.prepare_boxes.default, (*arguments, 2, True, *RULE))
        torch.library.opcheck(ops.level_weights.default, (groups, *RULE))
    rows, index = ops.prepare_boxes([boxes], *weights, 2, False, *RULE)
    distill = (apprentice, expert, rows, index)
    geometry = (STRIDES, STRIDES, *BINS)
    torch.library.opcheck(ops.distill_loss.default, (*distill, *geometry))
    for wanted in ((True, False), (False, True), (True, True)):
        for factor in (None, torch.rand(4, device=device)):
            torch.library.opcheck(ops.distill_gradient.default, (*distill, factor, *geometry, *wanted))
    features = pyramid(dtype=dtype, layout=layout, device=device)
    torch.library.opcheck(ops.align.default, (features, rows, index, STRIDES, *BINS))
    shapes = [n for m in features for n in m.shape]
    last = [is_channels_last(m) for m in features]
    gradient = torch.rand(4, 5, 2, 3, device=device)
    torch.library.opcheck(ops.align_backward.default, (gradient, rows, index, shapes, last, STRIDES, *BINS))
    if device == "cpu":
        torch.library.opcheck(ops.distill_gradient.default, (*distill, None, *geometry, False, False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("gradient", [True, False])
def test_compile_dynamic(backend: str, levels: int, gradient: bool) -> None:
    """Any number of levels; other sizes, numbers of boxes and float options in one process, without a new graph."""
    device = DEVICE_OF[backend]
    strides = (4, 8, 16, 32)[:levels]
    module = SoftRoIDistillLoss(strides=strides, backend=backend)

    def step(maps: Any, expert: Any, boxes: Any, sigma: float, size: float) -> torch.Tensor:
        options: dict[str, Any] = {"strides": strides, "sigma": sigma, "canonical_size": size, "backend": backend}
        pooled = multilevel_roi_align(maps, boxes, assignment="soft", **options)
        loss = soft_roi_distill(maps, expert, boxes, canonical_level=4.0 + sigma, **options)
        return loss + module(maps, expert, boxes) + pooled.square().mean()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # In the first call no two sizes are equal: tracing would take them for one.
    calls = ((192, 288, 7, 1.0, 224.0), (96, 128, 9, 0.5, 112.0), (80, 64, 7, 0.25, 96.5), (112, 96, 8, 0.125, 48.0))
    for seed, (height, width, count, *floats) in enumerate(calls):
        sizes: dict[str, Any] = {"channels": 11, "height": height, "width": width, "strides": strides}
        maps = pyramid(**sizes, dtype=torch.float32, device=device, seed=seed, requires_grad=gradient)
        expert = pyramid(**sizes, dtype=torch.float32, device=device, seed=seed + 9)
        boxes = random_boxes(count, height=height, width=width, seed=seed).to(device)
        losses = [function(maps, expert, boxes, *floats) for function in (step, compiled)]
        torch.testing.assert_close(*losses)
        if gradient:
            torch.testing.assert_close(*(torch.autograd.grad(loss, maps) for loss in losses))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("sigma", math.inf, ValueError),
        ("sigma", True, TypeError),
        ("canonical_size", math.inf, ValueError),
        ("canonical_level", math.nan, ValueError),
        ("canonical_level", -math.inf, ValueError),
        ("output_size", b"ab", TypeError),
    ],
)
def test_compiled_calls_refuse_options(name: str, value: Any, error: type[Exception]) -> None:
    def step(maps: Any, boxes: Any) -> torch.Tensor:
        return soft_roi_distill(maps, maps, boxes, **{name: value})

    torch.compiler.reset()
    with pytest.raises(error, match=f"{name}: expected"):
        torch.compile(step, backend="eager")(pyramid(), random_boxes(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_takes_lists_of_boxes_and_channels_per_level(backend: str) -> None:
    device = DEVICE_OF[backend]

    def step(maps: Any, expert: Any, boxes: Any, weights: Any) -> torch.Tensor:
        return soft_roi_distill(maps, expert, boxes, level_weights=weights, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    options: dict[str, Any] = {"channels": (2, 3, 5, 4), "device": device}
    maps, expert = pyramid(**options, requires_grad=True), pyramid(**options, seed=1, dtype=torch.float32)
    for counts in ((3, 2), (2, 5)):
        boxes = [random_boxes(n, seed=n)[:, 1:].to(device) for n in counts]
        weights = torch.rand(sum(counts), 4, device=device)
        losses = [function(maps, expert, boxes, weights) for function in (step, compiled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, maps) for loss in losses))


def test_export_with_dynamic_sizes() -> None:
    class Step(nn.Module):
        def forward(self, maps: Any, expert: Any, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pooled = multilevel_roi_align(maps, boxes, strides=(4, 8), output_size=2)
            return soft_roi_distill(maps, expert, boxes, strides=(4, 8)), pooled

    def inputs(batch: int, height: int, width: int, count: int) -> tuple[Any, Any, torch.Tensor]:
        sizes: dict[str, Any] = {"batch": batch, "height": height, "width": width, "strides": (4, 8)}
        return pyramid(**sizes), pyramid(**sizes, seed=1), random_boxes(count, batch, height, width)

    auto = torch.export.Dim.DYNAMIC
    level = {0: auto, 2: auto, 3: auto}
    shapes = {"maps": [level, level], "expert": [level, level], "boxes": {0: auto}}
    exported = torch.export.export(Step(), inputs(3, 64, 96, 5), dynamic_shapes=shapes, strict=True)
    for call in (inputs(3, 64, 96, 5), inputs(2, 48, 40, 9), inputs(5, 128, 72, 2)):
        torch.testing.assert_close(exported.module()(*call), Step()(*call))


def test_symbolic_sizes_of_make_fx() -> None:
    def step(maps: list[torch.Tensor], expert: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        return soft_roi_distill(maps, expert, boxes) + multilevel_roi_align(maps, boxes, output_size=2).square().sum()

    traced = make_fx(step, tracing_mode="symbolic")(pyramid(), pyramid(seed=1), random_boxes(4))
    arguments = pyramid(seed=2), pyramid(seed=3), random_boxes(4, seed=1)
    torch.testing.assert_close(traced(*arguments), step(*arguments))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_values(device: str) -> None:
    with FakeTensorMode() if device == "fake" else contextlib.nullcontext():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "requires_grad": True}
        maps, boxes = pyramid(**options), random_boxes(7)
        if device == "meta":
            maps = [m.detach().to("meta").requires_grad_() for m in maps]
            boxes = boxes.to("meta")
        loss = soft_roi_distill(maps, [m.detach() for m in maps], boxes)
        assert loss.shape == () and loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, maps)
        assert [(g.shape, g.dtype) for g in gradients] == [(m.shape, m.dtype) for m in maps]
        per_box = soft_roi_distill(maps, maps, boxes, reduction="none")
        assert per_box.shape == (7,)
        pooled = multilevel_roi_align(maps, boxes, output_size=(2, 3))
        assert pooled.shape == (7, 5, 2, 3) and pooled.dtype == torch.bfloat16
        assert torch.autograd.grad(pooled.sum(), maps)[0].shape == maps[0].shape
        assert level_weights(boxes).shape == (7, 4)


@pytest.mark.parametrize("backend", backend_params("cpu", "cuda", "triton", "reference"))
def test_autocast(backend: str) -> None:
    """Under autocast maps may come mixed; values are those of float32 arithmetic on what came."""
    device = DEVICE_OF[backend]
    layer = nn.Conv2d(5, 5, 1).to(device)
    expert = pyramid(dtype=torch.float32, device=device, seed=1)
    boxes = random_boxes(6).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        features = [layer(m) for m in pyramid(dtype=torch.float32, device=device)]
        assert features[0].dtype == torch.bfloat16
        loss = soft_roi_distill(features, expert, boxes, backend=backend)
        pooled = multilevel_roi_align(features, boxes, backend=backend)
    assert loss.dtype == torch.float32
    assert pooled.dtype == torch.bfloat16
    loss.backward()
    assert layer.weight.grad is not None
    exact = [f.detach().cpu().double() for f in features]
    expected = reference.soft_roi_distill(exact, [e.cpu().double() for e in expert], boxes.cpu())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_module_equals_function_and_survives_pickling() -> None:
    options: dict[str, Any] = {"output_size": (3, 2), "assignment": "hard", "sigma": 0.5, "reduction": "sum"}
    module = SoftRoIDistillLoss(**options)
    maps, expert, boxes = pyramid(), pyramid(seed=1), random_boxes(5)
    weights = torch.rand(5)
    levels = torch.rand(5, 4)
    expected = soft_roi_distill(maps, expert, boxes, box_weights=weights, **options)
    by_level = soft_roi_distill(maps, expert, boxes, box_weights=weights, level_weights=levels, **options)
    copy = pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for m in (module, copy, torch.load(buffer, weights_only=False)):
        assert torch.equal(m(maps, expert, boxes, weights), expected)
        assert torch.equal(m(maps, expert, boxes, weights, levels), by_level)
    assert module.state_dict() == {}
    module.load_state_dict({})
    assert list(module.parameters()) == []
    assert "assignment='hard'" in repr(module)
    with pytest.raises(ValueError, match="sigma"):
        SoftRoIDistillLoss(sigma=0)


def test_dicts_and_box_lists_mean_the_same() -> None:
    maps, expert, boxes = pyramid(), pyramid(seed=1), random_boxes(7)
    boxes = boxes[boxes[:, 0].argsort(stable=True)]
    expected = soft_roi_distill(maps, expert, boxes)
    lists = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    assert torch.equal(soft_roi_distill(maps, expert, lists), expected)
    names = ("p2", "p3", "p4", "p5")
    shuffled = {name: expert[int(name[1]) - 2] for name in reversed(names)}
    assert torch.equal(soft_roi_distill(dict(zip(names, maps, strict=True)), shuffled, lists), expected)
    with pytest.raises(ValueError, match="expert: expected the maps"):
        soft_roi_distill(dict(zip(names, maps, strict=True)), {"a": maps[0]}, boxes)
