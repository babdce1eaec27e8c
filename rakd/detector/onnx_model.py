"""Detectors in ONNX files, run by onnxruntime. Needs neither weights nor networks of PyTorch."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rakd.data.kitti import Sample, collate
from rakd.data.labels import Objects
from rakd.detector.base_config import BaseConfig
from rakd.detector.configs import read_config
from rakd.detector.decode import Boxes3D, to_objects
from rakd.errors import UserError
from rakd.files import check_file
from rakd.geometry import Calibration

INPUTS = ("image", "size", "projection")
"""Names of the inputs: ``[1, 3, H, W]``, ``[2]`` and ``[3, 4]``, all float32; see `rakd.detector.export.Deployed`."""

OUTPUTS = ("boxes", "classes", "scores", "dimensions", "location", "rotation_y", "alpha")
"""Names of the outputs, those of `rakd.detector.decode.Boxes3D`."""

METADATA = "rakd_detector"
"""Key of the model's properties that holds the detector's settings as JSON."""

Array = npt.NDArray[Any]


_CUDA = "CUDAExecutionProvider"


class OnnxDetector:
    """A detector in an ONNX file, to be used as a `rakd.detector.detector.Detector` in evaluation mode.

    On the CPU it takes as many threads as torch has when it is made.

    Args:
        path: The file, of ``rakd export``.
        device: "cuda" asks for onnxruntime's CUDA provider.
        needed: Whether no other device will do; else it takes the CPU where the provider cannot start, and says so.

    Attributes:
        config: The detector's settings.
        device: Where it computes.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is no model of ``rakd export``, or the provider cannot run here.
        ModuleNotFoundError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, device: torch.device | None = None, *, needed: bool = True) -> None:
        import onnxruntime

        check_file(path, "an ONNX model of rakd export")
        self.device = device or torch.device("cpu")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin between images are 1 ms faster, and take the cores from whatever runs next: in turns with
        # such a model, one in PyTorch took 2.6 times as long.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        if self.device.type == "cuda" and _CUDA in onnxruntime.get_available_providers():
            providers.insert(0, _CUDA)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own classes, which it does not document
            raise UserError(f"{path}: cannot be read as an ONNX model: {error}") from error
        # It may lack the provider, and goes on without one whose libraries cannot be loaded.
        started = self.session.get_providers()
        if self.device.type == "cuda" and _CUDA not in started:
            if needed:
                raise UserError(f"{path}: expected {_CUDA} for device cuda, this onnxruntime started {started}")
            warnings.warn(f"{path}: this onnxruntime computes on the CPU alone", stacklevel=3)
            self.device = torch.device("cpu")
        settings = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        if settings is None:
            raise UserError(f"{path}: expected a model of rakd export, it has no property {METADATA!r}")
        try:
            self.config: BaseConfig = read_config(json.loads(settings))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: expected a detector's settings in its property {METADATA!r}: {error}") from None

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The outputs, in the order of `OUTPUTS`."""
        results: list[Array] = self.session.run(list(OUTPUTS), dict(inputs))
        return results

    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """Find the objects in images; see `rakd.detector.detector.Detector.predict`."""
        return [
            to_objects(Boxes3D(*map(torch.from_numpy, self.run(_inputs(image, size, camera)))))
            for image, size, camera in zip(images.cpu(), sizes, calibrations, strict=True)
        ]


def model_inputs(config: BaseConfig, sample: Sample) -> dict[str, Array]:
    """The inputs for one frame, resized to the detector's image height."""
    batch = collate([sample], size=config.image_size)
    return _inputs(batch.images[0], batch.sizes[0], sample.calibration)


def _inputs(image: Tensor, size: tuple[int, int], calibration: Calibration) -> dict[str, Array]:
    values = (image[None].numpy(), np.array(size), calibration.projection)
    return {name: np.ascontiguousarray(v, dtype=np.float32) for name, v in zip(INPUTS, values, strict=True)}
