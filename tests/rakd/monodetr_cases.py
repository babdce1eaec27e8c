"""A small MonoDETR, and predictions that say what they should; imported by tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rakd.detector.base_config import BackboneConfig
from rakd.detector.monodetr.configs import RULES, DepthConfig, MonoDETRConfig, TransformerConfig
from rakd.detector.monodetr.heads import ANGLE_BINS, Predictions
from rakd.detector.monodetr.targets import QueryTargets

LOSSES = ["class", "center", "box", "giou", "dimensions", "angle", "depth", "depth_map"]

CONFIG = MonoDETRConfig(
    BackboneConfig("mobilenet_v3_small", 16, weights="random", frozen_norm=False),
    depth=DepthConfig(bins=8),
    transformer=TransformerConfig(
        heads=2, points=2, encoder_layers=1, decoder_layers=2, hidden=16, queries=6, groups=2
    ),
    rules=type(RULES)(**{**vars(RULES), "most": 6, "zoom": 0.0, "min_height": 10.0}),
    score_limit=0.0,
    detections=12,
    canonical_size=28.0,
    height=64,
    width=128,
)
"""For images of 128 x 64 pixels."""


def perfect(targets: QueryTargets, image: int = 0) -> tuple[Predictions, Tensor]:
    """Predictions of one layer for one image, a query an object, and distances, that say exactly what they should."""
    count = targets.counts[image]
    rows = slice(0, count)
    dtype = targets.boxes.dtype
    angles = torch.zeros(1, count, 2 * ANGLE_BINS, dtype=dtype)
    bins = targets.angle_bins[image, rows]
    places = torch.arange(count)
    angles[0, places, bins] = 5.0
    angles[0, places, ANGLE_BINS + bins] = targets.angle_residuals[image, rows]
    logits = torch.full((1, count, 3), -9.0, dtype=dtype)
    logits[0, places, targets.classes[image, rows]] = 4.0 - places.to(dtype)
    depth = torch.stack([torch.zeros(count, dtype=dtype), torch.full((count,), math.log(0.5), dtype=dtype)], dim=1)
    found = Predictions(
        logits, targets.boxes[image, rows][None], targets.dimensions[image, rows][None], angles, depth[None]
    )
    return found, targets.depth[image, rows][None]
