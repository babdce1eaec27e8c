"""Settings of the two-stage detector, and the detectors of all families that have a name. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rakd.detector.base_config import BackboneConfig as BackboneConfig
from rakd.detector.base_config import BaseConfig
from rakd.detector.base_config import Weights as Weights
from rakd.detector.monodetr.configs import MONODETRS, MonoDETRConfig

if TYPE_CHECKING:
    from rakd.detector.detector import Detector


@dataclass(frozen=True)
class ProposalConfig:
    """Region proposal network.

    Attributes:
        anchor_sizes: Root of the anchors' area in pixels, one a level; a fifth is for p6, which is p5 at half size.
        aspect_ratios: Height over width.
        positive_iou: An anchor that overlaps an object this much is positive ...
        negative_iou: ... and one that overlaps none more than this is negative.
        sampled: Anchors an image that the loss looks at, half of them positive where there are enough.
        pre_nms_top_n: Best anchors of each level that enter suppression, in training and evaluation.
        post_nms_top_n: Proposals an image that leave it, in training and evaluation.
        nms_iou: Overlap at which the lesser proposal is suppressed.

    Raises:
        ValueError: A value is out of range.
    """

    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    sampled: int = 256
    pre_nms_top_n: tuple[int, int] = (2000, 1000)
    post_nms_top_n: tuple[int, int] = (2000, 1000)
    nms_iou: float = 0.7

    def __post_init__(self) -> None:
        _check_shares(self, "positive_iou", "negative_iou", "nms_iou")
        if not self.negative_iou <= self.positive_iou:
            raise ValueError(f"negative_iou must be at most positive_iou, {self.positive_iou}, got {self.negative_iou}")
        for name in ("anchor_sizes", "aspect_ratios", "pre_nms_top_n", "post_nms_top_n"):
            _check_positive(name, getattr(self, name))
        _check_positive("sampled", (self.sampled,))


@dataclass(frozen=True)
class HeadConfig:
    """The heads behind the pooling.

    Attributes:
        sampled: Proposals an image that the losses look at.
        positive_share: Most of them that may be positive, 0..1.
        positive_iou: A proposal that overlaps an object this much is positive.
        width: Of the two hidden layers of each head.
        canonical_size: Root of a box's area in pixels that is pooled from p4.
        corner_weight: Of the L1 loss of projected corners. The centre's is weighed by its predicted uncertainty.
        score_limit: Detections below are dropped.
        nms_iou: Overlap at which the lesser detection of a class is suppressed.
        detections: Most an image.

    Raises:
        ValueError: A value is out of range.
    """

    sampled: int = 512
    positive_share: float = 0.25
    positive_iou: float = 0.5
    width: int = 1024
    canonical_size: float = 224.0
    corner_weight: float = 5.0
    score_limit: float = 0.05
    nms_iou: float = 0.5
    detections: int = 50

    def __post_init__(self) -> None:
        _check_shares(self, "positive_share", "positive_iou", "score_limit", "nms_iou")
        for name in ("sampled", "width", "canonical_size", "detections"):
            _check_positive(name, (getattr(self, name),))
        if not (self.corner_weight >= 0 and isfinite(self.corner_weight)):
            raise ValueError(f"corner_weight must be 0 or more, got {self.corner_weight}")


def _check_shares(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {getattr(config, name)}")


def _check_positive(name: str, values: tuple[float, ...]) -> None:
    if not values or not all(value > 0 and isfinite(value) for value in values):
        raise ValueError(f"{name} must be positive, got {', '.join(map(str, values)) or 'nothing'}")


@dataclass(frozen=True)
class DetectorConfig(BaseConfig):
    """A two-stage detector.

    Attributes:
        backbone: Backbone and feature pyramid.
        proposals: Region proposal network.
        heads: The heads behind the pooling.
        height: Height that images are resized to, pixels.
        width: Width that images are padded to, pixels; wider ones are an error. None: whatever they need.
    """

    backbone: BackboneConfig
    proposals: ProposalConfig = ProposalConfig()
    heads: HeadConfig = HeadConfig()
    height: int = 512
    width: int | None = 1760

    has_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.proposals.anchor_sizes) not in (4, 5):
            raise ValueError(f"anchor_sizes must hold 4 or 5 sizes, got {self.proposals.anchor_sizes}")

    def build(self, seed: int = 0) -> "Detector":
        """See `rakd.detector.base_config.BaseConfig.build`."""
        from rakd.detector.detector import Detector

        return Detector(self, seed)


def _scaled(
    height: int, width: int, backbone: str, channels: int, *, sampled: int, hidden: int, weights: Weights = "random"
) -> DetectorConfig:
    """A lighter detector for smaller images, with everything that is measured in pixels made smaller with them."""
    scale = height / 512
    return DetectorConfig(
        BackboneConfig(backbone, channels, weights=weights, frozen_norm=False),
        ProposalConfig(
            anchor_sizes=tuple(round(size * scale) for size in (32, 64, 128, 256)),
            sampled=2 * sampled,
            pre_nms_top_n=(500, 300),
            post_nms_top_n=(300, 100),
        ),
        HeadConfig(sampled=sampled, width=hidden, canonical_size=224.0 * scale, detections=30),
        height=height,
        width=width,
    )


DETECTORS: dict[str, BaseConfig] = {
    "tiny": _scaled(128, 448, "mobilenet_v3_small", 64, sampled=64, hidden=256),
    "tiny-expert": _scaled(128, 448, "resnet18", 64, sampled=64, hidden=256),
    "tiny-lite0": _scaled(128, 448, "tf_efficientnet_lite0", 64, sampled=64, hidden=256, weights="pretrained"),
    "small-lite0": _scaled(192, 672, "tf_efficientnet_lite0", 64, sampled=64, hidden=256, weights="pretrained"),
    "small": _scaled(192, 640, "resnet18", 64, sampled=128, hidden=512),
    "kitti-r18": DetectorConfig(BackboneConfig("resnet18")),
    "kitti-r50": DetectorConfig(BackboneConfig("resnet50")),
    "waymo-r18": DetectorConfig(BackboneConfig("resnet18"), width=768),
    "waymo-r50": DetectorConfig(BackboneConfig("resnet50"), width=768),
    **MONODETRS,
}
"""Detectors by name: ``kitti-r18`` (apprentice) and ``kitti-r50`` (expert) have the paper's settings, ``waymo-r18`` and
``waymo-r50`` the same on images 768 x 512; ``tiny``, ``tiny-expert`` and ``small`` are for a processor and minutes:
they start from random weights. ``tiny-lite0`` and ``small-lite0`` start from ImageNet weights out of a package (extra
``pretrained``).
Those named ``monodetr-...``: see `rakd.detector.monodetr.configs.MONODETRS`."""

if TYPE_CHECKING:
    DetectorName = str
else:
    DetectorName = Literal.__getitem__(tuple(DETECTORS))
    """Names of `DETECTORS`, as the command line reads them."""


def read_config(values: Mapping[str, Any]) -> BaseConfig:
    """Settings of a detector of any family from plain values, as ``dataclasses.asdict`` or JSON give them."""
    family: type[BaseConfig] = MonoDETRConfig if values.get("family") == "monodetr" else DetectorConfig
    return family.from_plain(values)
