"""Detectors: the two-stage one, and MonoDETR in its folder; their files, inference and cost. Loads no torch itself.

`make_detector` makes any of them by its name.
"""

from typing import TYPE_CHECKING

from rakd.errors import UserError

if TYPE_CHECKING:
    from rakd.detector.base import BaseDetector


def make_detector(name: str, pretrained: bool = True, seed: int = 0) -> "BaseDetector":
    """Make a detector of either family, in training mode.

    Args:
        name: One of `rakd.detector.configs.DETECTORS`.
        pretrained: Take ImageNet weights for the backbone where the named settings want them and they can be loaded
            (``init_source`` of the result tells); False: random ones.
        seed: Seed of the random weights; the global generator is left alone.

    Raises:
        UserError: There is no detector of that name.
    """
    from rakd.detector.configs import DETECTORS

    if name not in DETECTORS:
        raise UserError(f"name must be one of {', '.join(DETECTORS)}, got {name!r}")
    config = DETECTORS[name]
    return (config if pretrained else config.without_download()).build(seed)
