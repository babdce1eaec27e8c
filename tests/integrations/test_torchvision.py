"""DistilledDetector with torchvision's own detectors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

detection = pytest.importorskip("torchvision.models.detection")

from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402

from rakd.distill.hooks import tap  # noqa: E402
from rakd.integrations.torchvision import DistilledDetector, _levels  # noqa: E402
from rakd_ops import soft_roi_distill  # noqa: E402

SIZE = {"min_size": 96, "max_size": 160}


def make(kind: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    norm = {"norm_layer": nn.BatchNorm2d, "weights": None, "trainable_layers": 5}
    sizes = {**SIZE, **kwargs}
    if kind in ("fcos", "retinanet"):
        extra = LastLevelP6P7(256, 256)
        backbone = resnet_fpn_backbone(backbone_name="resnet18", returned_layers=[2, 3, 4], extra_blocks=extra, **norm)
        return {"fcos": detection.FCOS, "retinanet": detection.RetinaNet}[kind](backbone, 4, **sizes)
    if kind in ("faster", "mask"):
        backbone = resnet_fpn_backbone(backbone_name="resnet18", **norm)
        return {"faster": detection.FasterRCNN, "mask": detection.MaskRCNN}[kind](backbone, 4, **sizes)
    if kind == "ssdlite":
        return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    if kind == "ssd":
        return detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)
    return detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=4, **sizes)


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    images = [torch.rand(3, 80, 120, generator=generator), torch.rand(3, 72, 100, generator=generator)]
    boxes = [torch.tensor([[5.0, 8, 50, 60]]), torch.tensor([[0.0, 0, 90, 40], [60, 10, 80, 60]])]
    labels = [torch.tensor([1]), torch.tensor([2, 3])]
    masks = [
        torch.ones(len(rows), *image.shape[1:], dtype=torch.uint8) for rows, image in zip(boxes, images, strict=True)
    ]
    rows = [{"boxes": b, "labels": c, "masks": m} for b, c, m in zip(boxes, labels, masks, strict=True)]
    return images, rows


@pytest.mark.parametrize(
    "kind",
    [
        *("faster", "ssdlite"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("retinanet", "fcos", "mask", "ssd")),
    ],
)
def test_losses_gain_one(kind: str) -> None:
    plain = make(kind)
    expert = make(kind, seed=1)
    before = copy.deepcopy(expert.state_dict())
    detector = DistilledDetector(copy.deepcopy(plain), expert, weight="auto:0.1", normalize=True)
    images, targets = batch()
    torch.manual_seed(7)
    expected = plain(images, targets)
    torch.manual_seed(7)
    losses = detector(images, targets)
    assert list(losses) == [*expected, "loss_distill"]
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss)
    assert losses["loss_distill"].item() == pytest.approx(
        0.1 * sum(loss.item() for loss in expected.values()), rel=1e-5
    )
    losses["loss_distill"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in list(detector.model.backbone.parameters())[:1])
    assert list(detector.model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in expert.state_dict().items())
    assert not any(p.requires_grad for p in expert.backbone.parameters())
    found = detector.eval()(images)
    assert [set(one) >= {"boxes", "scores", "labels"} for one in found] == [True, True]


def test_boxes_and_images_are_those_that_the_backbone_sees() -> None:
    model, expert = make("faster"), make("faster", seed=1)
    detector = DistilledDetector(model, expert, weight=1.0)
    images, targets = batch()
    with tap(model.transform) as transform, tap(model.backbone) as backbone:
        loss = detector(images, targets)["loss_distill"]
    seen, resized = transform.output
    assert seen.tensors.shape[-1] > 120  # resized, so that the original boxes would lie elsewhere
    with torch.no_grad():
        theirs = expert.eval().backbone(seen.tensors)
    expected = soft_roi_distill(
        backbone.output, theirs, [target["boxes"] for target in resized], strides=(4, 8, 16, 32, 64)
    )
    torch.testing.assert_close(loss, expected)


def test_the_expert_gets_its_own_normalisation() -> None:
    ours, theirs = make("faster"), make("faster", seed=1, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1.0, 2.0])
    detector = DistilledDetector(ours, theirs)
    images, targets = batch()
    given: list[Tensor] = []
    theirs.backbone.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    detector(images, targets)
    torch.testing.assert_close(given[-1], theirs.transform(images)[0].tensors, rtol=1e-5, atol=1e-5)
    assert (given[-1][1, :, :, -1] == 0).all()  # padded


def test_levels_of_equal_strides_meet_and_channels_are_adapted() -> None:
    detector = DistilledDetector(make("faster"), make("ssdlite", seed=1))
    assert detector.distiller.strides == (16, 32, 64)
    adapters = list(detector.distiller.parameters())
    assert len(adapters) == 6
    assert {id(p) for p in adapters} <= {id(p) for p in detector.parameters()}
    images, targets = batch()
    detector(images, targets)["loss_distill"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    # Two maps of stride 32 in one network: the deeper.
    mobile = DistilledDetector(make("mobile"), make("faster", seed=1))
    assert mobile.distiller.strides == (32, 64)
    assert mobile(images, targets)["loss_distill"].item() > 0


def test_the_coarsest_maps_of_ssdlite_have_strides_of_their_own() -> None:
    # 3, 2 and 1 cells of 320 pixels: 2 cells alone would fit 128 as well, and take the place of 3.
    levels = _levels(None, make("ssdlite").backbone, (320, 320), torch.device("cpu"))
    assert list(levels) == [16, 32, 64, 128, 256, 512]
    assert [name for name, _ in levels.values()] == ["0", "1", "2", "3", "4", "5"]


def test_an_expert_in_half_precision() -> None:
    expert = make("faster", seed=1)
    losses = DistilledDetector(make("faster"), copy.deepcopy(expert), weight=1.0).train()(*batch())
    half = DistilledDetector(make("faster"), expert.bfloat16(), weight=1.0).train()(*batch())
    # bfloat16 has eight bits: maps that passed thirty layers differ by some percent.
    assert half["loss_distill"].item() == pytest.approx(losses["loss_distill"].item(), rel=0.1)


def test_any_module_may_be_the_expert() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 24, 8, stride=8)

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.stem(images)]

    detector = DistilledDetector(make("retinanet"), Expert(), weight=1.0)
    assert detector.distiller.strides == (8,)
    images, targets = batch()
    assert detector(images, targets)["loss_distill"].item() > 0


def test_what_is_no_detector_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a detector of torchvision with a transform, got Linear"):
        DistilledDetector(nn.Linear(1, 1), make("faster"))
    model = make("faster")
    with pytest.raises(ValueError, match="expert: expected a network of its own"):
        DistilledDetector(model, model)
    with pytest.raises(TypeError, match=r"strides: expected none, since it is found, .* got \(4, 8\)"):
        DistilledDetector(model, make("faster"), strides=(4, 8))
    one = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"expert: expected a level of one of the strides \[4.0, 8.0, .*, got \[1.0\]"):
        DistilledDetector(model, one)
