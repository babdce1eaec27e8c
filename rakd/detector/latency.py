"""Cost of a detector: time for one image, operations, parameters."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rakd.data.frames import Frame
from rakd.data.kitti import Batch, collate, make_sample
from rakd.detector.base import BaseDetector
from rakd.detector.onnx_model import OnnxDetector
from rakd.errors import UserError
from rakd.progress import bar

Model = BaseDetector | OnnxDetector
"""Models that can be timed."""


@dataclass(frozen=True)
class LatencyResult:
    """Cost of a detector on one image.

    Attributes:
        size: (width, height) of the image in pixels.
        median_ms: Median time for one image, from pixels on the device to objects.
        p90_ms: The time that nine of ten images stay under.
        runs: "eager", "compiled" or "onnxruntime".
        gflops: 10⁹ floating-point operations of plain convolutions and matrix products, by torch's own counter. A
            multiplication with its addition counts as two; normalisation, pooling, sampling, suppression and
            deformable convolutions are not counted. None for an ONNX model.
        parameters: Number of parameters; None for an ONNX model.
    """

    size: tuple[int, int]
    median_ms: float
    p90_ms: float
    runs: str
    gflops: float | None
    parameters: int | None


def benchmark(
    detectors: Sequence[Model],
    frame: Frame,
    device: torch.device,
    *,
    repeats: int = 30,
    warm_up: int = 5,
    progress: bool = True,
) -> list[LatencyResult]:
    """Measure detectors side by side: they take turns on one image, batch 1, in evaluation mode.

    The stages of heads see the same number of boxes in every image, see `rakd.detector.detector.Detector.detect`.

    Under ``torch.distributed`` the main process alone calls this while the others wait. Timings are not shared out:
    processes that time side by side take memory bandwidth, caches and power from each other, and a mean over several
    GPUs is not the time that one of them takes for an image.

    Args:
        detectors: Each gets the image resized and padded as its settings say. See `compiled` for compiled ones.
        frame: Image and camera.
        device: Where to compute; detectors in PyTorch are moved there.
        repeats: Timed turns, at least 1.
        warm_up: Turns before that are not timed.
        progress: Show a progress bar.
    """
    if repeats < 1:
        raise UserError(f"repeats must be 1 or more, got {repeats}")
    inputs = [_prepare(detector, frame, device) for detector in detectors]
    for detector in detectors:
        if isinstance(detector, BaseDetector):
            detector.to(device).eval()
    times: list[list[float]] = [[] for _ in detectors]
    for turn in bar(range(warm_up + repeats), desc="timing", disable=not progress):
        for detector, batch, row in zip(detectors, inputs, times, strict=True):
            seconds = _time(detector, batch, device)
            if turn >= warm_up:
                row.append(1000 * seconds)
    return [
        LatencyResult(
            size=(batch.images.shape[3], batch.images.shape[2]),
            median_ms=float(np.median(row)),
            p90_ms=float(np.quantile(row, 0.9)),
            runs=_runs(detector),
            gflops=_gflops(detector, batch) if isinstance(detector, BaseDetector) else None,
            parameters=sum(p.numel() for p in detector.parameters()) if isinstance(detector, BaseDetector) else None,
        )
        for detector, batch, row in zip(detectors, inputs, times, strict=True)
    ]


def compiled(detector: BaseDetector) -> BaseDetector:
    """A copy whose backbone and feature pyramid, the bulk of the work, go through `torch.compile`.

    The parts behind them have results whose number depends on values, and gain nothing.
    """
    copied = deepcopy(detector)
    copied.pyramid.compile()
    return copied


def _runs(detector: Model) -> str:
    if not isinstance(detector, BaseDetector):
        return "onnxruntime"
    return "eager" if detector.pyramid._compiled_call_impl is None else "compiled"


def _prepare(detector: Model, frame: Frame, device: torch.device) -> Batch:
    config = detector.config
    image = Image.fromarray(frame.read_image())
    sample = make_sample(frame.id, image, frame.read_calibration(), None, config.height)
    batch = collate([sample], size=config.image_size)
    return replace(batch, images=batch.images.to(device))


def _run(detector: Model, batch: Batch) -> None:
    detector.predict(batch.images, batch.sizes, [sample.calibration for sample in batch.samples])


def _time(detector: Model, batch: Batch, device: torch.device) -> float:
    start = perf_counter()
    _run(detector, batch)  # ends with objects in main memory, so the device has finished
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def _gflops(detector: BaseDetector, batch: Batch) -> float:
    counter = FlopCounterMode(display=False)
    plain = detector.pyramid._compiled_call_impl
    # The counter sees operations one by one, as a compiled part does not run them.
    detector.pyramid._compiled_call_impl = None
    # Fused attention on a CPU is an operation that the counter does not know: its products are.
    with counter, sdpa_kernel(SDPBackend.MATH):
        _run(detector, batch)
    detector.pyramid._compiled_call_impl = plain
    return counter.get_total_flops() / 1e9
