"""Pairs of truths and predictions of one frame that may match, and how well each pair agrees."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rakd.evaluation.overlaps import Indices, clipped_area, same_frame_pairs
from rakd.evaluation.waymo.objects import WaymoObjects
from rakd.geometry import FloatArray

_CHUNK = 200_000  # pairs held at once

# Of iou.cc: boxes with a side up to the first or from the second on overlap nothing.
_MIN_SIDE, _MAX_SIDE = 1e-2, 1e6
_MIN_UNION = 1e-6

# Of compute_detection_let_metrics_main.cc.
LET_CAMERA = np.array([1.43, 0.0, 2.18])
"""Mean place of the cameras in the vehicle frame, metres: where LET-3D-AP's rays start."""
_LET_SHARE, _LET_METRES = 0.1, 0.5


@dataclass(frozen=True, eq=False)
class WaymoPairs:
    """Pairs of one type and frame that may match, by truth and then by prediction.

    Attributes:
        truth: ``[n]`` row of the truth.
        prediction: ``[n]`` row of the prediction.
        weight: ``[n]`` int64, whose sum a matching maximises: the overlap (LET: times the affinity) in millionths.
        heading: ``[n]`` agreement of the headings, 1 (the same) to 0 (opposite).
        affinity: ``[n]`` longitudinal affinity, 0..1; 1 without LET.
    """

    truth: Indices
    prediction: Indices
    weight: Indices
    heading: FloatArray
    affinity: FloatArray


def find_pairs(truth: WaymoObjects, predictions: WaymoObjects, threshold: float, *, let: bool) -> WaymoPairs:
    """All pairs of one frame with an overlap of ``threshold`` or more; only boxes that can reach it are compared.

    Args:
        truth: Truths of one type, by frame.
        predictions: Predictions of that type, by frame.
        threshold: Intersection over union.
        let: Move predictions along the camera's ray first, as LET-3D-AP does; pairs need an affinity above 0.
    """
    parts: list[tuple[npt.NDArray[np.generic], ...]] = []
    for g, d in same_frame_pairs(truth.frames, predictions.frames, _CHUNK):
        boxes = predictions.boxes[d]
        affinity = np.ones(len(g), dtype=np.float32)
        if let:
            affinity = longitudinal_affinity(boxes, truth.boxes[g]).astype(np.float32)
            near = affinity > 0
            g, d, boxes, affinity = g[near], d[near], boxes[near], affinity[near]
            boxes = range_aligned(boxes, truth.boxes[g])
        near = overlap_bound(truth.boxes[g], boxes) >= threshold
        g, d, boxes, affinity = g[near], d[near], boxes[near], affinity[near]
        # The devkit keeps overlaps, thresholds and weights in single precision.
        overlap = box_overlap(truth.boxes[g], boxes).astype(np.float32)
        match = overlap >= np.float32(threshold)
        g, d, overlap, affinity = g[match], d[match], overlap[match], affinity[match]
        weight = np.round(overlap * affinity * np.float32(1e6)).astype(np.int64)
        heading = heading_accuracy(truth.boxes[g, 6], predictions.boxes[d, 6])
        parts.append((g, d, weight, heading, affinity.astype(np.float64)))
    empty = (np.zeros(0, np.int64),) * 3 + (np.zeros(0),) * 2
    return WaymoPairs(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


def box_overlap(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over union of upright boxes, pair by pair.

    Args:
        a: ``[n, 7]`` x, y, z (centre), length, width, height, heading.
        b: ``[n, 7]``.

    Returns:
        ``[n]``: the shared area seen along z, times the shared part of z, over the union of the volumes. 0 for boxes
        with a side of at most 0.01 or at least 1e6.
    """
    offset = b[:, :2] - a[:, :2]
    # The second box's corners as the first one sees them.
    cos, sin = np.cos(a[:, 6]), np.sin(a[:, 6])
    center = np.stack([offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin], axis=1)
    cos, sin = np.cos(b[:, 6] - a[:, 6])[:, None], np.sin(b[:, 6] - a[:, 6])[:, None]
    along = b[:, 3:4] / 2 * np.array([1.0, 1.0, -1.0, -1.0])
    across = b[:, 4:5] / 2 * np.array([1.0, -1.0, -1.0, 1.0])
    corners = np.stack([along * cos - across * sin, along * sin + across * cos], axis=-1) + center[:, None]
    area = clipped_area(corners, a[:, 3:5] / 2)
    shared = area * np.maximum(_shared_height(a, b), 0.0)
    union = a[:, 3:6].prod(axis=1) + b[:, 3:6].prod(axis=1) - shared
    good = _sized(a) & _sized(b) & (union > _MIN_UNION)
    return np.asarray(np.clip(np.divide(shared, union, out=np.zeros_like(union), where=good), 0.0, 1.0))


def overlap_bound(a: FloatArray, b: FloatArray) -> FloatArray:
    """Upper bound ``[n]`` of `box_overlap`, found without the polygons; -1 for pairs that do not touch."""
    distance = np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1])
    height = _shared_height(a, b)
    touching = (distance <= (np.hypot(a[:, 3], a[:, 4]) + np.hypot(b[:, 3], b[:, 4])) / 2) & (height > 0)
    shared = np.minimum(a[:, 3] * a[:, 4], b[:, 3] * b[:, 4]) * np.maximum(height, 0.0)
    union = a[:, 3:6].prod(axis=1) + b[:, 3:6].prod(axis=1) - shared
    good = touching & _sized(a) & _sized(b) & (union > _MIN_UNION / 2)
    # A little more, since both are rounded.
    return np.asarray(np.divide(shared, union, out=np.full(len(a), -1.0), where=good) * (1 + 1e-6))


def longitudinal_affinity(prediction: FloatArray, truth: FloatArray) -> FloatArray:
    """LET-3D-AP's affinity of box centres, pair by pair: 1 less the error along the ray over its tolerance.

    Args:
        prediction: ``[n, 7]`` boxes in the vehicle frame.
        truth: ``[n, 7]``.

    Returns:
        ``[n]`` in 0..1. The tolerance is a tenth of the truth's distance from the camera, at least half a metre.
    """
    p, g = prediction[:, :3] - LET_CAMERA, truth[:, :3] - LET_CAMERA
    p_range = np.maximum(np.linalg.norm(p, axis=1), 1e-6)
    g_range = np.maximum(np.linalg.norm(g, axis=1), 1e-6)
    along = (p * g).sum(axis=1) / g_range / p_range * p_range
    tolerance = np.maximum(_LET_SHARE * g_range, _LET_METRES)
    return np.asarray(np.clip(1 - np.abs((along - g_range) / tolerance), 0.0, 1.0))


def range_aligned(prediction: FloatArray, truth: FloatArray) -> FloatArray:
    """The predictions ``[n, 7]`` moved along their rays from the camera to where they are nearest to the truths."""
    p, g = prediction[:, :3] - LET_CAMERA, truth[:, :3] - LET_CAMERA
    factor = (p * g).sum(axis=1) / np.maximum((p * p).sum(axis=1), 1e-6)
    moved = prediction.copy()
    moved[:, :3] = p * factor[:, None] + LET_CAMERA
    return np.asarray(moved)


def heading_accuracy(a: FloatArray, b: FloatArray) -> FloatArray:
    """1 less the angle between two headings over π, 0..1."""
    difference = np.abs(a - b) % (2 * np.pi)
    return np.asarray(1 - np.minimum(difference, 2 * np.pi - difference) / np.pi)


def _shared_height(a: FloatArray, b: FloatArray) -> FloatArray:
    low = np.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
    return np.asarray(np.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2) - low)


def _sized(boxes: FloatArray) -> npt.NDArray[np.bool_]:
    return np.asarray(((boxes[:, 3:6] > _MIN_SIDE) & (boxes[:, 3:6] < _MAX_SIDE)).all(axis=1))
