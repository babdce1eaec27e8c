"""Matching of queries and objects: the cheapest one-to-one assignment in each image, group and decoder layer."""

import numpy as np
import torch
from torch import Tensor

from rakd.detector.monodetr.configs import LossConfig
from rakd.detector.monodetr.heads import boxes_2d
from rakd.detector.monodetr.targets import QueryTargets
from rakd.extras import require
from rakd.nn import send

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal losses (arXiv 1708.02002)."""

_TINY = 1e-8  # keeps logarithms of probabilities finite
_WORST = 1e6  # cost of a pair that has none: assignments need numbers, and such a loss is refused afterwards


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: QueryTargets, groups: int, weights: LossConfig) -> Tensor:
    """Match queries and objects.

    All costs come off the device in one copy, the one wait of a step for the matching.

    Args:
        logits: ``[L, B, groups * Q, classes]`` of L decoder layers.
        boxes: ``[L, B, groups * Q, 6]``.
        targets: The objects; at most Q an image.
        groups: Sets of queries, each of which is matched with all objects.
        weights: Of the costs.

    Returns:
        ``[L, B, groups, T]`` int64, the query, among the ``groups * Q``, of each object; 0 where a row of the targets
        only fills up.
    """
    assign = require("scipy.optimize", "train").linear_sum_assignment
    cost = matching_costs(logits, boxes, targets, weights).nan_to_num(_WORST, _WORST, -_WORST)
    layers, images, queries, most = cost.shape
    size = queries // groups
    found = np.zeros((layers, images, groups, most), dtype=np.int64)
    table = cost.view(layers, images, groups, size, most).cpu().numpy()
    for image, count in enumerate(targets.counts):
        if count > size:
            raise ValueError(f"targets must hold at most {size} objects an image, as many as queries, got {count}")
        for layer in range(layers) if count else ():
            for group in range(groups):
                rows, columns = assign(table[layer, image, group, :, :count])
                found[layer, image, group, columns] = rows + group * size
    return send(torch.from_numpy(found), cost.device)


def matching_costs(logits: Tensor, boxes: Tensor, targets: QueryTargets, weights: LossConfig) -> Tensor:
    """Cost of each pair, ``[L, B, N, T]``: class, centre, box and GIoU, each with its weight.

    The class's cost is how much the focal loss changes when the query takes over the object.
    """
    probability = logits.sigmoid()
    gain = ALPHA * (1 - probability) ** GAMMA * -(probability + _TINY).log()
    lost = (1 - ALPHA) * probability**GAMMA * -(1 - probability + _TINY).log()
    own = targets.classes[None, :, None].expand(*logits.shape[:3], -1)
    classes = (gain - lost).gather(3, own)
    apart = (boxes[:, :, :, None] - targets.boxes[None, :, None]).abs()
    overlap = generalized_iou(boxes_2d(boxes)[:, :, :, None], boxes_2d(targets.boxes)[None, :, None])
    return (
        weights.class_ * classes
        + weights.center * apart[..., :2].sum(dim=-1)
        + weights.box * apart[..., 2:].sum(dim=-1)
        - weights.giou * overlap
    )


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union (arXiv 1902.09630) of boxes ``[..., 4]``, pair by pair; in -1 .. 1."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    union = (a[..., 2:] - a[..., :2]).prod(dim=-1) + (b[..., 2:] - b[..., :2]).prod(dim=-1) - shared
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(dim=-1)
    return shared / union.clamp(min=_TINY) - (around - union) / around.clamp(min=_TINY)
