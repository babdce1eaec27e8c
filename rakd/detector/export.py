"""Detectors as ONNX models: image and camera in, 2D and 3D boxes out, in standard operators alone.

`torch.export` traces the detector with the project's operators as they are; `torch.onnx` writes the graph, with
``rakd_ops::align`` as one RoiAlign a level.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rakd_ops  # noqa: F401 - registers the operators that are translated
from rakd.data.kitti import Sample
from rakd.detector.base import BaseDetector
from rakd.detector.onnx_model import INPUTS, METADATA, OUTPUTS, OnnxDetector, model_inputs
from rakd.errors import UserError
from rakd.files import atomic_write

OPSET = 18
"""Version of ONNX's operators, which onnxruntime knows from 1.14 on."""


_SAME = 1.0  # pixels that a detection may move and still be the same one


class Deployed(nn.Module):
    """A detector of one image with tensors in and out, for `torch.export`.

    Args:
        detector: In evaluation mode.
    """

    def __init__(self, detector: BaseDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor, size: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
        """Find the objects in an image.

        Args:
            image: ``[1, 3, H, W]`` float32 in 0..1, RGB, zeros right of and below the image.
            size: ``[2]`` float32, width and height without the padding.
            projection: ``[3, 4]`` float32 camera of this image, as `rakd.geometry.Calibration` has it.

        Returns:
            The fields of `rakd.detector.decode.Boxes3D`.
        """
        return tuple(vars(self.detector.locate(image, size, projection)).values())


def export_program(detector: BaseDetector) -> "torch.export.ExportedProgram":
    """Trace a detector of one image with `torch.export`.

    Raises:
        UserError: The detector has no fixed image size.
    """
    size = detector.config.image_size
    if size is None:
        raise UserError("export needs a detector with a fixed width (config.width), this one has None")
    width, height = size
    example = (torch.zeros(1, 3, height, width), torch.tensor([width, height], dtype=torch.float32), torch.eye(3, 4))
    with torch.no_grad(), _quiet():
        return torch.export.export(Deployed(detector).eval(), example, strict=False)


def export_onnx(detector: BaseDetector, path: Path) -> None:
    """Write a detector as an ONNX model, under a temporary name first.

    Args:
        detector: Any named one; on the CPU.
        path: The file; its name should end in ``.onnx``.

    Raises:
        UserError: The detector has no fixed image size.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    import onnx

    traced = export_program(detector.eval())
    with _quiet():
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {METADATA: json.dumps(detector.config.to_plain())})
    _name_rows(model)
    onnx.checker.check_model(model)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


@dataclass(frozen=True)
class Differences:
    """How far a model is from the detector that it was made of.

    Attributes:
        detections: Detections of the detector in all frames.
        unmatched: Detections that one side has alone.
        worst: The largest absolute difference of each output over the others: boxes in pixels, dimensions in metres,
            location in metres per metre of distance, angles in radians.
    """

    detections: int
    unmatched: int
    worst: dict[str, float]


def exported(detector: BaseDetector, path: Path, device: torch.device, *, needed: bool = True) -> OnnxDetector:
    """Export a detector, wherever it is, to a file and load it.

    Args:
        detector: Stays as it is: a copy on the CPU is traced.
        path: Of the file.
        device: See `rakd.detector.onnx_model.OnnxDetector`.
        needed: Same.

    Raises:
        UserError: As `export_onnx` and OnnxDetector.
    """
    export_onnx(deepcopy(detector).cpu(), path)
    return OnnxDetector(path, device, needed=needed)


def check_onnx(detector: BaseDetector, model: OnnxDetector, samples: Sequence[Sample]) -> Differences:
    """Compare a model with the detector that it was made of.

    Args:
        detector: On the CPU.
        model: The model.
        samples: Frames, resized to the detector's image height.
    """
    worst = {name: 0.0 for name in OUTPUTS if name != "classes"}
    deployed, total, unmatched = Deployed(detector.eval()), 0, 0
    for sample in samples:
        inputs = model_inputs(detector.config, sample)
        with torch.no_grad():
            values = deployed(*map(torch.from_numpy, inputs.values()))
        expected = dict(zip(OUTPUTS, values, strict=True))
        found = {name: torch.from_numpy(value) for name, value in zip(OUTPUTS, model.run(inputs), strict=True)}
        own, other = _pair(expected, found)
        total += len(expected["scores"])
        unmatched += len(expected["scores"]) + len(found["scores"]) - 2 * len(own)
        for name in worst if len(own) else ():
            difference = (expected[name][own].double() - found[name][other].double()).abs()
            if name in ("rotation_y", "alpha"):  # which end where they begin
                difference = torch.minimum(difference, (2 * torch.pi - difference).abs())
            if name == "location":  # what is twice as far is off by twice as much
                difference = difference / expected[name][own, 2:].double().clamp(min=1.0)
            worst[name] = max(worst[name], difference.nan_to_num(nan=torch.inf).amax().item())
    return Differences(total, unmatched, worst)


def _pair(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of the detections that are each other's nearest, of one class and a pixel or less apart.

    By place rather than by rank, since two scores that differ by rounding may change places.
    """
    if not (len(a["scores"]) and len(b["scores"])):
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    apart = (a["boxes"][:, None] - b["boxes"][None]).abs().amax(dim=2)
    apart = apart.masked_fill(a["classes"][:, None] != b["classes"][None], torch.inf)
    nearest = apart.argmin(dim=1)
    rows = torch.arange(len(nearest))
    own = rows[(apart.argmin(dim=0)[nearest] == rows) & (apart[rows, nearest] <= _SAME)]
    return own, nearest[own]


def translations() -> dict[Any, Callable[..., Any]]:
    """Operators that torch.onnx does not know, for its ``custom_translation_table``: of `rakd_ops`, and sorting."""
    return {
        torch.ops.rakd_ops.prepare_boxes.default: _prepare_boxes,
        torch.ops.rakd_ops.align.default: _align,
        torch.ops.aten.sort.stable: _sort,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the libraries say of each other: old names in torchvision, empty lists in torch's translations."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`create_unbacked_symint` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _name_rows(model: Any) -> None:
    """Give the number of detections a name for people: torch calls it u7 or the like."""
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = "detections"


def _prepare_boxes(
    boxes: Sequence[Any], box_weights: Any, level_weights: Any, images: int, mean: bool, *_: Any
) -> tuple[Any, Any]:
    """`rakd_ops::prepare_boxes` of boxes one tensor an image, with the level weights given, as under `torch.export`."""
    from onnxscript import opset18 as op

    assert box_weights is None and level_weights is not None and not mean
    rows = []
    for image, group in enumerate(boxes):
        count = op.Shape(group, start=0, end=1)
        number = op.Expand(
            op.Constant(value_floats=[float(image)]), op.Concat(count, op.Constant(value_ints=[1]), axis=0)
        )
        rows.append(op.Concat(number, op.Cast(group, to=_FLOAT), axis=1))
    joined = op.Concat(*rows, axis=0) if len(rows) > 1 else rows[0]
    # float32 suffices: RoiAlign computes positions in it. The index is only for compiled kernels.
    return op.Concat(joined, op.Cast(level_weights, to=_FLOAT), axis=1), op.Constant(value_ints=[0])


def _align(
    features: Sequence[Any],
    rows: Any,
    index: Any,
    strides: Sequence[float],
    output_size: Sequence[int],
    ratio: int,
    *_: Any,
) -> Any:
    """`rakd_ops::align`: on each level RoiAlign of the boxes that have a weight there, times the weight."""
    from onnxscript import opset18 as op

    height, width = output_size
    channels = op.Shape(features[0], start=1, end=2)
    shape = op.Concat(op.Shape(rows, start=0, end=1), channels, op.Constant(value_ints=[height, width]), axis=0)
    result = op.Expand(op.Constant(value_float=0.0), shape)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        weights = op.Slice(rows, *(op.Constant(value_ints=[n]) for n in (5 + level, 6 + level, 1)))
        flat = op.Squeeze(weights, op.Constant(value_ints=[1]))
        chosen = op.Squeeze(op.NonZero(flat), op.Constant(value_ints=[0]))
        own = op.Gather(rows, chosen, axis=0)
        boxes = op.Slice(own, *(op.Constant(value_ints=[n]) for n in (1, 5, 1)))
        images = op.Squeeze(
            op.Slice(own, *(op.Constant(value_ints=[n]) for n in (0, 1, 1))), op.Constant(value_ints=[1])
        )
        pooled = op.RoiAlign(
            feature,
            boxes,
            op.Cast(images, to=_INT64),
            coordinate_transformation_mode="half_pixel",
            mode="avg",
            output_height=height,
            output_width=width,
            sampling_ratio=ratio,
            spatial_scale=1.0 / stride,
        )
        factor = op.Unsqueeze(op.Gather(weights, chosen, axis=0), op.Constant(value_ints=[2, 3]))
        places = op.Unsqueeze(chosen, op.Constant(value_ints=[1]))
        result = op.ScatterND(result, places, op.Mul(pooled, factor), reduction="add")
    return result


def _sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """`aten::sort.stable`: TopK of all, in which the earlier of two equal values comes first."""
    from onnxscript import opset18 as op

    count = op.Shape(values, start=-1) if dim == -1 else op.Shape(values, start=dim, end=dim + 1)
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


_FLOAT, _INT64 = 1, 7  # onnx.TensorProto's
