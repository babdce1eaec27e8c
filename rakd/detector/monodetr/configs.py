"""Settings of MonoDETR. Imports no torch."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from rakd.data.rules import DataRules
from rakd.detector.base_config import BackboneConfig, BaseConfig

if TYPE_CHECKING:
    from rakd.detector.monodetr.detector import MonoDETR

RULES = DataRules(
    min_height=25.0,
    min_visible=0.0,
    max_truncation=0.5,
    max_occlusion=2,
    depth=(2.0, 65.0),
    center_in_box=True,
    most=50,
    zoom=0.5,
)
"""The original's: KITTI's objects of a known difficulty between 2 and 65 m, 50 an image."""


@dataclass(frozen=True)
class DepthConfig:
    """The map of distances.

    Attributes:
        bins: Bins between ``nearest`` and ``farthest``, each wider than the one before by the same length.
        nearest: Metres.
        farthest: Metres; also the distance of the background.
    """

    bins: int = 80
    nearest: float = 1e-3
    farthest: float = 60.0


@dataclass(frozen=True)
class TransformerConfig:
    """Encoders and decoder.

    Attributes:
        heads: Of every attention.
        points: Places that a head of a deformable attention looks at in each map.
        encoder_layers: Of the visual encoder. The depth encoder has one.
        decoder_layers: Each has heads and losses of its own.
        hidden: Width of the feed-forward networks.
        dropout: Share that training drops, 0..1.
        queries: Most objects an image.
        groups: Sets of queries in training; they do not see each other, and the first one detects.
    """

    heads: int = 8
    points: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 3
    hidden: int = 256
    dropout: float = 0.1
    queries: int = 50
    groups: int = 11


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms; those of class, centre, box and GIoU are the matching's as well.

    Attributes:
        class_: Focal loss of the classes.
        center: L1 of the projected 3D centre, as shares of the image's size.
        box: L1 of the distances from the centre to the 2D box's sides, likewise.
        giou: Generalised IoU of the 2D boxes.
        dimensions: L1 of the dimensions, relative to them.
        angle: Cross entropy of the angle's bin, and L1 of the rest.
        depth: L1 of the distance, weighed by its predicted uncertainty.
        depth_map: Focal loss of the map of distances.
    """

    class_: float = 2.0
    center: float = 10.0
    box: float = 5.0
    giou: float = 2.0
    dimensions: float = 1.0
    angle: float = 1.0
    depth: float = 1.0
    depth_map: float = 1.0


@dataclass(frozen=True)
class MonoDETRConfig(BaseConfig):
    """A MonoDETR.

    Attributes:
        backbone: Backbone, and the channels of all that follows.
        depth: The map of distances.
        transformer: Encoders and decoder.
        losses: Weights of the loss terms.
        rules: For objects to learn and for the zoom of images.
        frozen_stem: Keep a pretrained ResNet's first convolution and first stage as they are loaded.
        score_limit: Detections whose class has a smaller probability are dropped.
        detections: Most an image.
        canonical_size: Root of a box's area in pixels that distillation compares at stride 16; this project's choice.
        distilled: Maps that distillation compares: "projections" of the backbone's (strides 8 to 64), what the visual
            "encoder" makes of them, or the "depth" branch's map (stride 16).
        height: Height that images are resized to, pixels.
        width: Width that images are padded to, pixels; wider ones are an error. None: whatever they need.
        family: Tells files of this detector from those of the two-stage one.

    Raises:
        ValueError: A value is out of range.
    """

    backbone: BackboneConfig
    depth: DepthConfig = DepthConfig()
    transformer: TransformerConfig = TransformerConfig()
    losses: LossConfig = LossConfig()
    rules: DataRules = field(default=RULES)
    frozen_stem: bool = True
    score_limit: float = 0.2
    detections: int = 50
    canonical_size: float = 168.0
    distilled: Literal["projections", "encoder", "depth"] = "projections"
    height: int = 384
    width: int | None = 1280
    family: Literal["monodetr"] = "monodetr"

    stride: ClassVar[int] = 64
    optimizer: ClassVar[str] = "adamw"
    learning_rate: ClassVar[float] = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        own, channels = self.transformer, self.backbone.channels
        if channels % own.heads or channels % 8:
            raise ValueError(f"channels must be a multiple of 8 and of {own.heads} heads, got {channels}")
        if not 1 <= self.rules.most <= own.queries:
            raise ValueError(f"rules.most must be at most the {own.queries} queries, got {self.rules.most}")
        for name in ("heads", "points", "encoder_layers", "decoder_layers", "hidden", "groups"):
            if getattr(own, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(own, name)}")
        if self.distilled not in ("projections", "encoder", "depth"):
            raise ValueError(f"distilled must be projections, encoder or depth, got {self.distilled!r}")
        if not 0 <= own.dropout < 1:
            raise ValueError(f"dropout must lie in 0..1, got {own.dropout}")
        if self.depth.bins < 1 or not 0 < self.depth.nearest < self.depth.farthest:
            raise ValueError(f"depth must have bins between two rising distances, got {self.depth}")

    def build(self, seed: int = 0) -> "MonoDETR":
        """See `rakd.detector.base_config.BaseConfig.build`."""
        from rakd.detector.monodetr.detector import MonoDETR

        return MonoDETR(self, seed)


def _light(backbone: BackboneConfig, transformer: TransformerConfig) -> MonoDETRConfig:
    """For images of 128 x 448 pixels, a processor and minutes."""
    return MonoDETRConfig(
        backbone,
        depth=DepthConfig(bins=40),
        transformer=transformer,
        rules=DataRules(**{**vars(RULES), "most": 30}),
        score_limit=0.05,
        detections=30,
        canonical_size=56.0,
        height=128,
        width=448,
    )


# Dropout keeps large networks from overfitting, and small ones from learning.
_TINY = TransformerConfig(heads=4, encoder_layers=1, decoder_layers=2, hidden=128, dropout=0.0, queries=30, groups=4)

MONODETRS = {
    "monodetr-tiny": _light(BackboneConfig("mobilenet_v3_small", 64, weights="random", frozen_norm=False), _TINY),
    "monodetr-small": _light(
        BackboneConfig("tf_efficientnet_lite0", 128), replace(_TINY, heads=8, decoder_layers=3, hidden=256, groups=6)
    ),
    "monodetr-r18": MonoDETRConfig(BackboneConfig("resnet18")),
    "monodetr-r50": MonoDETRConfig(BackboneConfig("resnet50")),
}
"""MonoDETRs by name: ``monodetr-r50`` (expert) and ``monodetr-r18`` (apprentice) have the original's settings.
``monodetr-tiny`` is for a processor and minutes and starts from random weights; ``monodetr-small`` is for an hour, on a
backbone whose ImageNet weights come with the extra ``pretrained``."""
