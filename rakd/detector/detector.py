"""The detector: a simplified MonoRCNN++ (arXiv 2104.03775 and its successor) of torchvision's components.

Images → `rakd.detector.pyramid` → p2 .. p5 → `rakd.detector.proposals` → pooling by `rakd_ops.multilevel_roi_align` →
box head → suppression → pooling of what is left → attribute and distance heads → `rakd.detector.decode`.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rakd.data.labels import Objects
from rakd.data.targets import CLASSES, Targets, pooling_boxes
from rakd.detector.base import BaseDetector
from rakd.detector.boxes import clip_boxes, decode_deltas, encode_deltas, have_area, image_extents, suppress
from rakd.detector.configs import DetectorConfig
from rakd.detector.decode import Boxes3D, Detections, decode, decode_boxes
from rakd.detector.heads import Box3DHead, BoxHead
from rakd.detector.losses import box3d_losses, box_losses
from rakd.detector.proposals import ProposalNetwork, best_boxes, covered, match_boxes
from rakd.detector.pyramid import STRIDES, Pyramid
from rakd.detector.sampling import IGNORED, draw
from rakd.distributed import shared_mean_count
from rakd.geometry import Calibration
from rakd.nn import seeded_modules
from rakd_ops import multilevel_roi_align

_OUTPUT_SIZE = 7  # bins of the pooling along an axis
_BOX_SCALES = (10.0, 10.0, 5.0, 5.0)  # Faster R-CNN's


class Detector(BaseDetector):
    """Finds cars, pedestrians and cyclists in space from one image.

    Boxes and points are in pixels of the images given; the centre of the first pixel is (0, 0), as in KITTI.

    Args:
        config: Its settings.
        seed: Seed of the random weights; the global generator is left alone.

    Attributes:
        config: Its settings.
        strides: Pixels per cell of each feature map.
        channels: Channels of each feature map.
    """

    config: DetectorConfig

    def __init__(self, config: DetectorConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.strides = STRIDES
        backbone, heads = config.backbone, config.heads
        self.pyramid = Pyramid(
            backbone.name,
            backbone.weights,
            seed,
            channels=backbone.channels,
            deformable=backbone.deformable,
            frozen_norm=backbone.frozen_norm,
        )
        # The layout in which convolutions are fastest, on CPUs and GPUs, and in which pooling reads whole vectors.
        cast(Any, self.pyramid).to(memory_format=torch.channels_last)  # not every torch types this argument
        self.channels = backbone.channels
        with seeded_modules(seed + 1):
            self.proposals = ProposalNetwork(self.channels, config.proposals)
            self.box_head = BoxHead(self.channels, _OUTPUT_SIZE, heads.width)
            self.space_head = Box3DHead(self.channels, _OUTPUT_SIZE, heads.width)

    @property
    def canonical_size(self) -> float:
        """See `rakd.detector.base.BaseDetector.canonical_size`."""
        return self.config.heads.canonical_size

    @torch.no_grad()
    def class_scores(self, features: dict[str, Tensor]) -> list[Tensor]:
        """See `rakd.detector.base.BaseDetector.class_scores`: the objectness of each shape of anchors."""
        scores: list[Tensor] = self.proposals.head(list(features.values()))[0]
        return scores

    def losses(
        self,
        features: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Targets],
        seeds: Sequence[int],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """See `rakd.detector.base.BaseDetector.losses`. Anchors and proposals are drawn from the seeds."""
        self.check_losses(features, sizes, targets, seeds)
        extents = image_extents(sizes, features["p2"].device)
        proposals, valid, losses = self._propose(features, extents, targets, seeds)
        boxes, labels, matched = self._draw_proposals(proposals, valid, targets, seeds)
        logits, deltas = self.box_head(self._pool(features, boxes.unbind()))
        objects = _join(targets)
        matches = target_rows(objects, matched.flatten())
        target_deltas = encode_deltas(matches.boxes, boxes.flatten(0, 1), _BOX_SCALES)
        class_loss, box_loss = box_losses(logits, deltas, labels.flatten(), target_deltas)
        count = len(boxes) * self.config.heads.sampled
        result = {
            "objectness": losses["objectness"],
            "proposal_box": losses["proposal_box"],
            "class": class_loss.sum() / count,
            "box": box_loss.sum() / count,
        }
        # The one question to the device, after all that does not need the answer. Positives come first.
        counts = (labels > 0).sum(dim=1).tolist()
        foreground = [rows[:n] for rows, n in zip(boxes, counts, strict=True)]
        classes = torch.cat([rows[:n] for rows, n in zip(labels, counts, strict=True)]) - 1
        own = target_rows(objects, torch.cat([rows[:n] for rows, n in zip(matched, counts, strict=True)]))
        pred = self.space_head(self._pool(features, foreground), classes)
        positives = shared_mean_count(sum(counts), logits.device).to(logits.dtype)
        for name, values in box3d_losses(pred, torch.cat(foreground), own, self.config.height).items():
            weight = self.config.heads.corner_weight if name == "corners" else 1.0
            result[name] = weight * values.sum() / positives
        return result, foreground

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """See `rakd.detector.base.BaseDetector.predict`."""
        self.check_predict(images, sizes, calibrations)
        found = self.detect(images, image_extents(sizes, images.device)).to_host()
        return [
            decode(found.of_image(i), calibration, self.config.height) for i, calibration in enumerate(calibrations)
        ]

    def locate(self, image: Tensor, size: Tensor, projection: Tensor) -> Boxes3D:
        """See `rakd.detector.base.BaseDetector.locate`."""
        return decode_boxes(self.detect(image, size[None]).of_image(0), projection, self.config.height)

    @torch.no_grad()
    def detect(self, images: Tensor, extents: Tensor) -> Detections:
        """Find the objects in images, as tensors of fixed shapes on the images' device.

        Args:
            images: As for `predict`.
            extents: ``[B, 2]`` float32, width and height of each image without padding.
        """
        features = self.extract_features(images)
        proposals, valid, _ = self._propose(features, extents)
        logits, deltas = self.box_head(self._pool(features, proposals.unbind()))
        boxes, scores, kept = self._suppress(logits, deltas, proposals, valid, extents)
        chosen, valid, best, places = best_boxes(boxes, scores, kept, self.config.heads.detections)
        classes = places // proposals.shape[1]
        pred = self.space_head(self._pool(features, chosen.unbind()), classes.flatten())
        return Detections(valid, chosen, classes, best, pred)

    def _propose(
        self, features: dict[str, Tensor], extents: Tensor, targets: Sequence[Targets] = (), seeds: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run the proposal network, on p6 too where it has anchors."""
        maps = list(features.values())
        if len(self.config.proposals.anchor_sizes) > len(features):
            maps.append(F.max_pool2d(features["p5"], 1, 2))
        proposed: tuple[Tensor, Tensor, dict[str, Tensor]] = self.proposals(maps, extents, targets, seeds)
        return proposed

    def _pool(self, features: dict[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool the boxes' features."""
        return multilevel_roi_align(
            features,
            pooling_boxes(boxes),
            strides=self.strides,
            output_size=_OUTPUT_SIZE,
            canonical_size=self.config.heads.canonical_size,
        )

    @torch.no_grad()
    def _draw_proposals(
        self, proposals: Tensor, valid: Tensor, targets: Sequence[Targets], seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the proposals that the losses look at; the objects' own boxes are among the candidates.

        Returns:
            Boxes ``[B, S, 4]``, labels ``[B, S]`` (class + 1 first, then 0, background, then ``IGNORED``, which only
            fills up) and the row of each box's object among those of all images ``[B, S]`` (-1: none).
        """
        most, first = max(len(target) for target in targets), 0
        candidates, labels, matches = [], [], []
        for rows, counts, target in zip(proposals, valid, targets, strict=True):
            # What fills up to the batch's most objects comes last, so that no draw depends on it.
            missing = most - len(target)
            boxes = F.pad(torch.cat([rows, target.boxes.to(rows.dtype)]), (0, 0, 0, missing))
            counts = F.pad(F.pad(counts, (0, len(target)), value=True), (0, missing))
            iou = self.config.heads.positive_iou
            match, _ = match_boxes(boxes, target.boxes, iou, iou, every_object=False)
            ignored = ~counts | ((match < 0) & covered(boxes, target.ignored))
            # The entry after the last, which -1 finds, is the background's.
            label = F.pad(target.classes + 1, (0, 1))[match]
            candidates.append(boxes)
            labels.append(torch.where(ignored, IGNORED, label))
            matches.append(torch.where(ignored | (match < 0), -1, match + first))
            first += len(target)
        stacked = torch.stack(labels)
        heads = self.config.heads
        drawn = draw(stacked, seeds, heads.sampled, heads.positive_share)
        boxes = torch.stack(candidates).gather(1, drawn.rows[..., None].expand(*drawn.rows.shape, 4))
        return (
            boxes,
            torch.where(drawn.drawn, stacked.gather(1, drawn.rows), IGNORED),
            torch.stack(matches).gather(1, drawn.rows),
        )

    def _suppress(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor, extents: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes ``[B, classes * P, 4]``, their scores and which of them are detections, ``[B, classes * P]``."""
        images, count = valid.shape
        heads = self.config.heads
        scores = logits.softmax(dim=1)[:, 1:].view(images, count, len(CLASSES)).transpose(1, 2)
        deltas = deltas.view(images, count, len(CLASSES), 4).transpose(1, 2)
        boxes = clip_boxes(decode_deltas(deltas, proposals[:, None], _BOX_SCALES), extents - 1)
        likely = (scores > heads.score_limit) & valid[:, None] & have_area(boxes)
        kept = suppress(boxes.flatten(0, 1), scores.flatten(0, 1), likely.flatten(0, 1), heads.nms_iou)
        return boxes.flatten(1, 2), scores.flatten(1, 2), kept.view(images, -1)


def target_rows(targets: Targets, rows: Tensor) -> Targets:
    """The targets of some rows; row -1, no object, is a row of zeros."""
    values = {}
    for field in fields(targets):
        value: Tensor = getattr(targets, field.name)
        if field.name != "ignored":
            value = torch.cat([value, value.new_zeros((1, *value.shape[1:]))])[rows]
        values[field.name] = value
    return Targets(**values)


def _join(targets: Sequence[Targets]) -> Targets:
    return Targets(**{f.name: torch.cat([getattr(t, f.name) for t in targets]) for f in fields(Targets)})
