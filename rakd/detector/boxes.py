"""Arithmetic of 2D boxes ``(x1, y1, x2, y2)``: overlaps, deltas, and suppression, none of which waits for a device.

torchvision's ``BoxCoder`` copies its weights from the host at each call, and its ``batched_nms`` reads shapes from the
device: on a GPU each of those holds the host up until everything queued before is done.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from rakd.nn import send

Scales = tuple[float, float, float, float]

_MAX_LOG_SCALE = math.log(1000 / 16)  # torchvision's and Detectron's bound of the logarithm of a size's change
_ROUNDS = 16  # rounds of suppression between two questions to the device; chains of more overlaps are rare


def box_areas(boxes: Tensor) -> Tensor:
    """Areas ``[...]`` of boxes ``[..., 4]``."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def have_area(boxes: Tensor) -> Tensor:
    """Which boxes ``[..., 4]`` are wider and higher than 0, ``[...]``: not those of which clipping left nothing."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def box_overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each pair.

    Args:
        a: ``[..., N, 4]``.
        b: ``[..., M, 4]``.

    Returns:
        ``[..., N, M]``; NaN where both boxes are empty.
    """
    shared = box_intersections(a, b)
    return shared / (box_areas(a)[..., :, None] + box_areas(b)[..., None, :] - shared)


def box_intersections(a: Tensor, b: Tensor) -> Tensor:
    """Areas that boxes ``[..., N, 4]`` and ``[..., M, 4]`` share, ``[..., N, M]``."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    return width.clamp(min=0) * height.clamp(min=0)


def encode_deltas(boxes: Tensor, anchors: Tensor, scales: Scales) -> Tensor:
    """Deltas ``[..., 4]`` that lead from anchors to boxes, ``[..., 4]`` each (Faster R-CNN, arXiv 1506.01497)."""
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = (boxes[..., :2] + 0.5 * size - anchors[..., :2] - 0.5 * anchor_size) / anchor_size
    growth = (size / anchor_size).log()
    x, y, w, h = scales
    return torch.stack([x * shift[..., 0], y * shift[..., 1], w * growth[..., 0], h * growth[..., 1]], dim=-1)


def decode_deltas(deltas: Tensor, anchors: Tensor, scales: Scales) -> Tensor:
    """The boxes ``[..., 4]`` that deltas lead to from anchors; reverses `encode_deltas`."""
    anchors = anchors.to(deltas.dtype)
    width, height = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    x, y, w, h = scales
    center_x = deltas[..., 0] / x * width + (anchors[..., 0] + 0.5 * width)
    center_y = deltas[..., 1] / y * height + (anchors[..., 1] + 0.5 * height)
    half_width = 0.5 * ((deltas[..., 2] / w).clamp(max=_MAX_LOG_SCALE).exp() * width)
    half_height = 0.5 * ((deltas[..., 3] / h).clamp(max=_MAX_LOG_SCALE).exp() * height)
    return torch.stack(
        [center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height], dim=-1
    )


def image_extents(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Sizes (width, height) as ``[B, 2]`` float32 on a device, copied without waiting for it."""
    return send(torch.tensor(sizes, dtype=torch.float32), device)


def clip_boxes(boxes: Tensor, extents: Tensor) -> Tensor:
    """Move the corners of boxes ``[B, ..., 4]`` into ``0 .. extents``, ``[B, 2]`` (x, y)."""
    high = extents.repeat(1, 2).to(boxes.dtype).view(len(boxes), *(1,) * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), high)


@torch.no_grad()
def suppress(boxes: Tensor, scores: Tensor, valid: Tensor, limit: float) -> Tensor:
    """Greedy non-maximum suppression in many groups at once.

    In each group a box is kept unless a kept one with a higher score (at equal scores: an earlier one) overlaps it by
    more than ``limit``. On a GPU all groups are worked on together by Cluster-NMS (arXiv 2005.03572): "kept" starts
    as all boxes and is computed anew from itself until nothing changes, which is the greedy result. The host asks
    once in 16 rounds whether that is so.

    Args:
        boxes: ``[G, N, 4]`` float32 or float64.
        scores: ``[G, N]``.
        valid: ``[G, N]`` bool; other boxes are neither kept nor suppress any.
        limit: Intersection over union.

    Returns:
        ``[G, N]`` bool, the kept ones.
    """
    if boxes.device.type == "cpu":
        # torchvision's loop stops early and is the faster there.
        rows = [_suppress_one(*group, limit) for group in zip(boxes, scores, valid, strict=True)]
        return torch.stack(rows) if rows else valid
    return suppress_together(boxes, scores, valid, limit)


def suppress_together(boxes: Tensor, scores: Tensor, valid: Tensor, limit: float) -> Tensor:
    """`suppress` by Cluster-NMS, on any device."""
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ordered = boxes.gather(1, order[..., None].expand_as(boxes))
    candidates = valid.gather(1, order)
    # By group, since the overlaps' intermediate results are many times larger than what is kept of them.
    beats = torch.stack([(box_overlaps(rows, rows) > limit).triu_(1) for rows in ordered])
    kept = candidates
    for _ in range(-(-boxes.shape[1] // _ROUNDS)):
        for _ in range(_ROUNDS):
            before, kept = kept, candidates & ~(beats & kept[:, :, None]).any(dim=1)
        if torch.equal(before, kept):
            break
    return torch.zeros_like(valid, memory_format=torch.contiguous_format).scatter_(1, order, kept)


def _suppress_one(boxes: Tensor, scores: Tensor, valid: Tensor, limit: float) -> Tensor:
    kept = torch.zeros_like(valid)
    if torch.compiler.is_compiling():  # a graph of fixed shapes: what is not valid goes behind all others
        return kept.index_fill(0, nms(boxes, scores.masked_fill(~valid, -torch.inf), limit), True) & valid
    rows = valid.nonzero()[:, 0]
    return kept.index_fill(0, rows[nms(boxes[rows], scores[rows], limit)], True)
