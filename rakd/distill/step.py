"""The inputs of one step of a distiller, and the facts that are known of the two networks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.base import Boxes, DistillationMethod
from rakd.distill.boxes import BOX_FORMATS, BoxFormat, check_canvases, to_pixels
from rakd.distill.checks import (
    Level,
    Report,
    check_boxes,
    check_maps_agree,
    check_strides,
    find_strides,
    soft_weights,
    warn_of_unlike_strides,
)
from rakd.distill.maps import check_channels
from rakd.distill.regions import RegionDistillation
from rakd.distill.scale import mean_square

Size = tuple[int, int]


def check_form(box_format: Any, layout: Any, expert_layout: Any) -> None:
    """Refuse names of formats that are not known."""
    if box_format not in BOX_FORMATS:
        raise ValueError(f"box_format: expected one of {', '.join(map(repr, BOX_FORMATS))}, got {box_format!r}")
    for argument, value in (("layout", layout), ("expert_layout", expert_layout)):
        if value not in ("NCHW", "NHWC"):
            raise ValueError(f"{argument}: expected 'NCHW' or 'NHWC', got {value!r}")


def image_batch(argument: str, images: Any) -> Tensor | None:
    """Bring images to one ``[B, C, H, W]`` tensor: as it is, inside an object, or a list of equal sizes.

    Raises:
        TypeError, ValueError: These are no images, or they differ in size.
    """
    if images is None:
        return None
    images = getattr(images, "tensors", images)
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, Tensor) for image in images):
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"{argument}: expected images of one size, got {[list(image.shape) for image in images[:3]]}; pass the "
                "batch that the backbone was given, after resizing and padding"
            )
        images = torch.stack(list(images))
    if not isinstance(images, Tensor):
        raise TypeError(f"{argument}: expected a tensor [B, C, H, W], got {type(images).__name__}")
    if images.dim() != 4:
        raise ValueError(f"{argument}: expected shape [B, C, H, W], got {list(images.shape)}")
    return images


def refuse_padding(images: Any) -> None:
    """Refuse a batch that tells of padded images beside normalised boxes, which are shares of one or of the other.

    Raises:
        ValueError: It does: DETR's ``NestedTensor`` has a ``mask``, torchvision's ``ImageList`` ``image_sizes``.
    """
    if isinstance(images, Tensor):
        return
    sizes = getattr(images, "image_sizes", ())
    if getattr(images, "mask", None) is not None or any(tuple(size) != images.tensors.shape[2:] for size in sizes):
        raise ValueError(
            f"boxes: expected pixels beside a {type(images).__name__}, got normalized=True: they may be shares of each "
            "image or of the padded batch; multiply them by that size, or give images.tensors if it is the batch's"
        )


def _numbers(argument: str, strides: Any) -> tuple[float, ...] | None:
    if strides is None:
        return None
    if isinstance(strides, Tensor):
        strides = strides.tolist()
    if isinstance(strides, (str, bytes)) or not isinstance(strides, Sequence):
        raise TypeError(f"{argument}: expected a sequence of numbers, got {type(strides).__name__}")
    numbers = tuple(float(stride) for stride in strides)
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(f"{argument}: expected positive numbers, got {numbers}")
    return numbers


@dataclass(frozen=True)
class PartialSetup:
    """A `rakd.distill.base.Setup` of which parts are still unknown (None), to be found at the first step."""

    strides: tuple[float, ...] | None = None
    expert_strides: tuple[float, ...] | None = None
    expert_channels: tuple[int, ...] | None = None
    apprentice_channels: tuple[int, ...] | None = None
    batch_size: int | None = None

    @classmethod
    def of(
        cls, strides: Any, expert_strides: Any, expert: Any, apprentice: Any, batch_size: int | None
    ) -> "PartialSetup":
        """Read the constructor's arguments."""
        found = _numbers("strides", strides)
        levels = 0 if found is None else len(found)
        channels = [
            None if given is None else check_channels(argument, given, levels)
            for argument, given in (("expert_channels", expert), ("apprentice_channels", apprentice))
        ]
        return cls(found, _numbers("expert_strides", expert_strides), channels[0], channels[1], batch_size)

    def of_method(self, method: nn.Module) -> "PartialSetup":
        """Take over the strides of a method that was made already."""
        known = replace(self, expert_strides=getattr(method, "expert_strides", None) or self.expert_strides)
        if not isinstance(method, RegionDistillation):
            return known
        loss: Any = method.loss
        return replace(known, strides=tuple(map(float, loss.strides)))

    @property
    def complete(self) -> bool:
        """Whether a method can be made: the expert's strides default to the apprentice's."""
        return None not in (self.strides, self.expert_channels, self.apprentice_channels)

    def completed(self, step: "Step") -> "PartialSetup":
        """Find what is missing from a step's images and maps."""
        strides = self.strides or find_strides("strides", step.apprentice, step.known_size)
        return PartialSetup(
            strides,
            self.expert_strides or step.find_expert_strides(strides),
            self.expert_channels or tuple(m.shape[1] for m in step.expert.values()),
            self.apprentice_channels or tuple(m.shape[1] for m in step.apprentice.values()),
            self.batch_size or step.images,
        )

    def filled(self, other: "PartialSetup") -> "PartialSetup":
        """Take over what is missing."""
        missing = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(other, name) for name in missing})

    def state(self) -> dict[str, Any]:
        """Plain values to save."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> "PartialSetup":
        """Take up `state`."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in state.items()}
        return cls(**values)


@dataclass(frozen=True)
class Step:
    """Maps and boxes of one step, in one form.

    Attributes:
        images: Their number.
        size: Height and width of the apprentice's images; None: not known.
        expert_image_hw: Of the expert's.
        apprentice: Maps by name.
        expert: Maps by the same names.
        scores: Class logits of the expert's levels.
        given: Boxes as they came.
        boxes: In pixels, (x1, y1, x2, y2).
    """

    images: int
    size: Size | None
    expert_image_hw: Size | None
    apprentice: dict[str, Tensor]
    expert: dict[str, Tensor]
    scores: Sequence[Tensor] | None
    given: Any
    boxes: Boxes

    @classmethod
    def make(
        cls,
        images: Tensor | None,
        expert_images: Tensor | None,
        size: Size | None,
        apprentice: dict[str, Tensor],
        expert: dict[str, Tensor],
        scores: Sequence[Tensor] | None,
        boxes: Any,
        box_format: BoxFormat,
        normalized: bool,
    ) -> "Step":
        """Bring boxes to pixels, and see that there are as many images as maps."""
        first = next(iter(apprentice.values()))
        count = int(first.shape[0])
        if images is not None:
            size = (int(images.shape[2]), int(images.shape[3]))
            if images.shape[0] != count:
                raise ValueError(
                    f"images: expected {count} images, as many as the apprentice's maps are of, got {images.shape[0]}"
                )
        if size is None and normalized:
            raise ValueError("image_size: expected the images' height and width, by which normalized boxes are scaled")
        expert_image_hw = size if expert_images is None else (int(expert_images.shape[2]), int(expert_images.shape[3]))
        pixels = to_pixels(boxes, box_format, normalized, size or (1, 1), count, first.device)
        return cls(count, size, expert_image_hw, apprentice, expert, scores, boxes, pixels)

    @property
    def known_size(self) -> Size:
        """The images' size.

        Raises:
            ValueError: It is not known.
        """
        if self.size is None:
            raise ValueError("strides: expected strides=, images or image_size= to find them from, got none of them")
        return self.size

    def sized(self, strides: tuple[float, ...] | None) -> "Step":
        """The same with the images' size, from the finest map where it is not known and strides are."""
        if self.size is not None or strides is None:
            return self
        first = next(iter(self.apprentice.values()))
        size = (round(first.shape[2] * strides[0]), round(first.shape[3] * strides[0]))
        return replace(self, size=size, expert_image_hw=size)

    def find_expert_strides(self, strides: tuple[float, ...]) -> tuple[float, ...]:
        """The expert's strides in the boxes' pixels: the apprentice's where maps agree, else from sizes."""
        pairs = zip(self.apprentice.values(), self.expert.values(), strict=True)
        if self.size == self.expert_image_hw and all(a.shape[2:] == e.shape[2:] for a, e in pairs):
            return strides
        size, other = self.known_size, self.expert_image_hw or self.known_size
        ratio = size[0] / other[0]
        if not math.isclose(ratio, size[1] / other[1], rel_tol=0.05):
            raise ValueError(
                f"expert_images: expected the aspect ratio of images, {size}, got {other}; pad those of both alike"
            )
        return tuple(ratio * stride for stride in find_strides("expert_strides", self.expert, other))

    def rescaled(self, factors: Tensor) -> "Step":
        """The same with the expert's maps multiplied, each by its factor, and the apprentice's by those that follow."""
        levels = len(self.expert)
        expert = _multiplied(self.expert, factors[:levels])
        if len(factors) == levels:
            return replace(self, expert=expert)
        return replace(self, expert=expert, apprentice=_multiplied(self.apprentice, factors[levels:]))

    def loss(self, method: nn.Module, factor: Tensor | None) -> Tensor:
        """Call a method; a factor goes into the op where the method has one, and costs nothing there."""
        extra: dict[str, Any] = (
            {"scores": self.scores} if isinstance(method, DistillationMethod) and method.needs_scores else {}
        )
        if factor is not None and isinstance(method, RegionDistillation):
            extra["scale"] = factor
            factor = None
        loss: Tensor = method(self.expert, self.apprentice, self.boxes, **extra)
        return loss if factor is None else loss * factor.to(loss.dtype)

    def energy(self, method: nn.Module | None) -> Tensor:
        """The loss of an apprentice of zeros.

        Raises:
            ValueError: The method has none.
        """
        if not isinstance(method, DistillationMethod):
            raise ValueError(f"normalize: expected a method of the registry, got {type(method).__name__}")
        return method.energy(self.expert, self.boxes, self.scores)


def check_sizes(step: Step, facts: PartialSetup) -> Step:
    """See that known strides bring a step's maps and images together; costs no look at the device.

    Returns:
        The step with its images' size.

    Raises:
        ValueError: They do not, such as where one network's images changed their size and the other's did not.
    """
    step = step.sized(facts.strides)
    if step.size is not None:
        check_canvases(step.given, step.size)
    for argument, strides, maps in (
        ("strides", facts.strides, step.apprentice),
        ("expert_strides", facts.expert_strides, step.expert),
    ):
        if strides is not None:
            check_strides(argument, strides, maps, step.known_size)
    return step


def inspect(step: Step, facts: PartialSetup, options: Mapping[str, Any], form: tuple[str, bool]) -> Report:
    """Check a step against what is known, and report.

    Raises:
        ValueError: Something does not fit; names the remedy.
    """
    images = None if step.size is None else step.images
    check_maps_agree(step.apprentice, step.expert, images, (facts.apprentice_channels, facts.expert_channels))
    found = facts.completed(check_sizes(step, facts))
    step = check_sizes(step, found)
    assert found.strides and found.expert_strides
    if facts.expert_strides is None and step.expert_image_hw == step.size:
        warn_of_unlike_strides(step.apprentice, found.strides, found.expert_strides)
    rows = check_boxes(step.boxes, step.known_size, step.images, form)
    weights = soft_weights(rows, found.strides, options)
    pairs = zip(step.apprentice.items(), step.expert.values(), strict=True)
    steps = zip(found.strides, found.expert_strides, weights.sum(dim=0).tolist(), strict=True)
    levels = tuple(
        Level(name, _size(a), a.shape[1], stride, _rms(a), _size(e), e.shape[1], expert_stride, _rms(e), share)
        for ((name, a), e), (stride, expert_stride, share) in zip(pairs, steps, strict=True)
    )
    return Report(step.images, step.known_size, len(rows), levels)


def _multiplied(maps: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    return {name: m * f.to(m.dtype) for (name, m), f in zip(maps.items(), factors, strict=True)}


def _rms(feature: Tensor) -> float:
    return float(mean_square(feature).sqrt())


def _size(feature: Tensor) -> Size:
    return int(feature.shape[2]), int(feature.shape[3])
