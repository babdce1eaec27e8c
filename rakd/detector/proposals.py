"""Region proposals: Faster R-CNN's network, with regions to ignore and with results of fixed shapes.

Every result has a shape that follows from the images' sizes alone, with a mask of what counts. So the host need not
wait for the device to learn how many proposals there are, and the network can be exported.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead

from rakd.data.targets import Targets
from rakd.detector.boxes import (
    box_areas,
    box_intersections,
    box_overlaps,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    suppress,
)
from rakd.detector.configs import ProposalConfig
from rakd.detector.pyramid import STRIDES
from rakd.detector.sampling import IGNORED, draw

_COVERED = 0.5  # share of a box inside a region to ignore from which on it is ignored
_MIN_SIDE = 1e-3  # pixels; smaller proposals are dropped, as torchvision does
_SCALES = (1.0, 1.0, 1.0, 1.0)  # of the deltas
_POSITIVE_SHARE = 0.5  # most of the drawn anchors that may be positive


def covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Mask of the boxes that lie by half or more of their area in one of some regions.

    Args:
        boxes: ``[N, 4]`` (x1, y1, x2, y2).
        regions: ``[M, 4]``.

    Returns:
        ``[N]`` bool.
    """
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    inside = box_intersections(boxes, regions).amax(dim=1)
    least: Tensor = _COVERED * box_areas(boxes).clamp(min=1e-6)
    return inside >= least


def match_boxes(
    boxes: Tensor, objects: Tensor, positive_iou: float, negative_iou: float, *, every_object: bool
) -> tuple[Tensor, Tensor]:
    """Find the object that each box overlaps most.

    Args:
        boxes: ``[N, 4]``.
        objects: ``[M, 4]``.
        positive_iou: Overlap from which on a box is the object's.
        negative_iou: Overlap below which it is background; in between it is neither.
        every_object: The boxes that overlap an object most are positive, however little that is; none if none does.

    Returns:
        ``[N]`` int64 rows of the objects, -1 where a box is none's; and ``[N]`` bool, which boxes are background.
    """
    if not len(objects):
        return torch.full((len(boxes),), -1, device=boxes.device), torch.ones_like(boxes[:, 0], dtype=torch.bool)
    overlaps = box_overlaps(objects, boxes)
    best, match = overlaps.max(dim=0)
    positive, negative = best >= positive_iou, best < negative_iou
    if every_object:
        chosen = ((overlaps == overlaps.amax(dim=1, keepdim=True)) & (overlaps > 0)).any(dim=0)
        positive, negative = positive | chosen, negative & ~chosen
    return torch.where(positive, match, -1), negative


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

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors of each map, ``[H * W * shapes, 4]``, in its device's memory."""
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        self.set_cell_anchors(dtype, maps[0].device)
        strides = [(stride, stride) for stride in self.strides]
        grids: list[Tensor] = self.grid_anchors([list(m.shape[2:]) for m in maps], strides)
        return grids


class ProposalNetwork(nn.Module):
    """Region proposal network (arXiv 1506.01497).

    Anchors stand where torchvision puts them, at multiples of the stride: half a cell left of and above the middle of
    the cell that predicts from them. Those that lie in regions to ignore count nothing. Losses are divided by the
    number of anchors to be drawn, which is the same for every batch, so that processes which share a batch can average
    their gradients.

    Args:
        channels: Channels of the feature maps.
        config: Settings.
    """

    def __init__(self, channels: int, config: ProposalConfig) -> None:
        super().__init__()
        self.config = config
        self.anchor_generator = _Anchors(config.anchor_sizes, config.aspect_ratios)
        self.head = _Head(channels, len(config.aspect_ratios))

    def forward(
        self,
        maps: Sequence[Tensor],
        extents: Tensor,
        targets: Sequence[Targets] = (),
        seeds: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Propose boxes; in training mode, compute the losses as well.

        Args:
            maps: ``[B, C, H, W]`` for each size of anchors, fine to coarse.
            extents: ``[B, 2]`` width and height of each image without padding.
            targets: Objects to find in each image.
            seeds: One an image, from which anchors are drawn.

        Returns:
            Boxes ``[B, P, 4]``, best first, without a gradient; which of them count, ``[B, P]`` bool; and the losses
            ``objectness`` and ``proposal_box``.
        """
        scores, deltas = self.head(list(maps))
        anchors = self.anchor_generator(maps)
        flat_scores = [_flatten(score, 1)[..., 0] for score in scores]
        flat_deltas = [_flatten(delta, 4) for delta in deltas]
        boxes, valid = self._filter(flat_scores, flat_deltas, anchors, extents)
        losses = {}
        if self.training:
            found = torch.cat(flat_scores, dim=1), torch.cat(flat_deltas, dim=1)
            losses = self._losses(*found, torch.cat(anchors), targets, seeds)
        return boxes, valid, losses

    @torch.no_grad()
    def _filter(
        self, scores: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], extents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best proposals of each level, without overlaps within it; of those the best over all levels."""
        config, mode = self.config, 0 if self.training else 1
        most = min(config.pre_nms_top_n[mode], max(score.shape[1] for score in scores))
        all_boxes, all_scores, all_valid = [], [], []
        for score, delta, anchor in zip(scores, deltas, anchors, strict=True):
            logits, rows = score.topk(min(most, score.shape[1]), dim=1)
            chosen = delta.gather(1, rows[..., None].expand(*rows.shape, 4))
            boxes = clip_boxes(decode_deltas(chosen, anchor[rows], _SCALES), extents)
            sides = boxes[..., 2:] - boxes[..., :2]
            probabilities = logits.sigmoid()
            valid = (sides >= _MIN_SIDE).all(dim=2) & (probabilities >= 0)  # false for NaN
            missing = most - rows.shape[1]
            all_boxes.append(F.pad(boxes, (0, 0, 0, missing)))
            all_scores.append(F.pad(probabilities, (0, missing)))
            all_valid.append(F.pad(valid, (0, missing)))
        images, levels = len(extents), len(scores)
        boxes, best, valid = (torch.stack(values, dim=1) for values in (all_boxes, all_scores, all_valid))
        kept = suppress(boxes.flatten(0, 1), best.flatten(0, 1), valid.flatten(0, 1), config.nms_iou)
        kept = kept.view(images, levels * most)
        return best_boxes(boxes.flatten(1, 2), best.flatten(1, 2), kept, config.post_nms_top_n[mode])[:2]

    def _losses(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, targets: Sequence[Targets], seeds: Sequence[int]
    ) -> dict[str, Tensor]:
        """Losses of the drawn anchors: cross entropy of being an object, smooth L1 of the positives' boxes."""
        labels, objects = self.assign(anchors, targets)
        drawn = draw(labels, seeds, self.config.sampled, _POSITIVE_SHARE)
        total = len(targets) * self.config.sampled
        own = scores.gather(1, drawn.rows)
        objectness = F.binary_cross_entropy_with_logits(own, drawn.positive.to(own.dtype), reduction="none")
        # Positives come first.
        most = min(int(self.config.sampled * _POSITIVE_SHARE), drawn.rows.shape[1])
        rows, positive = drawn.rows[:, :most], drawn.positive[:, :most, None]
        with torch.no_grad():
            wanted = encode_deltas(objects.gather(1, rows[..., None].expand(*rows.shape, 4)), anchors[rows], _SCALES)
            wanted = torch.where(positive, wanted, 0.0)
        chosen = deltas.gather(1, rows[..., None].expand(*rows.shape, 4))
        box = F.smooth_l1_loss(chosen, wanted.to(chosen.dtype), beta=1 / 9, reduction="none")
        return {
            "objectness": torch.where(drawn.drawn, objectness, 0.0).sum() / total,
            "proposal_box": torch.where(positive, box, 0.0).sum() / total,
        }

    @torch.no_grad()
    def assign(self, anchors: Tensor, targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
        """Match anchors ``[N, 4]`` with the objects of each image.

        Returns:
            Labels ``[B, N]`` int64: 1 an object, 0 background, ``IGNORED``; and the boxes of the objects ``[B, N, 4]``,
            zeros where a box is none's.
        """
        labels, objects = [], []
        for target in targets:
            match, negative = match_boxes(
                anchors, target.boxes, self.config.positive_iou, self.config.negative_iou, every_object=True
            )
            negative &= ~covered(anchors, target.ignored)
            labels.append(torch.where(match >= 0, 1, torch.where(negative, 0, IGNORED)))
            # The row after the last, which -1 finds, is the one of no object.
            objects.append(F.pad(target.boxes, (0, 0, 0, 1))[match])
        return torch.stack(labels), torch.stack(objects)


def best_boxes(boxes: Tensor, scores: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept boxes with the highest scores; at equal scores the earlier ones.

    Args:
        boxes: ``[B, N, 4]``.
        scores: ``[B, N]``.
        kept: ``[B, N]`` bool.
        count: Boxes an image.

    Returns:
        Boxes ``[B, P, 4]`` with ``P = min(count, N)``, best first; which of them are kept ones ``[B, P]``; their scores
        and their places among the N, ``[B, P]`` each. Boxes that are no kept ones are zeros.
    """
    order = scores.masked_fill(~kept, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
    valid = kept.gather(1, order)
    chosen = boxes.gather(1, order[..., None].expand(*order.shape, 4))
    return torch.where(valid[..., None], chosen, 0.0), valid, scores.gather(1, order), order


def _flatten(values: Tensor, size: int) -> Tensor:
    """``[B, A * size, H, W]`` as ``[B, H * W * A, size]``, in the order of the anchors."""
    images, _, height, width = values.shape
    return values.view(images, -1, size, height, width).permute(0, 3, 4, 1, 2).reshape(images, -1, size)
