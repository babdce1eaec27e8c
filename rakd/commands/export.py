"""``rakd export``: a trained detector as an ONNX model, checked against PyTorch."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rakd.errors import UserError
from rakd.files import check_output

# Of the detections, found by one side alone. Rounding tips a suppression whose overlap lies at its very limit; with
# random weights, of whose boxes hundreds overlap, that happened to 1 of 100 (kitti-r50).
MAX_UNMATCHED = 0.05


@dataclass(frozen=True)
class Export:
    """Write a detector as an ONNX model, which runs without PyTorch, and compare their outputs.

    Inputs: image [1, 3, H, W] (RGB, 0..1, zeros right of and below the image), size [2] (width and height without the
    padding), projection [3, 4] (camera of the image as it was resized); all float32. Outputs, a row a detection, best
    first: boxes (in pixels of the resized image), classes (0 Car, 1 Pedestrian, 2 Cyclist), scores, dimensions,
    location, rotation_y, alpha, as in KITTI's labels. examples/onnx_model.py runs one without PyTorch.
    """

    detector: Annotated[Positional[str], arg(metavar="DETECTOR")]
    """File detector.pt of a run, or a name (see rakd train --help; random weights)."""

    out: Annotated[Path, arg(metavar="FILE")] = Path("detector.onnx")
    """File to write."""

    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder in KITTI's layout with frames to compare on; rendered street scenes if there is none."""

    frames: int = 4
    """Number of frames to compare on."""

    tolerance: float = 0.01
    """Largest difference to allow: in pixels, radians, scores, metres of dimensions, and metres of location per metre
    of distance."""

    def run(self) -> None:
        """Export, compare and tell."""
        from tempfile import TemporaryDirectory

        import torch

        from rakd.commands.models import find_model, scene_size
        from rakd.data.kitti import KittiDataset
        from rakd.detector.base import BaseDetector
        from rakd.detector.export import check_onnx, export_onnx
        from rakd.detector.onnx_model import OnnxDetector
        from rakd.files import atomic_write
        from rakd.scenes import make_scenes

        if self.out.suffix != ".onnx":
            raise UserError(f"--out: expected a name that ends in .onnx, got {self.out}")
        check_output(self.out, "--out")
        if self.frames < 1:
            raise UserError(f"--frames must be 1 or more, got {self.frames}")
        if not self.tolerance > 0:
            raise UserError(f"--tolerance must be positive, got {self.tolerance}")
        detector = find_model(self.detector, torch.device("cpu"))
        if not isinstance(detector, BaseDetector):
            raise UserError(f"DETECTOR: {self.detector} is an ONNX model already")
        with TemporaryDirectory() as folder:
            if self.data is None:
                make_scenes(Path(folder), 2 * self.frames, 0, size=scene_size([detector]), workers=1)
            dataset = KittiDataset(self.data or Path(folder), height=detector.config.height)
            chosen = range(0, len(dataset), max(1, len(dataset) // self.frames))[: self.frames]
            samples = [dataset[i] for i in chosen]
        with atomic_write(self.out) as temporary:
            export_onnx(detector, temporary)
            found = check_onnx(detector, OnnxDetector(temporary), samples)
            size = temporary.stat().st_size / 1e6
            worst = ", ".join(f"{name} {value:.2g}" for name, value in found.worst.items())
            told = f"{found.detections} detections in {len(samples)} frames, {found.unmatched} found by one side alone"
            if found.unmatched > MAX_UNMATCHED * found.detections or max(found.worst.values()) > self.tolerance:
                raise UserError(
                    f"the model differs from PyTorch by more than --tolerance, {self.tolerance:g}, and is not kept: "
                    f"{told}; largest differences: {worst}"
                )
        print(f"{self.out}: {size:.1f} MB; compared with PyTorch: {told}")
        print(f"largest differences: {worst}")
        if not found.detections:
            warnings.warn(
                "nothing was found in these frames, so nothing was compared: give others (--data)", stacklevel=1
            )
