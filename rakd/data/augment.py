"""Random changes to training images: mirroring, distortion of light and colour, and zoom.

Images are Pillow's here: its integer arithmetic gives the same pixels whatever the number of threads, which
differs between a loader's workers and the main process.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from rakd.data.labels import Objects
from rakd.data.rules import DataRules
from rakd.geometry import Calibration, FloatArray, rotation_from_alpha


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images.

    Attributes:
        flip: Probability of mirroring, 0..1.
        photometric: Probability of each of the four distortions (brightness, contrast, saturation, hue).
        brightness: Largest relative change.
        contrast: Largest relative change.
        saturation: Largest relative change.
        hue: Largest turn, as a share of the colour circle (at most 0.5).

    Raises:
        ValueError: A value is out of range.
    """

    flip: float = 0.5
    photometric: float = 0.5
    brightness: float = 0.3
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.05

    def __post_init__(self) -> None:
        for name in ("flip", "photometric", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in 0..0.5, got {self.hue}")


def distort(image: Image.Image, options: Augmentation, rng: np.random.Generator) -> Image.Image:
    """Distort light and colour: up to four changes, in random order.

    Args:
        image: RGB, 8 bits a channel.
        options: Probability and strength of the changes.
        rng: Chooses the changes; always gives the same number of draws.

    Returns:
        A new image of the same kind.
    """
    steps: list[Callable[[Image.Image], Image.Image]] = [
        partial(transforms.adjust_brightness, brightness_factor=1 + rng.uniform(-1, 1) * options.brightness),
        partial(transforms.adjust_contrast, contrast_factor=1 + rng.uniform(-1, 1) * options.contrast),
        partial(transforms.adjust_saturation, saturation_factor=1 + rng.uniform(-1, 1) * options.saturation),
        partial(transforms.adjust_hue, hue_factor=rng.uniform(-1, 1) * options.hue),
    ]
    chosen = rng.random(len(steps)) < options.photometric
    for step in rng.permutation(len(steps)):
        if chosen[step]:
            image = steps[step](image)
    return image


def zoom(
    image: Image.Image,
    calibration: Calibration,
    objects: Objects | None,
    rules: DataRules,
    rng: np.random.Generator,
) -> tuple[Image.Image, Calibration, Objects | None]:
    """Take a random section of an image, a little larger or smaller, and resize it to the image's size.

    The focal length stays: an object that appears ``s`` times smaller is ``s`` times as far away, at the same
    observation angle. Its depth cannot change with it, so 3D boxes no longer project exactly to the image; their
    centres do.

    Args:
        image: RGB.
        calibration: Camera of the image.
        objects: Labels, in the image's pixels.
        rules: How likely and how far; the same number of draws whenever it is possible at all.
        rng: Says whether and how far.

    Returns:
        Image, camera and labels; zeros stand where the section reaches beyond the image.
    """
    if not rules.zoom:
        return image, calibration, objects
    chosen = rng.random() < rules.zoom
    size = np.array(image.size, dtype=np.float64)
    scale = float(np.clip(1 + rng.normal() * rules.zoom_scale, 1 - rules.zoom_scale, 1 + rules.zoom_scale))
    shift = size * np.clip(rng.normal(size=2) * rules.zoom_shift, -2 * rules.zoom_shift, 2 * rules.zoom_shift)
    if not chosen:
        return image, calibration, objects
    left, top = size / 2 + shift - scale * size / 2
    section = (scale, 0.0, float(left), 0.0, scale, float(top))
    image = image.transform(image.size, Image.Transform.AFFINE, section, Image.Resampling.BILINEAR)
    # Of the first pixel's centre in the original's pixels: the section's edge is half a pixel before it.
    start = np.array([left, top]) + (scale - 1) / 2
    matrix = calibration.projection.copy()
    offset = matrix[2, 3]
    matrix[:2, 2] = (matrix[:2, 2] - start) / scale
    matrix[:2, 3] -= start * offset
    matrix[2, 3] = scale * offset
    return image, Calibration(matrix), None if objects is None else _zoomed(objects, start, scale, size)


def _zoomed(objects: Objects, start: FloatArray, scale: float, size: FloatArray) -> Objects:
    """Labels in a section of an image: the 2D boxes cut at its sides, the 3D boxes ``scale`` times as far away."""
    boxes = ((objects.boxes.reshape(-1, 2, 2) - start) / scale).clip(0, size - 1).reshape(-1, 4)
    placed = objects.has_box_3d
    location = objects.location.copy()
    location[placed, 2] *= scale
    rotation = objects.rotation_y.copy()
    rotation[placed] = rotation_from_alpha(objects.observed_alpha[placed], location[placed])
    return replace(objects, boxes=boxes, location=location, rotation_y=rotation)
