"""What a detector costs: time for one image, operations, parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from rakd.detector.detector import Detector
from rakd.geometry import Calibration

_CAMERA = ((720.0, 0.0, 610.0, 45.0), (0.0, 720.0, 173.0, 0.2), (0.0, 0.0, 1.0, 0.003))  # near KITTI's


@dataclass(frozen=True)
class Cost:
    """Cost of a detector on one image.

    Attributes:
        size: (width, height) of the image in pixels.
        median_ms: Median time for one image, from pixels on the device to objects.
        p90_ms: The time that nine of ten images stay under.
        gflops: 10⁹ floating-point operations of convolutions and matrix products, by torch's own counter. A
            multiplication with its addition counts as two; normalisation, pooling and suppression are not counted.
        parameters: Number of parameters.
    """

    size: tuple[int, int]
    median_ms: float
    p90_ms: float
    gflops: float
    parameters: int


def measure(
    detectors: Sequence[Detector], device: torch.device, *, repeats: int = 30, warm_up: int = 5, progress: bool = True
) -> list[Cost]:
    """Measure detectors side by side: they take turns on the same random image, batch 1, in evaluation mode.

    How many boxes pass the heads depends on image and weights, but proposals are limited in number.

    Args:
        detectors: Their image sizes come from their settings; a free width is taken as 3.31 times the height.
        device: Where to compute; the detectors are moved there.
        repeats: Timed turns, at least 1.
        warm_up: Turns before that are not timed.
        progress: Show a progress bar.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    inputs = [_image(detector, device) for detector in detectors]
    for detector in detectors:
        detector.to(device).eval()
    times: list[list[float]] = [[] for _ in detectors]
    for turn in tqdm(range(warm_up + repeats), desc="timing", disable=not progress):
        for detector, image, row in zip(detectors, inputs, times, strict=True):
            seconds = _time(detector, image, device)
            if turn >= warm_up:
                row.append(1000 * seconds)
    return [
        Cost(
            size=(image.shape[3], image.shape[2]),
            median_ms=float(np.median(row)),
            p90_ms=float(np.quantile(row, 0.9)),
            gflops=_gflops(detector, image),
            parameters=sum(parameter.numel() for parameter in detector.parameters()),
        )
        for detector, image, row in zip(detectors, inputs, times, strict=True)
    ]


def _image(detector: Detector, device: torch.device) -> torch.Tensor:
    config = detector.config
    width = config.width or -(-round(config.height * 1242 / 375) // 32) * 32
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, config.height, width, generator=generator).to(device)


def _run(detector: Detector, image: torch.Tensor) -> None:
    detector.predict(image, [(image.shape[3], image.shape[2])], [Calibration(np.array(_CAMERA))])


def _time(detector: Detector, image: torch.Tensor, device: torch.device) -> float:
    start = perf_counter()
    _run(detector, image)  # ends with objects in main memory, so the device has finished
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def _gflops(detector: Detector, image: torch.Tensor) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        _run(detector, image)
    return counter.get_total_flops() / 1e9
