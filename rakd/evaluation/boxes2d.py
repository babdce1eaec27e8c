"""Average precision of 2D boxes, as COCO counts it: for detectors that other frameworks train."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

COCO_THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))
"""IoU from 0.50 to 0.95, whose mean is mAP50-95."""

_RECALLS = 101


def mean_average_precision(
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    max_detections: int = 100,
) -> float:
    """Compute the mean average precision over classes and IoU thresholds.

    Detections of all images are sorted by score (equal ones stay in order); each takes the free object of its image
    and class with the largest IoU, if that reaches the threshold. Precision is made non-increasing and read at 101
    recalls. Classes without objects do not count.

    Args:
        predictions: Per image ``boxes`` ``[D, 4]`` (x1, y1, x2, y2), ``scores`` ``[D]`` and ``labels`` ``[D]``.
        targets: Per image ``boxes`` ``[G, 4]`` and ``labels`` ``[G]``.
        thresholds: IoU that counts as found.
        max_detections: Of each image and class, the ones with the highest scores.

    Returns:
        0..1; NaN where there is no object at all.

    Raises:
        ValueError: The numbers of images, or of boxes, scores and labels in one, differ; a box is not finite or a score
            NaN; there are no thresholds, or one is not in 0..1; or ``max_detections`` is under 1.

    Source:
        pycocotools' COCOeval without crowds and areas.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"predictions: expected {len(targets)} images as in targets, got {len(predictions)}")
    if not len(thresholds):
        raise ValueError("thresholds: expected at least one IoU, got none")
    if not all(0 < threshold <= 1 for threshold in thresholds):
        raise ValueError(f"thresholds: expected IoU over 0 and up to 1, got {list(map(float, thresholds))}")
    if max_detections < 1:
        raise ValueError(f"max_detections: expected 1 or more, got {max_detections}")
    for name, images, parts in (("predictions", predictions, ("scores", "labels")), ("targets", targets, ("labels",))):
        for i, image in enumerate(images):
            counts = {part: len(image[part]) for part in ("boxes", *parts)}
            if len(set(counts.values())) > 1:
                raise ValueError(f"{name}: expected as many boxes as {' and '.join(parts)}, image {i} has {counts}")
            if not bool(torch.isfinite(image["boxes"]).all()):
                raise ValueError(f"{name}: expected finite boxes, image {i} has others")
            if "scores" in parts and bool(torch.isnan(image["scores"]).any()):
                raise ValueError(f"{name}: expected scores that are numbers, image {i} has NaN")
    classes = sorted({int(label) for target in targets for label in target["labels"]})
    if not classes:
        return float("nan")
    found = [
        _average_precision(predictions, targets, label, threshold, max_detections)
        for label in classes
        for threshold in thresholds
    ]
    return sum(found) / len(found)


@torch.no_grad()
def evaluate_detector(detector: nn.Module, data: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> float:
    """Compute the mean average precision of a detector that takes images as torchvision's do.

    Args:
        detector: Put into eval mode; gives ``boxes``, ``scores`` and ``labels`` for a list of images.
        data: Images and targets, such as `rakd.data.boxes2d.BoxDataset`.

    Returns:
        See `mean_average_precision`.
    """
    device = next(detector.parameters()).device
    detector.eval()
    pairs = [(detector([image.to(device)])[0], target) for image, target in data]
    return mean_average_precision([found for found, _ in pairs], [target for _, target in pairs])


def _average_precision(
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    label: int,
    threshold: float,
    max_detections: int,
) -> float:
    scores, hits, objects = [], [], 0
    for prediction, target in zip(predictions, targets, strict=True):
        truth = target["boxes"][target["labels"] == label].double().cpu()
        mine = prediction["labels"] == label
        order = prediction["scores"][mine].cpu().argsort(descending=True, stable=True)[:max_detections]
        overlaps = _iou(prediction["boxes"][mine].double().cpu()[order], truth)
        free = torch.ones(len(truth), dtype=torch.bool)
        for row in overlaps:
            best = int(torch.where(free, row, -1.0).argmax()) if len(truth) else -1
            hit = best >= 0 and bool(free[best]) and float(row[best]) >= threshold
            hits.append(hit)
            if hit:
                free[best] = False
        scores.append(prediction["scores"][mine].double().cpu()[order])
        objects += len(truth)
    order = torch.cat(scores).argsort(descending=True, stable=True)
    true = torch.tensor(hits, dtype=torch.float64)[order].cumsum(0)
    recall = true / objects
    precision = true / torch.arange(1, len(true) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0) if len(true) else precision
    places = torch.searchsorted(recall, torch.from_numpy(np.linspace(0, 1, _RECALLS)))
    reached = places < len(precision)
    return float(precision[places[reached]].sum()) / _RECALLS


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union, ``[D, G]``."""
    first = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    last = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (last - first).clamp(min=0).prod(dim=2)
    areas = [(rows[:, 2:] - rows[:, :2]).clamp(min=0).prod(dim=1) for rows in (boxes, others)]
    return common / (areas[0][:, None] + areas[1][None, :] - common).clamp(min=1e-12)
