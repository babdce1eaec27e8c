"""Detectors in files: weights together with the settings they belong to."""

from pathlib import Path

from rakd.checkpoints import config_diff, load_weights, save_weights
from rakd.detector.base import BaseDetector
from rakd.detector.base_config import BaseConfig
from rakd.detector.configs import read_config
from rakd.errors import UserError


def save_detector(path: Path, detector: BaseDetector) -> None:
    """Write a detector, atomically."""
    save_weights(
        path, detector.state_dict(), {"detector": detector.config.to_plain(), "started_from": detector.init_source}
    )


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


def start_from(path: Path, config: BaseConfig) -> BaseDetector:
    """A detector with the weights of a file, to be trained on: of these settings, which may differ from the file's.

    Args:
        path: A file that `save_detector` wrote.
        config: Settings under which each of the file's tensors has its place and shape.

    Raises:
        MissingFileError: There is no such file.
        UserError: It holds something else, or a tensor does not fit; names it.
    """
    trained = load_detector(path)
    detector = config.without_download().build()
    detector.config = config
    there, here = (each.state_dict() for each in (trained, detector))
    shapes = [{name: list(tensor.shape) for name, tensor in state.items()} for state in (there, here)]
    other = config_diff(*shapes)
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(f"{path}: does not fit the detector: shape of {', of '.join(other[:3])}{more}")
    detector.load_state_dict(there)
    detector.pyramid.take_over_start(trained.init_source)
    return detector
