"""The choice of detectors on the command line, by name or from files. Loads torch: commands import it when they run."""

from collections.abc import Iterable
from pathlib import Path

import torch

from rakd.detector.configs import DETECTORS
from rakd.detector.files import load_detector
from rakd.detector.latency import Model
from rakd.detector.onnx_model import OnnxDetector
from rakd.errors import UserError


def open_model(path: Path, device: torch.device, *, needed: bool = False) -> Model:
    """Read a detector from a file: ``detector.pt`` of a run, or ``.onnx`` of ``rakd export``.

    Args:
        path: The file.
        device: Where it will compute; a detector in PyTorch is moved there.
        needed: Whether no other device will do; else onnxruntime takes the CPU where torch has a GPU and it has none,
            and says so.
    """
    if path.suffix == ".onnx":
        return OnnxDetector(path, device, needed=needed)
    return load_detector(path).to(device)


def find_model(name: str, device: torch.device, *, needed: bool = False) -> Model:
    """Make a named detector with random weights, or read one from a file; see `open_model`.

    Raises:
        UserError: It is neither.
    """
    config = DETECTORS.get(name)
    if config is not None:
        # Layers take the same time with any weights, so nothing is downloaded.
        return config.without_download().build().to(device).eval()
    if not Path(name).is_file():
        raise UserError(f"DETECTOR must be one of {', '.join(DETECTORS)} or a file, got {name!r}")
    return open_model(Path(name), device, needed=needed)


def scene_size(detectors: Iterable[Model]) -> tuple[int, int]:
    """(width, height) of a rendered image that fits all these detectors: KITTI's, or narrower ones for Waymo's."""
    width, height = 1242, 375
    sizes = [size for size in (detector.config.image_size for detector in detectors) if size is not None]
    return min([width, *(height * size[0] // size[1] for size in sizes)]), height
