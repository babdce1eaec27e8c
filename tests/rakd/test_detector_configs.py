"""Detectors that have a name, and the checks of their settings."""

from dataclasses import replace
from typing import Any, get_args

import pytest
from detector_cases import LOSSES, MANY, images, losses

from rakd.detector import make_detector
from rakd.detector.base_config import BackboneConfig
from rakd.detector.configs import DETECTORS, DetectorConfig, DetectorName, read_config
from rakd.detector.detector import Detector
from rakd.detector.monodetr.configs import MonoDETRConfig, TransformerConfig
from rakd.detector.monodetr.detector import MonoDETR
from rakd.errors import UserError


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


@pytest.mark.parametrize("name", DETECTORS)
def test_named_detectors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DETECTORS[name]
    assert read_config(config.to_plain()) == config
    built: list[tuple[str, int]] = []

    def build(own: DetectorConfig | MonoDETRConfig, seed: int = 0) -> str:
        built.append((own.backbone.weights, seed))
        return "made"

    monkeypatch.setattr(type(config), "build", build)
    assert make_detector(name, seed=3) == "made" and make_detector(name, pretrained=False) == "made"
    assert built == [(config.backbone.weights, 3), ("random", 0)]


def test_there_is_no_such_detector() -> None:
    with pytest.raises(UserError, match=r"name must be one of tiny, .*monodetr-r50, got 'monodetr'"):
        make_detector("monodetr")


def test_the_original_is_not_changed() -> None:
    for name in ("monodetr-r50", "monodetr-r18"):
        config = DETECTORS[name]
        assert isinstance(config, MonoDETRConfig) and config == MonoDETRConfig(
            BackboneConfig(name.replace("monodetr-r", "resnet"))
        )
        assert config.transformer == TransformerConfig(8, 4, 3, 3, 256, 0.1, 50, 11)
        assert (config.depth.bins, config.depth.farthest, config.score_limit) == (80, 60.0, 0.2)


def test_both_families_are_made() -> None:
    assert isinstance(make_detector("tiny"), Detector) and isinstance(make_detector("monodetr-tiny"), MonoDETR)
