"""Running a detector over frames, and writing what it finds in KITTI's format."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rakd.data.frames import is_frame_name
from rakd.data.kitti import Batch, KittiDataset, Sample, collate
from rakd.data.labels import Objects, write_objects
from rakd.detector.base_config import BaseConfig
from rakd.distributed import Processes, all_gather_object
from rakd.geometry import Calibration
from rakd.progress import bar

_BAR_DELAY = 2.0  # seconds before a progress bar shows
_BATCH = 8  # frames at a time on a GPU; a CPU gains nothing from more than one


class Predictor(Protocol):
    """Finds objects: a `rakd.detector.base.BaseDetector`, or `rakd.detector.onnx_model.OnnxDetector`."""

    @property
    def config(self) -> BaseConfig:
        """Its settings."""

    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """See `rakd.detector.base.BaseDetector.predict`."""


def detect(detector: Predictor, sample: Sample, device: torch.device) -> Objects:
    """Find the objects of one frame.

    Args:
        detector: In evaluation mode, on ``device``.
        sample: The frame, resized to the detector's image height.
        device: Where to compute.

    Returns:
        Objects with scores, best first, in the pixels of the original image.
    """
    return _detect_batch(detector, collate([sample], size=detector.config.image_size), device)[0]


def detect_all(
    detector: Predictor,
    dataset: KittiDataset,
    device: torch.device,
    *,
    indices: Sequence[int] | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, Objects]]:
    """Find the objects of frames of a data set; gives each frame's name and objects.

    Frames go through the detector several at a time where all are padded to one size, which keeps a frame's objects
    independent of the others'.

    Args:
        detector: In evaluation mode, on ``device``.
        dataset: Frames, resized to the detector's image height.
        device: Where to compute.
        indices: Frames to take, in their order; None: all.
        progress: Show a progress bar.
    """
    chosen = range(len(dataset)) if indices is None else indices
    size = detector.config.image_size
    step = 1 if size is None or device.type == "cpu" else _BATCH
    with bar(total=len(chosen), desc="detecting", unit="frame", delay=_BAR_DELAY, disable=not progress) as shown:
        for start in range(0, len(chosen), step):
            batch = collate([dataset[i] for i in chosen[start : start + step]], size=size)
            if device.type == "cuda":
                batch = batch.pin_memory()
            found = _detect_batch(detector, batch, device)
            yield from ((sample.id, objects) for sample, objects in zip(batch.samples, found, strict=True))
            shown.update(len(found))


def write_detections(
    detector: Predictor,
    dataset: KittiDataset,
    folder: Path,
    device: torch.device,
    *,
    processes: Processes | None = None,
    progress: bool = True,
) -> None:
    """Write a result file for each frame of a data set, ``folder/NNNNNN.txt``.

    Args:
        detector: See `detect_all`.
        dataset: Same.
        folder: Where to write. Result files of other frames are removed from it, as an earlier detector's would be
            taken for this one's.
        device: See `detect_all`.
        processes: All of them share the frames out and must call this with the same detector and data; the main one
            writes. None: this one does it all.
        progress: Show a progress bar.
    """
    rank, count = (0, 1) if processes is None else (processes.rank, processes.count)
    own = detect_all(
        detector, dataset, device, indices=range(rank, len(dataset), count), progress=progress and rank == 0
    )
    shares = [own] if processes is None or count == 1 else all_gather_object(processes, list(own))
    if rank == 0:
        names = set()
        for share in shares:
            for name, objects in share:
                write_objects(folder / f"{name}.txt", objects)
                names.add(name)
        for path in folder.glob("*.txt"):
            if is_frame_name(path.stem) and path.stem not in names:
                path.unlink()


def _detect_batch(detector: Predictor, batch: Batch, device: torch.device) -> list[Objects]:
    """Objects of each frame of a batch, in the pixels of its original image."""
    images = batch.images.to(device, non_blocking=True)
    found = detector.predict(images, batch.sizes, [sample.calibration for sample in batch.samples])
    return [
        objects.resized(sample.original_size[0] / width, sample.original_size[1] / height)
        for objects, sample, (width, height) in zip(found, batch.samples, batch.sizes, strict=True)
    ]
