"""Running a detector over frames, and writing what it finds in KITTI's format."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rakd.data.kitti import KittiDataset, Sample, collate
from rakd.data.labels import Objects, write_objects
from rakd.detector.configs import DetectorConfig
from rakd.detector.detector import Detector
from rakd.geometry import Calibration
from rakd.progress import bar

_BAR_DELAY = 2.0  # seconds before a progress bar shows


class Predictor(Protocol):
    """What finds objects: `rakd.detector.detector.Detector`, or `rakd.detector.onnx_model.OnnxDetector`."""

    @property
    def config(self) -> DetectorConfig:
        """Its settings."""

    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """See `rakd.detector.detector.Detector.predict`."""


def detect(detector: Predictor, sample: Sample, device: torch.device) -> Objects:
    """Find the objects of one frame.

    Args:
        detector: In evaluation mode, on ``device``.
        sample: The frame, resized to the detector's image height.
        device: Where to compute.

    Returns:
        Objects with scores, best first, in the pixels of the original image.
    """
    batch = collate([sample], size=detector.config.image_size)
    found = detector.predict(batch.images.to(device), batch.sizes, [sample.calibration])[0]
    width, height = batch.sizes[0]
    return found.resized(sample.original_size[0] / width, sample.original_size[1] / height)


def detect_all(
    detector: Detector, dataset: KittiDataset, device: torch.device, *, progress: bool = True
) -> Iterator[tuple[str, Objects]]:
    """Find the objects of all frames of a data set; gives each frame's name and objects."""
    for index in bar(range(len(dataset)), desc="detecting", unit="frame", delay=_BAR_DELAY, disable=not progress):
        sample = dataset[index]
        yield sample.id, detect(detector, sample, device)


def write_detections(
    detector: Detector, dataset: KittiDataset, folder: Path, device: torch.device, *, progress: bool = True
) -> None:
    """Write a result file for each frame of a data set, ``folder/NNNNNN.txt``."""
    for name, objects in detect_all(detector, dataset, device, progress=progress):
        write_objects(folder / f"{name}.txt", objects)
