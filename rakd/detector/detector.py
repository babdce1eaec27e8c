"""The detector: MonoRCNN++ in outline (arXiv 2104.03775 and its successor), on torchvision's parts.

Images → `rakd.detector.pyramid` → p2 .. p5 → `rakd.detector.proposals` → pooling by `rakd_ops.multilevel_roi_align` →
box head → suppression → pooling of what is left → attribute and distance heads → `rakd.detector.decode`.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from rakd.data.labels import Objects
from rakd.data.targets import Targets, pooling_boxes
from rakd.detector.configs import DetectorConfig
from rakd.detector.decode import decode
from rakd.detector.heads import BoxHead, SpaceHead
from rakd.detector.losses import box_losses, space_losses
from rakd.detector.proposals import IGNORED, ProposalNetwork, Sampler, covered
from rakd.detector.pyramid import STRIDES, Pyramid
from rakd.distill.adapters import seeded_modules
from rakd.distributed import shared_mean_count
from rakd.geometry import Calibration
from rakd_ops import multilevel_roi_align

_OUTPUT_SIZE = 7  # bins of the pooling along an axis
_BOX_SCALES = (10.0, 10.0, 5.0, 5.0)  # Faster R-CNN's


class Detector(nn.Module):
    """Finds cars, pedestrians and cyclists in space from one image.

    Boxes and points are in pixels of the images given; the centre of the first pixel is (0, 0), as in KITTI.

    Args:
        config: What it is made of.
        seed: Seed of the random weights; the global generator is left alone.

    Attributes:
        config: What it is made of.
        strides: Pixels per cell of each feature map.
        channels: Channels of each feature map.
    """

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
            self.space_head = SpaceHead(self.channels, _OUTPUT_SIZE, heads.width)
        self._coder = BoxCoder(_BOX_SCALES)
        self._matcher = Matcher(heads.positive_iou, heads.positive_iou, allow_low_quality_matches=False)
        self._sampler = Sampler(heads.sampled, heads.positive_share)

    @property
    def loaded(self) -> str:
        """What the backbone started from, for people."""
        return self.pyramid.loaded

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the maps p2 .. p5, see `rakd.detector.pyramid.Pyramid.extract_features`.

        Args:
            images: ``[B, 3, H, W]`` in 0..1, RGB, padded to multiples of 32.
        """
        return self.pyramid.extract_features(images.contiguous(memory_format=torch.channels_last))

    def losses(
        self,
        features: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Targets],
        seeds: Sequence[int],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses of a batch. With several processes, averaged gradients are those of the whole batch.

        Args:
            features: What `extract_features` gave for the images.
            sizes: (width, height) of each image without padding.
            targets: What to find in each.
            seeds: A seed for each image, from which anchors and proposals are drawn; >= 0.

        Returns:
            The terms, to be summed, and for each image the drawn proposals that lie on objects, ``[K, 4]``.

        Raises:
            ValueError: The arguments' lengths differ, or the detector is not in training mode.
        """
        if not self.training:
            raise ValueError("losses needs the detector in training mode, call train() first")
        if not len(sizes) == len(targets) == len(seeds) == features["p2"].shape[0]:
            raise ValueError(
                "sizes, targets and seeds must hold one entry an image, got "
                f"{len(sizes)}, {len(targets)} and {len(seeds)} for {features['p2'].shape[0]} images"
            )
        self.proposals.fg_bg_sampler.seeds = self._sampler.seeds = seeds
        wanted = [{"boxes": target.boxes, "ignored": target.ignored} for target in targets]
        proposals, losses = self._propose(features, sizes, wanted)
        boxes, labels, matched = self._draw_proposals(proposals, targets)
        logits, deltas = self.box_head(self._pool(features, boxes))
        count = logits.new_tensor(len(boxes) * self.config.heads.sampled)
        all_labels, all_boxes = torch.cat(labels), torch.cat(boxes)
        matches = _join([target_rows(t, rows) for t, rows in zip(targets, matched, strict=True)])
        wanted_deltas = self._coder.encode_single(matches.boxes, all_boxes)
        class_loss, box_loss = box_losses(logits, deltas, all_labels, wanted_deltas)
        result = {
            "objectness": losses["loss_objectness"],
            "proposal_box": losses["loss_rpn_box_reg"],
            "class": class_loss.sum() / count,
            "box": box_loss.sum() / count,
        }
        positive = all_labels > 0
        foreground = [rows[label > 0] for rows, label in zip(boxes, labels, strict=True)]
        said = self.space_head(self._pool(features, foreground), all_labels[positive] - 1)
        positives = shared_mean_count(positive.sum(), logits.device).to(logits.dtype)
        for name, values in space_losses(
            said, all_boxes[positive], target_rows(matches, positive), self.config.height
        ).items():
            weight = self.config.heads.corner_weight if name == "corners" else 1.0
            result[name] = weight * values.sum() / positives
        return result, foreground

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """Same as `predict`."""
        return self.predict(images, sizes, calibrations)

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """Find the objects in images.

        Args:
            images: ``[B, 3, H, W]`` in 0..1, RGB, padded to multiples of 32.
            sizes: (width, height) of each image without padding.
            calibrations: Camera of each image, as it was resized.

        Returns:
            Objects of each image with scores, best first, in the pixels of these images.

        Raises:
            ValueError: The arguments' lengths differ, or the detector is in training mode.
        """
        if self.training:
            raise ValueError("predict needs the detector in evaluation mode, call eval() first")
        if not len(sizes) == len(calibrations) == len(images):
            raise ValueError(
                "sizes and calibrations must hold one entry an image, got "
                f"{len(sizes)} and {len(calibrations)} for {len(images)} images"
            )
        features = self.extract_features(images)
        proposals, _ = self._propose(features, sizes, None)
        logits, deltas = self.box_head(self._pool(features, proposals))
        counts = [len(rows) for rows in proposals]
        found = [
            self._suppress(logit, delta, rows, size)
            for logit, delta, rows, size in zip(
                logits.split(counts), deltas.split(counts), proposals, sizes, strict=True
            )
        ]
        boxes = [rows for rows, _, _ in found]
        classes = torch.cat([rows for _, rows, _ in found])
        said = self.space_head(self._pool(features, boxes), classes)
        result, start = [], 0
        for (rows, kinds, scores), calibration in zip(found, calibrations, strict=True):
            own = type(said)(**{f.name: getattr(said, f.name)[start : start + len(rows)] for f in fields(said)})
            result.append(decode(own, rows, kinds, scores, calibration, self.config.height))
            start += len(rows)
        return result

    def _propose(
        self,
        features: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run the proposal network, on p6 too where it has anchors."""
        maps = dict(features)
        if len(self.config.proposals.anchor_sizes) > len(features):
            maps["p6"] = F.max_pool2d(features["p5"], 1, 2)
        fine = features["p2"]
        shape = (fine.shape[0], 3, fine.shape[2] * self.strides[0], fine.shape[3] * self.strides[0])
        # The network looks at the shape of the images only.
        images = ImageList(torch.empty(shape, device="meta"), [(height, width) for width, height in sizes])
        boxes, losses = self.proposals(images, maps, targets)
        return boxes, losses

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
        self, proposals: Sequence[Tensor], targets: Sequence[Targets]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Draw the proposals that the losses look at; the objects' own boxes are among the candidates.

        Returns:
            Per image boxes ``[N, 4]``, labels ``[N]`` (0 background, else class + 1) and the row of each box's
            object ``[N]`` (-1: none).
        """
        candidates, labels, matches = [], [], []
        for rows, target in zip(proposals, targets, strict=True):
            boxes = torch.cat([rows, target.boxes])
            label = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            match = torch.full_like(label, -1)
            if len(target):
                match = self._matcher(box_iou(target.boxes, boxes))
                label = torch.where(match >= 0, target.classes[match.clamp(min=0)] + 1, 0)
            label[(label == 0) & covered(boxes, target.ignored)] = int(IGNORED)
            candidates.append(boxes)
            labels.append(label)
            matches.append(match)
        drawn = [a | b for a, b in zip(*self._sampler(labels), strict=True)]
        return tuple(  # type: ignore[return-value]
            [rows[mask] for rows, mask in zip(values, drawn, strict=True)] for values in (candidates, labels, matches)
        )

    def _suppress(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The detections of one image: boxes ``[N, 4]``, classes ``[N]``, scores ``[N]``."""
        heads = self.config.heads
        scores = logits.softmax(dim=1)[:, 1:]
        rows, classes = (scores > heads.score_limit).nonzero().unbind(dim=1)
        boxes = self._coder.decode_single(deltas[rows, classes], proposals[rows])
        boxes = clip_boxes_to_image(boxes, (size[1] - 1, size[0] - 1))
        scores = scores[rows, classes]
        kept = batched_nms(boxes, scores, classes, heads.nms_iou)[: heads.detections]
        return boxes[kept], classes[kept], scores[kept]


def target_rows(targets: Targets, rows: Tensor) -> Targets:
    """The targets of some rows, by number or mask; row -1 of an image without objects is a row of zeros."""
    values = {}
    for field in fields(targets):
        value: Tensor = getattr(targets, field.name)
        if field.name != "ignored":
            value = value[rows] if len(targets) else value.new_zeros((len(rows), *value.shape[1:]))
        values[field.name] = value
    return Targets(**values)


def _join(targets: Sequence[Targets]) -> Targets:
    return Targets(**{f.name: torch.cat([getattr(t, f.name) for t in targets]) for f in fields(Targets)})
