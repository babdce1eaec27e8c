"""Settings that all families of detectors share. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rakd.data.rules import DataRules

if TYPE_CHECKING:
    from typing_extensions import Self

    from rakd.detector.base import BaseDetector


Weights = Literal["pretrained", "random"]
"""Weights that backbones start from."""


@dataclass(frozen=True)
class BackboneConfig:
    """Backbone and the maps that are made of its maps; see `rakd.detector.pyramid.Pyramid`."""

    name: str
    channels: int = 256
    weights: Weights = "pretrained"
    deformable: bool = False
    frozen_norm: bool = True


class BaseConfig:
    """Settings of a detector: a frozen dataclass with at least these fields.

    Attributes:
        backbone: Backbone and its maps.
        height: Height that images are resized to, pixels.
        width: Width that images are padded to, pixels; wider ones are an error. None: whatever they need.
        stride: Height and width are multiples of it.
        optimizer: That ``rakd train`` takes where none is given, "sgd" or "adamw".
        learning_rate: The same.
        has_scores: Whether the detector gives `rakd.detector.base.BaseDetector.class_scores`.
    """

    backbone: BackboneConfig
    height: int
    width: int | None
    stride: ClassVar[int] = 32
    optimizer: ClassVar[str] = "sgd"
    learning_rate: ClassVar[float] = 0.02
    has_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        step = self.stride
        if self.height < step or self.height % step:
            raise ValueError(f"height must be a positive multiple of {step}, got {self.height}")
        if self.width is not None and (self.width < step or self.width % step):
            raise ValueError(f"width must be a positive multiple of {step} or None, got {self.width}")

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(width, height) that images are padded to, pixels; None: whatever they need."""
        return None if self.width is None else (self.width, self.height)

    @property
    def rules(self) -> DataRules:
        """Rules for the objects of a frame that the detector learns."""
        return DataRules()

    def without_download(self) -> "Self":
        """The same detector with a backbone of random weights: for weights from a file, or where they do not matter."""
        return replace(self, backbone=replace(self.backbone, weights="random"))  # type: ignore[type-var]

    def build(self, seed: int = 0) -> "BaseDetector":
        """Make the detector, in training mode.

        Args:
            seed: Seed of the random weights; the global generator is left alone.
        """
        raise NotImplementedError

    def to_plain(self) -> dict[str, Any]:
        """Settings as plain values, for files and fingerprints."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Self":
        """Settings from plain values, as ``dataclasses.asdict`` or JSON give them."""
        parts = {field.name: field.type for field in fields(cls) if is_dataclass(field.type)}  # type: ignore[arg-type]
        return cls(**{name: _restored(parts.get(name), value) for name, value in values.items()})


def _restored(part: Any, value: Any) -> Any:
    """A field's value: the dataclass that it was, and tuples that JSON made lists."""
    if part is not None:
        return part(**{name: _restored(None, entry) for name, entry in value.items()})
    return tuple(value) if isinstance(value, list) else value
