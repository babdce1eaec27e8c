"""torch.compile, opcheck, autocast, and use as a module: what trainers wrap around a loss."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from cases import DEVICE_OF, backend_params, pyramid, random_boxes
from torch import nn

from rakd_ops import SoftRoIDistillLoss, _library, multilevel_roi_align, reference, soft_roi_distill

BACKENDS = backend_params("cpu", "cuda", "triton")
GEOMETRY = ([2, 3], 2, 0, 1.0, 224.0, 4.0)
STRIDES = [4.0, 8.0, 16.0, 32.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(backend: str, compiler: str, reduction: str) -> None:
    device = DEVICE_OF[backend]
    layer = nn.Conv2d(3, 3, 1).to(device)
    expert = pyramid(channels=3, dtype=torch.float32, device=device, seed=1)

    def step(maps: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        features = [layer(m) for m in maps]
        loss = soft_roi_distill(features, expert, boxes, reduction=reduction, backend=backend)
        pooled = multilevel_roi_align(features, boxes, output_size=2, backend=backend)
        return 3.0 * loss.sum() + pooled.square().mean()

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
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_opcheck(device: str, layout: str) -> None:
    options: dict[str, Any] = {"layout": layout, "device": device, "dtype": torch.float32}
    apprentice, expert = pyramid(**options), pyramid(**options, seed=1)
    boxes = random_boxes(4).to(device)
    coefficients = torch.rand(4, dtype=torch.float64, device=device)
    distill = (apprentice, expert, boxes, coefficients, STRIDES, STRIDES, *GEOMETRY)
    ops = torch.ops.rakd_ops
    torch.library.opcheck(ops.distill_loss.default, distill)
    for wanted in ((True, False), (False, True), (True, True)):
        torch.library.opcheck(ops.distill_gradient.default, (*distill, *wanted))
    torch.library.opcheck(ops.align.default, (apprentice, boxes, STRIDES, *GEOMETRY))
    shapes = [n for m in apprentice for n in m.shape]
    last = [_library._is_channels_last(m) for m in apprentice]
    gradient = torch.rand(4, 5, 2, 3, device=device)
    torch.library.opcheck(ops.align_backward.default, (gradient, boxes, shapes, last, STRIDES, *GEOMETRY))
    if device == "cpu":
        torch.library.opcheck(ops.distill_gradient.default, (*distill, False, False))
        torch.library.opcheck(ops.level_weights.default, (boxes, STRIDES, *GEOMETRY[2:]))


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


def test_mixed_dtypes_outside_autocast_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"expert\[0\]: expected torch.float32 as in apprentice\[0\], got torch.bfloat16"
    ):
        soft_roi_distill(pyramid(dtype=torch.float32), pyramid(dtype=torch.bfloat16), random_boxes(3))


def test_module_equals_function_and_survives_pickling() -> None:
    options: dict[str, Any] = {"output_size": (3, 2), "assignment": "hard", "sigma": 0.5, "reduction": "sum"}
    module = SoftRoIDistillLoss(**options)
    maps, expert, boxes = pyramid(), pyramid(seed=1), random_boxes(5)
    weights = torch.rand(5)
    expected = soft_roi_distill(maps, expert, boxes, box_weights=weights, **options)
    copy = pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for m in (module, copy, torch.load(buffer, weights_only=False)):
        assert torch.equal(m(maps, expert, boxes, weights), expected)
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
