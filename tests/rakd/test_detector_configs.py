"""Detectors that have a name, and the checks of their settings."""

from dataclasses import replace
from typing import get_args

import pytest
from detector_cases import LOSSES, MANY, images, losses

from rakd.detector.configs import DETECTORS, DetectorConfig, DetectorName
from rakd.detector.detector import Detector


def test_all_detectors_can_be_named() -> None:
    assert set(get_args(DetectorName)) == set(DETECTORS)


@pytest.mark.parametrize("name", ["kitti-r18", "kitti-r50"])
def test_the_papers_settings(name: str) -> None:
    config = DETECTORS[name]
    assert isinstance(config, DetectorConfig)
    assert (config.height, config.width) == (512, 1760)
    assert config.proposals.anchor_sizes == (32, 64, 128, 256, 512)
    assert config.heads.sampled == 512 and config.heads.width == 1024
    # Without the download, and with heads that take no second to make.
    light = replace(
        config,
        backbone=replace(config.backbone, weights="random", deformable=True),
        heads=replace(config.heads, width=8),
    )
    detector = Detector(light)
    assert detector.channels == 256
    terms, _ = losses(detector, images(), [MANY])
    assert list(terms) == LOSSES
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 100}, "height must be a positive multiple of 32, got 100"),
        ({"height": 0}, "height must be a positive multiple of 32, got 0"),
        ({"width": 1750}, "width must be a positive multiple of 32 or None, got 1750"),
    ],
)
def test_settings_are_checked(small_config: DetectorConfig, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small_config, **change)


def test_the_number_of_anchor_sizes_is_checked(small_config: DetectorConfig) -> None:
    with pytest.raises(ValueError, match="anchor_sizes must hold 4 or 5 sizes"):
        replace(small_config, proposals=replace(small_config.proposals, anchor_sizes=(8, 16, 32)))
