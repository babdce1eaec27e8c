"""Losses of the 3D box: what the attribute and distance heads shall say of an object, and how far off they are.

Each loss gives one value a box; whoever calls averages. ``e`` is an error, ``u`` a predicted log-uncertainty::

    Laplace                  |e| exp(-u) + u                 (negative log-likelihood, up to a constant)
    distance (bivariate)     sqrt(eᵀ L Lᵀ e) - a - b         with L = [[exp(a), 0], [c, exp(b)]]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rakd.data.targets import Targets
from rakd.detector.heads import Box3DPrediction
from rakd.detector.sampling import IGNORED

RECIPROCAL_SCALE = 700.0
"""Reciprocal heights are 700 / pixels at the paper's image height; that keeps them near 10."""

PAPER_HEIGHT = 512.0
"""Image height, in pixels, that `RECIPROCAL_SCALE` belongs to."""

_SMOOTH = 1e-6  # keeps the square root differentiable at no error


def box3d_losses(pred: Box3DPrediction, boxes: Tensor, targets: Targets, image_height: float) -> dict[str, Tensor]:
    """The five losses of each box.

    Args:
        pred: Predictions for N boxes.
        boxes: ``[N, 4]`` the boxes (proposals), pixels.
        targets: The object of each box, N rows.
        image_height: Height that images are resized to, pixels.

    Returns:
        ``dimensions``, ``angle``, ``corners``, ``center``, ``distance``: ``[N]`` each.
    """
    angle = torch.stack([targets.alpha.sin(), targets.alpha.cos()], dim=1)
    return {
        "dimensions": laplace(pred.dimensions - targets.dimensions, pred.dimensions_log),
        "angle": laplace(pred.angle - angle, pred.angle_log),
        "corners": corner_loss(pred, boxes, targets),
        "center": laplace(pred.keypoints[:, 8] - relative_points(targets.keypoints[:, 8], boxes), pred.center_log),
        "distance": distance_loss(pred, boxes, targets, image_height),
    }


def laplace(error: Tensor, log_uncertainty: Tensor) -> Tensor:
    """Laplace negative log-likelihood, mean over an error's components.

    Args:
        error: ``[N, D]``.
        log_uncertainty: ``[N]``.
    """
    return error.abs().mean(dim=1) * (-log_uncertainty).exp() + log_uncertainty


def corner_loss(pred: Box3DPrediction, boxes: Tensor, targets: Targets) -> Tensor:
    """L1 of the projected corners, mean over those in front of the camera, ``[N]``, in units of the boxes' sizes."""
    error = (pred.keypoints[:, :8] - relative_points(targets.keypoints[:, :8], boxes)).abs().mean(dim=2)
    seen = targets.keypoints_seen[:, :8]
    return (error * seen).sum(dim=1) / seen.sum(dim=1).clamp(min=1)


def distance_loss(pred: Box3DPrediction, boxes: Tensor, targets: Targets, image_height: float) -> Tensor:
    """Bivariate Laplace negative log-likelihood of physical height and scaled reciprocal height, ``[N]``."""
    scale = RECIPROCAL_SCALE * image_height / PAPER_HEIGHT
    reciprocal = pred.reciprocal / box_heights(boxes)
    error = torch.stack(
        [pred.height - targets.dimensions[:, 0], scale * (reciprocal - 1 / targets.projected_height)], dim=1
    )
    a, b, c = pred.factors.unbind(dim=1)
    turned = torch.stack([a.exp() * error[:, 0] + c * error[:, 1], b.exp() * error[:, 1]], dim=1)
    return (turned.square().sum(dim=1) + _SMOOTH).sqrt() - a - b


def relative_points(points: Tensor, boxes: Tensor) -> Tensor:
    """Points ``[N, ..., 2]`` relative to the centres of ``[N, 4]`` boxes, in units of their widths and heights."""
    center, size = _frames(boxes, points.dim())
    return (points - center) / size


def absolute_points(points: Tensor, boxes: Tensor) -> Tensor:
    """The reverse of `relative_points`."""
    center, size = _frames(boxes, points.dim())
    return points * size + center


def box_heights(boxes: Tensor) -> Tensor:
    """Heights ``[N]`` of boxes ``[N, 4]``, at least a pixel."""
    return (boxes[:, 3] - boxes[:, 1]).clamp(min=1.0)


def _frames(boxes: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1.0)
    for _ in range(dimensions - 2):
        center, size = center[:, None], size[:, None]
    return center, size


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, target_deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the box head: cross entropy of each box, and smooth L1 of the positives' boxes.

    Args:
        logits: ``[N, 1 + classes]``, background first.
        deltas: ``[N, classes, 4]``.
        labels: ``[N]`` int64, 0 background, ``IGNORED``, else class + 1.
        target_deltas: ``[N, 4]``, of no account where the label is not positive.

    Returns:
        ``[N]`` each; the first is 0 where the label is ``IGNORED``, the second where it is not positive.
    """
    positive = (labels > 0)[:, None]
    own = deltas.gather(1, (labels - 1).clamp(min=0)[:, None, None].expand(-1, 1, 4))[:, 0]
    # Before the loss, so that whatever stands there gives no gradient that is not finite.
    wanted = torch.where(positive, target_deltas, 0.0).to(own.dtype)
    box = F.smooth_l1_loss(own, wanted, beta=1 / 9, reduction="none")
    classes = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return classes, torch.where(positive, box, 0.0).sum(dim=1)
