"""The level rule in plain PyTorch: how a box's pyramid levels are weighted.

Compiled code has its own copy in ``csrc/geometry.h``; the tests hold the two equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ASSIGNMENTS = ("soft", "hard", "uniform")  # order: csrc/geometry.h, enum Assignment
LEVEL_EPSILON = 1e-6  # keeps a level from falling below an integer by rounding alone, as torchvision's LevelMapper


def weigh_levels(
    boxes: Tensor,
    strides: tuple[float, ...],
    assignment: int,
    sigma: float,
    canonical_size: float,
    canonical_level: float,
) -> Tensor:
    """Weigh the levels of each box: the rule itself, on validated arguments.

    Args:
        boxes: ``[K, 5]`` float64, ``(batch_index, x1, y1, x2, y2)`` in pixels.
        strides: Pixels per cell of each level, increasing; level ``l`` is ``log2(stride)``.
        assignment: Index into ``ASSIGNMENTS``.
        sigma: Width of the Gaussian of ``"soft"``, in levels.
        canonical_size: Side in pixels of a box of level ``canonical_level``.
        canonical_level: See ``canonical_size``.

    Returns:
        ``[K, L]`` float64; each row sums to 1.
    """
    count = len(strides)
    name = ASSIGNMENTS[assignment]
    if name == "uniform":
        return boxes.new_full((boxes.shape[0], count), 1.0 / count)
    # Made on the boxes' device: copying Python's numbers to a GPU would wait for it, and cannot be captured in a graph.
    numbers = [math.log2(stride) for stride in strides]
    levels = torch.cat([boxes.new_full((1,), number) for number in numbers])
    width, height = boxes[:, 3] - boxes[:, 1], boxes[:, 4] - boxes[:, 2]
    area = width * height
    area = torch.where(area > 0, area, 0.0)  # also where it is NaN, infinity times 0
    continuous = canonical_level + torch.log2(area.sqrt() / canonical_size)
    continuous = continuous.clamp(min=numbers[0], max=numbers[-1])[:, None]
    if name == "hard":
        # The coarsest level not above m + epsilon: floor(m + epsilon) where levels are consecutive integers.
        chosen = (levels <= continuous + LEVEL_EPSILON).sum(dim=1).clamp(min=1) - 1
        return (torch.arange(count, device=boxes.device) == chosen[:, None]).to(torch.float64)
    squared = (levels - continuous).square()
    # The nearest level's exponent is taken off, so that no sigma, however small, turns this into 0 / 0.
    excess = squared - squared.amin(dim=1, keepdim=True)
    weights = torch.exp(-0.5 * excess / sigma / sigma)
    return weights / weights.sum(dim=1, keepdim=True)
