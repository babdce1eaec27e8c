"""Images and objects for detectors, and their losses; imported by tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rakd.data.targets import Targets
from rakd.detector.detector import Detector

SIZE = (128, 64)
LOSSES = [
    *("objectness", "proposal_box", "class", "box"),
    *("dimensions", "angle", "corners", "center", "distance"),
]


def make_targets(*boxes: tuple[float, float, float, float], ignored: tuple[tuple[float, ...], ...] = ()) -> Targets:
    """Objects of all classes in turn in these 2D boxes, anywhere in space."""
    count = len(boxes)
    rng = torch.Generator().manual_seed(count)
    table = torch.tensor(boxes).reshape(count, 4)
    return Targets(
        classes=torch.arange(count) % 3,
        boxes=table,
        dimensions=1 + torch.rand(count, 3, generator=rng),
        location=torch.rand(count, 3, generator=rng) + torch.tensor([0.0, 1, 12]),
        rotation_y=torch.rand(count, generator=rng),
        alpha=torch.rand(count, generator=rng),
        keypoints=table[:, None, :2] + 10 * torch.rand(count, 9, 2, generator=rng),
        keypoints_seen=torch.rand(count, 9, generator=rng) > 0.2,
        projected_height=5 + 20 * torch.rand(count, generator=rng),
        ignored=torch.tensor(ignored).reshape(-1, 4),
    )


MANY = make_targets((5, 20, 40, 50), (50, 10, 70, 55), (80, 30, 125, 60))
ONE = make_targets((60, 12, 90, 60))
NONE = make_targets()


def images(count: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(seed))


def losses(
    detector: Detector, pixels: Tensor, targets: list[Targets], seeds: list[int] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    count = len(targets)
    features = detector.extract_features(pixels)
    return detector.losses(features, [SIZE] * count, targets, list(range(count)) if seeds is None else seeds)


def still(detector: Detector) -> Detector:
    """In training mode, but with normalisation that does not look at the batch; in float64."""
    detector.double().train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return detector
