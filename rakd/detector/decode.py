"""From what the heads say to objects in space: distance, place and rotation of each detection."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rakd.data.labels import Objects
from rakd.data.targets import CLASSES
from rakd.detector.heads import Box3DPrediction
from rakd.detector.losses import PAPER_HEIGHT, RECIPROCAL_SCALE, absolute_points, box_heights
from rakd.geometry import Calibration


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections in B images, D rows each.

    Attributes:
        valid: ``[B, D]`` bool; the other rows only fill up.
        boxes: ``[B, D, 4]`` 2D boxes, pixels.
        classes: ``[B, D]`` int64, places in `rakd.data.labels.CLASSES`.
        scores: ``[B, D]`` class scores, 0..1, falling.
        pred: Predictions of the heads, ``B * D`` rows.
    """

    valid: Tensor
    boxes: Tensor
    classes: Tensor
    scores: Tensor
    pred: Box3DPrediction

    def to_host(self) -> "Detections":
        """The same in main memory, by one transfer."""
        if self.valid.device.type == "cpu":
            return self
        parts = [self.valid, self.boxes, self.classes, self.scores, *vars(self.pred).values()]
        flat = [values.reshape(self.valid.numel(), -1).to(self.pred.height.dtype) for values in parts]
        columns = torch.cat(flat, dim=1).cpu().split_with_sizes([values.shape[1] for values in flat], dim=1)
        host = [values.reshape(part.shape).to(part.dtype) for values, part in zip(columns, parts, strict=True)]
        pred = Box3DPrediction(**dict(zip(vars(self.pred), host[4:], strict=True)))
        return Detections(host[0], host[1], host[2], host[3], pred)

    def of_image(self, image: int) -> "Detections":
        """The valid rows of one image, as a batch of one."""
        rows, count = self.valid[image].nonzero()[:, 0], self.valid.shape[1]
        own = Box3DPrediction(**{name: values[image * count + rows] for name, values in vars(self.pred).items()})
        valid, boxes, classes, scores = (
            values[image, rows][None] for values in (self.valid, self.boxes, self.classes, self.scores)
        )
        return Detections(valid, boxes, classes, scores, own)


@dataclass(frozen=True, eq=False)
class Boxes3D:
    """Boxes in space of N detections of one image, best first; the fields are those of `rakd.data.labels.Objects`.

    Attributes:
        boxes: ``[N, 4]`` 2D boxes, pixels.
        classes: ``[N]`` int64.
        scores: ``[N]`` 0..1.
        dimensions: ``[N, 3]`` height, width, length, metres.
        location: ``[N, 3]`` bottom centre, metres.
        rotation_y: ``[N]`` radians in -π .. π.
        alpha: ``[N]`` radians.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    dimensions: Tensor
    location: Tensor
    rotation_y: Tensor
    alpha: Tensor


def decode_boxes(found: Detections, projection: Tensor, image_height: float) -> Boxes3D:
    """Place the detections of one image in space.

    The distance is ``z = fy · height / projected height``; the centre of the box is the point at that distance
    that projects to the predicted centre; ``rotation_y = alpha + atan2(x, z)``. The score is
    ``class score / (1 + s)`` with ``s`` the scale of the distance's error in metres, see `distance_scale`: a sure
    distance leaves the class score as it is.

    Args:
        found: Detections of one image, all valid.
        projection: ``[3, 4]`` matrix of the camera as `rakd.geometry.Calibration` has it. What is in space is computed
            in its dtype.
        image_height: Height that images are resized to, pixels.
    """
    pred, boxes, matrix = found.pred, found.boxes[0], projection
    fy = matrix[1, 1].to(pred.height.dtype)
    reciprocal = pred.reciprocal / box_heights(boxes)
    scores = found.scores[0] / (1 + distance_scale(pred, reciprocal, fy, image_height))
    order = scores.argsort(descending=True, stable=True)
    z = (fy * pred.height * reciprocal)[order].to(matrix.dtype)
    center = absolute_points(pred.keypoints[:, 8], boxes)[order].to(matrix.dtype)
    dimensions = pred.dimensions[order].to(matrix.dtype)
    angle = pred.angle[order].to(matrix.dtype)
    alpha = torch.atan2(angle[:, 0], angle[:, 1])
    location, rotation = place_boxes(center, z, dimensions, alpha, matrix)
    return Boxes3D(boxes[order], found.classes[0][order], scores[order], dimensions, location, rotation, alpha)


def place_boxes(
    center: Tensor, z: Tensor, dimensions: Tensor, alpha: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """Place boxes in space by the pixels of their 3D centres.

    Args:
        center: ``[N, 2]`` pixels.
        z: ``[N]`` metres.
        dimensions: ``[N, 3]`` height, width, length, metres.
        alpha: ``[N]`` observation angles, radians.
        projection: ``[3, 4]`` matrix of the camera, in the dtype of the others.

    Returns:
        Location of the bottom centres ``[N, 3]``, and ``rotation_y = alpha + atan2(x, z)`` in -π .. π, ``[N]``.
    """
    # As `rakd.geometry.Calibration.back_project`.
    depth = z + projection[2, 3]
    x = (center[:, 0] * depth - projection[0, 2] * z - projection[0, 3]) / projection[0, 0]
    y = (center[:, 1] * depth - projection[1, 2] * z - projection[1, 3]) / projection[1, 1]
    rotation = alpha + torch.atan2(x, z)
    # As `rakd.geometry.wrap_angle`.
    wrapped = rotation - 2 * torch.pi * (rotation / (2 * torch.pi)).round()
    return torch.stack([x, y + dimensions[:, 0] / 2, z], dim=1), wrapped


def decode(found: Detections, calibration: Calibration, image_height: float) -> Objects:
    """Turn the detections of one image into objects, best first; see `decode_boxes`.

    Args:
        found: Detections of one image, all valid, in main memory.
        calibration: Camera of the image.
        image_height: Height that images are resized to, pixels.
    """
    return to_objects(decode_boxes(found, torch.tensor(calibration.projection), image_height))


def to_objects(found: Boxes3D) -> Objects:
    """Boxes in space in main memory as KITTI objects."""
    values = {name: tensor.detach().double().numpy() for name, tensor in vars(found).items() if name != "classes"}
    count = len(found.classes)
    return Objects(
        types=np.array([CLASSES[i] for i in found.classes.tolist()], dtype=np.str_),
        truncation=np.full(count, -1.0),
        occlusion=np.full(count, -1),
        **values,
    )


def distance_scale(pred: Box3DPrediction, reciprocal: Tensor, fy: Tensor | float, image_height: float) -> Tensor:
    """Scale ``[N]`` of the distance's error in metres, by the first order of ``z = fy · height · reciprocal``.

    With the gradient ``g`` of z with respect to height and scaled reciprocal it is ``|L⁻¹ g|``. The errors' density
    is proportional to ``exp(-|Lᵀ e|)``, whose covariance is ``3 (L Lᵀ)⁻¹``: the standard deviation is √3 times this.
    """
    scale = RECIPROCAL_SCALE * image_height / PAPER_HEIGHT
    a, b, c = pred.factors.unbind(dim=1)
    first = fy * reciprocal / a.exp()
    second = (fy * pred.height / scale - c * first) / b.exp()
    return (first.square() + second.square()).sqrt()
