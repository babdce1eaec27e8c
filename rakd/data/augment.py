"""Random changes to training images: mirroring, and distortion of light and colour.

Images are Pillow's here: its integer arithmetic gives the same pixels whatever the number of threads, which
differs between a loader's workers and the main process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as transforms


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
