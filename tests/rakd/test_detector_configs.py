"""Detectors that have a name, and the checks of their settings."""

from dataclasses import replace
from typing import Any, get_args

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


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("heads", {"score_limit": float("nan")}, r"score_limit must lie in 0..1, got nan"),
        ("heads", {"nms_iou": -1.0}, r"nms_iou must lie in 0..1, got -1"),
        ("heads", {"positive_share": 2.0}, r"positive_share must lie in 0..1, got 2"),
        ("heads", {"detections": 0}, "detections must be positive, got 0"),
        ("heads", {"canonical_size": -1.0}, "canonical_size must be positive, got -1"),
        ("heads", {"corner_weight": -1.0}, "corner_weight must be 0 or more, got -1"),
        ("proposals", {"sampled": 0}, "sampled must be positive, got 0"),
        ("proposals", {"aspect_ratios": ()}, "aspect_ratios must be positive, got nothing"),
        ("proposals", {"pre_nms_top_n": (100, 0)}, "pre_nms_top_n must be positive, got 100, 0"),
        ("proposals", {"nms_iou": 1.5}, r"nms_iou must lie in 0..1, got 1.5"),
        ("proposals", {"negative_iou": 0.8}, "negative_iou must be at most positive_iou, 0.7, got 0.8"),
    ],
)
def test_settings_of_parts_are_checked(
    small_config: DetectorConfig, part: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(getattr(small_config, part), **change)


def test_the_number_of_anchor_sizes_is_checked(small_config: DetectorConfig) -> None:
    with pytest.raises(ValueError, match="anchor_sizes must hold 4 or 5 sizes"):
        replace(small_config, proposals=replace(small_config.proposals, anchor_sizes=(8, 16, 32)))
