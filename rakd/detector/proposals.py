"""Region proposals: torchvision's network, with regions to ignore and with sampling that images carry along."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_area

from rakd.detector.configs import ProposalConfig
from rakd.detector.pyramid import STRIDES

IGNORED = -1.0
"""Label of an anchor or proposal that no loss looks at; 0 is background, more is an object."""

_COVERED = 0.5  # share of a box inside a region to ignore from which on it is ignored


class Sampler:
    """Draws positives and negatives of each image from the image's own seed.

    So a draw depends neither on the other images of the batch nor on how many processes share it.

    Args:
        count: Boxes an image.
        positive_share: Most of them that may be positive, 0..1. Negatives fill the rest.
    """

    def __init__(self, count: int, positive_share: float) -> None:
        self.count = count
        self.positive_share = positive_share
        self.seeds: Sequence[int] = ()

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Draw from each image.

        Args:
            labels: Per image ``[N]``: 1 or more positive, 0 negative, `IGNORED` neither.

        Returns:
            Masks of the drawn positives and negatives, per image ``[N]`` bool.
        """
        positives, negatives = [], []
        for rows, seed in zip(labels, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            positive = _draw(rows > 0, int(self.count * self.positive_share), generator)
            negative = _draw(rows == 0, self.count - int(positive.sum()), generator)
            positives.append(positive)
            negatives.append(negative)
        return positives, negatives


def _draw(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random part of a mask, with at most ``count`` rows set."""
    rows = mask.nonzero()[:, 0]
    if len(rows) <= count:
        return mask
    chosen = torch.randperm(len(rows), generator=generator)[:count].to(rows.device)
    drawn = torch.zeros_like(mask)
    drawn[rows[chosen]] = True
    return drawn


def covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Which boxes lie by half or more of their area in one of some regions.

    Args:
        boxes: ``[N, 4]`` (x1, y1, x2, y2).
        regions: ``[M, 4]``.

    Returns:
        ``[N]`` bool.
    """
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    low = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(dim=2).amax(dim=1)
    least: Tensor = _COVERED * box_area(boxes).clamp(min=1e-6)
    return inside >= least


class _Head(RPNHead):  # type: ignore[misc]
    """torchvision's head with float32 results, whatever precision it computes in: boxes need the digits."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [score.float() for score in scores], [delta.float() for delta in deltas]


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors, but at the maps' true strides, and in float32 whatever precision the maps are in.

    bfloat16, which anchors would take over from maps under autocast, is off by up to 7 pixels at the right of a wide
    image. And of p6, whose size is rounded up, the strides do not follow from the sizes.
    """

    def __init__(self, sizes: Sequence[int], aspect_ratios: tuple[float, ...]) -> None:
        super().__init__(tuple((size,) for size in sizes), (aspect_ratios,) * len(sizes))
        self.strides = (*STRIDES, 2 * STRIDES[-1])[: len(sizes)]

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        anchors: list[Tensor] = super().grid_anchors(grid_sizes, [(stride, stride) for stride in self.strides])
        return anchors


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposal network.

    Anchors stand where torchvision puts them, at multiples of the stride: half a cell left of and above the middle of
    the cell that predicts from them. Different are: anchors have the maps' strides and float32; those that lie in
    regions to ignore count nothing; they are drawn by `Sampler`; and losses are divided by the number of anchors to be
    drawn, which is the same for every batch, so that processes which share a batch can average their gradients.

    Args:
        channels: Channels of the feature maps.
        config: Settings.
    """

    def __init__(self, channels: int, config: ProposalConfig) -> None:
        super().__init__(
            _Anchors(config.anchor_sizes, config.aspect_ratios),
            _Head(channels, len(config.aspect_ratios)),
            fg_iou_thresh=config.positive_iou,
            bg_iou_thresh=config.negative_iou,
            batch_size_per_image=config.sampled,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), config.candidates, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), config.kept, strict=True)),
            nms_thresh=config.nms_iou,
        )
        self.fg_bg_sampler = Sampler(config.sampled, 0.5)
        self.sampled = config.sampled

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors with objects; ``targets`` have "boxes" and "ignored", ``[N, 4]`` and ``[M, 4]``."""
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for rows, boxes, target in zip(labels, anchors, targets, strict=True):
            rows[(rows == 0) & covered(boxes, target["ignored"])] = IGNORED
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of the drawn anchors: cross entropy of being an object, smooth L1 of the positives' boxes."""
        total = len(labels) * self.sampled
        drawn = self.fg_bg_sampler(labels)
        positive, negative = (torch.cat(masks) for masks in drawn)
        target, deltas = torch.cat(labels), torch.cat(regression_targets)
        either = positive | negative
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[either], target[either], reduction="sum"
        )
        box_loss = F.smooth_l1_loss(pred_bbox_deltas[positive], deltas[positive], beta=1 / 9, reduction="sum")
        return objectness_loss / total, box_loss / total
