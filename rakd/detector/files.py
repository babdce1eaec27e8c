"""Detectors in files: weights together with the settings they belong to."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rakd.checkpoints import load_weights, save_weights
from rakd.detector.configs import BackboneConfig, DetectorConfig, HeadConfig, ProposalConfig
from rakd.detector.detector import Detector
from rakd.errors import UserError


def save_detector(path: Path, detector: Detector) -> None:
    """Write a detector, atomically."""
    save_weights(path, detector.state_dict(), {"detector": asdict(detector.config), "started_from": detector.loaded})


def load_detector(path: Path) -> Detector:
    """Read a detector that `save_detector` wrote, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    state, settings = load_weights(path)
    try:
        config = read_config(settings["detector"])
        # The file brings all weights: nothing is to be downloaded.
        detector = Detector(config.without_download())
        detector.config = config
        detector.load_state_dict(state)
        detector.pyramid.take_over_start(settings["started_from"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"{path}: expected a detector's weights and settings: {error}") from error
    return detector.eval()


def read_config(values: Mapping[str, Any]) -> DetectorConfig:
    """Settings of a detector from plain values, as ``dataclasses.asdict`` or JSON give them."""
    parts = {"backbone": BackboneConfig, "proposals": ProposalConfig, "heads": HeadConfig}
    return DetectorConfig(
        **{name: parts[name](**_tuples(value)) if name in parts else value for name, value in values.items()}
    )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
