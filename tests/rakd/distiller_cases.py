"""A distiller of small networks, and maps for it; imported by tests."""

from typing import Any

from distill_cases import STAGES, Network, images
from torch import Tensor

from rakd.distill import Distiller


def features(seed: int = 2, scale: float = 1.0) -> list[Tensor]:
    return [scale * m for m in Network(seed=seed).features(images())]


def make(**options: Any) -> Distiller:
    return Distiller(Network((4, 6, 8), seed=1), **{"features": STAGES, "canonical_size": 24, **options})
