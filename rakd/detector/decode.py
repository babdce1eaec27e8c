"""From what the heads say to KITTI objects: distance, place and rotation of each detection."""

import numpy as np
import torch
from torch import Tensor

from rakd.data.labels import Objects
from rakd.data.targets import CLASSES
from rakd.detector.heads import Attributes
from rakd.detector.losses import PAPER_HEIGHT, RECIPROCAL_SCALE, absolute_points, box_heights
from rakd.geometry import Calibration, rotation_from_alpha


def decode(
    said: Attributes, boxes: Tensor, classes: Tensor, scores: Tensor, calibration: Calibration, image_height: float
) -> Objects:
    """Turn the predictions for N boxes of one image into objects, best first.

    The distance is ``z = fy · height / projected height``; the centre of the box is the point at that distance
    that projects to the predicted centre; ``rotation_y = alpha + atan2(x, z)``. The score is
    ``class score / (1 + s)`` with ``s`` the scale of the distance's error in metres, see `distance_scale`: a sure
    distance leaves the class score as it is.

    Args:
        said: Predictions.
        boxes: ``[N, 4]`` 2D boxes, pixels.
        classes: ``[N]`` int64, places in `rakd.data.targets.CLASSES`.
        scores: ``[N]`` class scores, 0..1.
        calibration: Camera of the image.
        image_height: Height that images are resized to, pixels.
    """
    fy = float(calibration.projection[1, 1])
    reciprocal = said.reciprocal / box_heights(boxes)
    distance = fy * said.height * reciprocal
    scores = scores / (1 + distance_scale(said, reciprocal, fy, image_height))
    order = scores.argsort(descending=True, stable=True)
    z = _numbers(distance[order])
    centers = calibration.back_project(_numbers(absolute_points(said.keypoints[:, 8], boxes)[order]), z)
    dimensions = _numbers(said.dimensions[order])
    location = centers.copy()
    location[:, 1] += dimensions[:, 0] / 2
    angle = _numbers(said.angle[order])
    alpha = np.arctan2(angle[:, 0], angle[:, 1])
    count = len(order)
    return Objects(
        types=np.array([CLASSES[i] for i in classes[order].tolist()], dtype=np.str_),
        truncation=np.full(count, -1.0),
        occlusion=np.full(count, -1),
        alpha=alpha,
        boxes=_numbers(boxes[order]),
        dimensions=dimensions,
        location=location,
        rotation_y=rotation_from_alpha(alpha, location),
        scores=_numbers(scores[order]),
    )


def distance_scale(said: Attributes, reciprocal: Tensor, fy: float, image_height: float) -> Tensor:
    """Scale ``[N]`` of the distance's error in metres, by the first order of ``z = fy · height · reciprocal``.

    With the gradient ``g`` of z with respect to height and scaled reciprocal it is ``|L⁻¹ g|``. The errors' density
    is proportional to ``exp(-|Lᵀ e|)``, whose covariance is ``3 (L Lᵀ)⁻¹``: the standard deviation is √3 times this.
    """
    scale = RECIPROCAL_SCALE * image_height / PAPER_HEIGHT
    a, b, c = said.factors.unbind(dim=1)
    first = fy * reciprocal / a.exp()
    second = (fy * said.height / scale - c * first) / b.exp()
    return torch.hypot(first, second)


def _numbers(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return values.detach().double().cpu().numpy()
