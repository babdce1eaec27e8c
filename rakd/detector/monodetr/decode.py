"""From the last decoder layer's predictions to objects in space."""

import torch
from torch import Tensor

from rakd.data.targets import CLASSES
from rakd.detector.boxes import have_area
from rakd.detector.decode import Boxes3D, place_boxes
from rakd.detector.monodetr.heads import Predictions, boxes_2d, decode_angles


def decode_queries(
    found: Predictions,
    depth: Tensor,
    projection: Tensor,
    image: tuple[int, int],
    size: Tensor,
    *,
    most: int,
    limit: float,
) -> Boxes3D:
    """Place the objects of one image in space.

    The score is ``class probability * exp(-log-uncertainty of the distance)``, which exceeds 1 where a distance is
    surer than by a metre. Nothing is suppressed: each query stands for an object of its own.

    Args:
        found: Predictions for N queries of one image, ``[1, N, ...]``.
        depth: ``[1, N]`` distances, metres.
        projection: ``[3, 4]`` matrix of the camera, as `rakd.geometry.Calibration` has it. What is in space is computed
            in its dtype.
        image: (width, height) of the image, padding included, pixels.
        size: ``[2]`` width and height of the image without padding; 2D boxes are clipped to it.
        most: Best pairs of query and class that are looked at.
        limit: Of those, pairs of a smaller probability are dropped, and those whose boxes lie outside the image.

    Returns:
        Objects, best first.
    """
    boxes = found.boxes[0].to(projection.dtype)
    extent = torch.stack([boxes.new_full((), float(length)) for length in image])
    last = (size.to(boxes.dtype) - 1).repeat(2)
    corners = torch.minimum((boxes_2d(boxes) * extent.repeat(2) - 0.5).clamp(min=0), last)
    best, places = found.logits[0].sigmoid().flatten().topk(min(most, found.logits[0].numel()))
    places = places[((best >= limit) & have_area(corners)[places // len(CLASSES)]).nonzero()[:, 0]]
    # In the order of the final scores.
    queries, classes = places // len(CLASSES), places % len(CLASSES)
    scores = found.logits[0][queries, classes].sigmoid() * (-found.depth[0, queries, 1]).exp()
    order = scores.argsort(descending=True, stable=True)
    queries, classes, scores = queries[order], classes[order], scores[order]
    boxes, corners = boxes[queries], corners[queries]
    dimensions = found.dimensions[0][queries].to(projection.dtype).clamp(min=0.01)
    alpha = decode_angles(found.angles[0][queries].to(projection.dtype))
    center = boxes[:, :2] * extent - 0.5
    location, rotation = place_boxes(center, depth[0][queries].to(projection.dtype), dimensions, alpha, projection)
    return Boxes3D(corners, classes, scores, dimensions, location, rotation, alpha)
