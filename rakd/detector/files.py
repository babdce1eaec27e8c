"""Detectors in files: weights together with the settings they belong to."""

from pathlib import Path

from rakd.checkpoints import load_weights, save_weights
from rakd.detector.base import BaseDetector
from rakd.detector.configs import read_config
from rakd.errors import UserError


def save_detector(path: Path, detector: BaseDetector) -> None:
    """Write a detector, atomically."""
    save_weights(path, detector.state_dict(), {"detector": detector.config.to_plain(), "started_from": detector.loaded})


def load_detector(path: Path) -> BaseDetector:
    """Read a detector that `save_detector` wrote, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    state, settings = load_weights(path)
    try:
        config = read_config(settings["detector"])
        # The file brings all weights: nothing is to be downloaded.
        detector = config.without_download().build()
        detector.config = config
        detector.load_state_dict(state)
        detector.pyramid.take_over_start(settings["started_from"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"{path}: expected a detector's weights and settings: {error}") from error
    return detector.eval()
