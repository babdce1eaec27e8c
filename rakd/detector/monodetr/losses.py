"""MonoDETR's losses. Each decoder layer has all of them but the depth map's; a term is the sum over the layers."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from rakd.detector.monodetr.configs import DepthConfig, LossConfig
from rakd.detector.monodetr.heads import Predictions, boxes_2d
from rakd.detector.monodetr.matching import ALPHA, GAMMA, generalized_iou
from rakd.detector.monodetr.targets import QueryTargets, depth_map_targets
from rakd.distributed import all_reduce_mean, shared_mean_count

_FOREGROUND = 13.0  # weight of an object's cell in the depth map; the background's is 1


def query_losses(
    found: Predictions, depth: Tensor, targets: QueryTargets, matches: Tensor, weights: LossConfig
) -> dict[str, Tensor]:
    """The weighted losses of the queries, summed over layers, by name.

    Args:
        found: Predictions with a first axis more: the L layers.
        depth: ``[L, B, N]`` distances, metres.
        targets: The objects.
        matches: ``[L, B, groups, T]``, see `rakd.detector.monodetr.matching.match`.
        weights: Of the terms.
    """
    layers, images, groups, most = matches.shape
    rows = matches.flatten(2)
    valid = targets.valid[:, None].expand(images, groups, most).flatten(1)

    def own(values: Tensor) -> Tensor:
        """Predictions of the matched queries, ``[L, B, groups * T, ...]``."""
        if values.dim() == 3:
            return values.gather(2, rows)
        return values.gather(2, rows[..., None].expand(*rows.shape, values.shape[3]))

    def wanted(values: Tensor) -> Tensor:
        """Their targets, ``[B, groups * T, ...]``."""
        return values.repeat(1, groups, *(1,) * (values.dim() - 2))

    count = groups * shared_mean_count(sum(targets.counts), depth.device).to(depth.dtype)

    def total(values: Tensor) -> Tensor:
        """Sum over all layers and objects, by the number of objects that are matched in a layer."""
        return torch.where(valid, values, 0.0).sum() / count

    boxes, goal = own(found.boxes), wanted(targets.boxes)
    apart = (boxes - goal).abs()
    angle_bins, residuals = own(found.angles).chunk(2, dim=3)
    bins = wanted(targets.angle_bins)[None].expand(layers, -1, -1)
    turn = F.cross_entropy(angle_bins.flatten(0, 2), bins.flatten(), reduction="none").view(bins.shape)
    rest = (residuals.gather(3, bins[..., None])[..., 0] - wanted(targets.angle_residuals)).abs()
    log = own(found.depth)[..., 1]
    error = (own(depth) - wanted(targets.depth)).abs()
    return {
        "class": weights.class_ * class_loss(found.logits, targets, rows, valid) / count,
        "center": weights.center * total(apart[..., :2].sum(dim=-1)),
        "box": weights.box * total(apart[..., 2:].sum(dim=-1)),
        "giou": weights.giou * total(1 - generalized_iou(boxes_2d(boxes), boxes_2d(goal))),
        "dimensions": weights.dimensions
        * dimension_loss(own(found.dimensions), wanted(targets.dimensions), valid).sum()
        / count,
        "angle": weights.angle * total(turn + rest),
        "depth": weights.depth * total(math.sqrt(2) * (-log).exp() * error + log),
    }


def class_loss(logits: Tensor, targets: QueryTargets, rows: Tensor, valid: Tensor) -> Tensor:
    """Sum of the sigmoid focal losses of all queries ``[L, B, N, classes]``; no class for those without an object."""
    groups = rows.shape[2] // targets.valid.shape[1]
    places = rows * logits.shape[3] + targets.classes.repeat(1, groups)
    # Added, since rows that only fill up all have the same place: they add nothing to it.
    marks = valid.to(logits.dtype).expand_as(places)
    wanted = logits.new_zeros(logits.shape).flatten(2).scatter_add(2, places, marks).view_as(logits)
    loss: Tensor = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA, reduction="sum")
    return loss


def dimension_loss(pred: Tensor, goal: Tensor, valid: Tensor) -> Tensor:
    """L1 of the dimensions relative to them, scaled in each layer to the size of the plain L1.

    Args:
        pred: ``[L, B, M, 3]`` metres.
        goal: ``[B, M, 3]`` metres, positive.
        valid: ``[B, M]`` bool; other rows count nothing.

    Returns:
        ``[L]`` sums.
    """
    plain = torch.where(valid[..., None], (pred - goal).abs(), 0.0)
    relative = (plain / goal).sum(dim=(1, 2, 3))
    with torch.no_grad():
        # Over all processes, so that their averaged gradients are those of one with the whole batch.
        sums = all_reduce_mean(torch.stack([plain.sum(dim=(1, 2, 3)), relative]))
        scale = sums[0] / sums[1].clamp(min=1e-12)
    return relative * scale


def depth_map_loss(logits: Tensor, targets: QueryTargets, config: DepthConfig) -> Tensor:
    """Softmax focal loss of the map of distances, mean over cells, those of objects weighted by 13.

    Args:
        logits: ``[B, bins + 1, h, w]``.
        targets: The objects.
        config: The bins.
    """
    goal = depth_map_targets(targets, (logits.shape[2], logits.shape[3]), config)
    log = logits.log_softmax(dim=1).gather(1, goal[:, None])[:, 0]
    weights = torch.where(goal < config.bins, _FOREGROUND, 1.0).to(log.dtype)
    return (weights * -ALPHA * (1 - log.exp()) ** GAMMA * log).mean()
