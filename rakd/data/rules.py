"""Rules of training data: labelled objects that a detector learns from, zoom of its images. Imports no torch."""

from dataclasses import dataclass

MIN_HEIGHT = 22.0
"""Objects lower than this many pixels of the original image are ignored, unless a detector says otherwise."""

MIN_VISIBLE = 0.3
"""Objects of which nearer ones leave less than this share visible are ignored, unless a detector says otherwise."""


@dataclass(frozen=True)
class DataRules:
    """Conditions for objects to be learned. All others are ignored, and those whose 3D centre lies outside the image.

    Two-stage detectors learn nothing from ignored regions; to MonoDETR they are background.

    Attributes:
        min_height: Lower boxes are left out, pixels of the original image.
        min_visible: Objects of which nearer ones leave less than this share visible are left out, 0..1.
        max_truncation: Objects of which a larger share is outside the image are left out.
        max_occlusion: Objects with a higher degree of occlusion are left out: 0 none, 1 partly, 2 largely, 3 unknown.
        depth: Nearest and farthest distance, metres.
        center_in_box: Leave out objects whose projected 3D centre lies outside their 2D box.
        most: Objects an image; of more the first ones are learned.
        zoom: Probability of a random zoom of a training image, 0..1; see `rakd.data.augment.zoom`.
        zoom_scale: Largest relative change of the section's size.
        zoom_shift: Scale of the shift of the section's centre, as a share of the image's size; at most twice this.

    Raises:
        ValueError: A value is out of range.
    """

    min_height: float = MIN_HEIGHT
    min_visible: float = MIN_VISIBLE
    max_truncation: float = 1.0
    max_occlusion: int = 3
    depth: tuple[float, float] = (0.0, 1e6)
    center_in_box: bool = False
    most: int = 10_000
    zoom: float = 0.0
    zoom_scale: float = 0.05
    zoom_shift: float = 0.05

    def __post_init__(self) -> None:
        for name in ("min_visible", "max_truncation", "zoom"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        for name in ("zoom_scale", "zoom_shift"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"{name} must lie in 0..0.5, got {getattr(self, name)}")
        if not 0 <= self.depth[0] < self.depth[1]:
            raise ValueError(f"depth must be two rising distances, got {self.depth}")
        if self.most < 1:
            raise ValueError(f"most must be 1 or more, got {self.most}")
