"""Overlaps of ground truth and detections: 2D boxes, rectangles in bird's-eye view, 3D boxes.

Everything works on flat lists of pairs, all frames at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rakd.data.labels import Objects
from rakd.geometry import FloatArray

Indices = npt.NDArray[np.int64]

METRICS = ("bbox", "bev", "3d")

_CHUNK = 400_000  # pairs held at once


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of rows of one frame that overlap, by ground truth and then by detection in file order.

    Attributes:
        truth: ``[n]`` row of the ground truth.
        detection: ``[n]`` row of the detection.
        overlap: ``[n]`` for each metric.
    """

    truth: Indices
    detection: Indices
    overlap: dict[str, FloatArray]


def find_pairs(
    truth: Objects,
    truth_frames: Indices,
    detections: Objects,
    detection_frames: Indices,
    least: float,
    *,
    over: str,
) -> Pairs:
    """All pairs of one frame whose overlap exceeds ``least`` in some metric.

    Args:
        truth: Ground truth of all frames, by frame.
        truth_frames: ``[G]`` frame of each row, ascending.
        detections: Detections of all frames, by frame.
        detection_frames: ``[D]`` frame of each row, ascending.
        least: Overlaps up to this one do not matter.
        over: Divisor of the intersections: "union", or the "detection" alone.
    """
    truths, others = [], []
    overlaps: dict[str, list[FloatArray]] = {metric: [] for metric in METRICS}
    for g, d in same_frame_pairs(truth_frames, detection_frames, _CHUNK):
        values = _overlaps(truth, g, detections, d, over=over)
        keep = np.max([values[metric] for metric in METRICS], axis=0) > least
        truths.append(g[keep])
        others.append(d[keep])
        for metric in METRICS:
            overlaps[metric].append(values[metric][keep])
    none = np.zeros(0, dtype=np.int64)
    return Pairs(
        np.concatenate([none, *truths]),
        np.concatenate([none, *others]),
        {metric: np.concatenate([np.zeros(0), *overlaps[metric]]) for metric in METRICS},
    )


def same_frame_pairs(truth_frames: Indices, detection_frames: Indices, chunk: int) -> Iterator[tuple[Indices, Indices]]:
    """List every pair of rows of one frame.

    Args:
        truth_frames: ``[N]``, ascending.
        detection_frames: ``[M]``, ascending.
        chunk: About how many pairs are given at once; all those of one row of the truth come together.
    """
    first = np.searchsorted(detection_frames, truth_frames, side="left")
    counts = np.searchsorted(detection_frames, truth_frames, side="right") - first
    ends = np.cumsum(counts)
    start = 0
    while start < len(truth_frames):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + chunk, side="right")))
        rows = np.arange(start, stop)
        total = int(ends[stop - 1]) - before
        g = np.repeat(rows, counts[rows])
        within = np.arange(total) - np.repeat(ends[rows] - counts[rows] - before, counts[rows])
        yield g, first[g] + within
        start = stop


def _overlaps(truth: Objects, g: Indices, detections: Objects, d: Indices, *, over: str) -> dict[str, FloatArray]:
    """Overlap of every pair in every metric."""
    boxes_g, boxes_d = truth.boxes[g], detections.boxes[d]
    sizes_g, sizes_d = truth.dimensions[g], detections.dimensions[d]
    width = np.minimum(boxes_g[:, 2], boxes_d[:, 2]) - np.maximum(boxes_g[:, 0], boxes_d[:, 0])
    height = np.minimum(boxes_g[:, 3], boxes_d[:, 3]) - np.maximum(boxes_g[:, 1], boxes_d[:, 1])
    in_image = np.where((width > 0) & (height > 0), width * height, 0.0)
    from_above = _intersect_rectangles(truth, g, detections, d)
    bottom_g, bottom_d = truth.location[g, 1], detections.location[d, 1]
    tall = np.minimum(bottom_g, bottom_d) - np.maximum(bottom_g - sizes_g[:, 0], bottom_d - sizes_d[:, 0])
    in_space = from_above * np.maximum(tall, 0.0)
    measures = {
        "bbox": (in_image, _area(boxes_g), _area(boxes_d)),
        "bev": (from_above, sizes_g[:, 1] * sizes_g[:, 2], sizes_d[:, 1] * sizes_d[:, 2]),
        "3d": (in_space, sizes_g.prod(axis=1), sizes_d.prod(axis=1)),
    }
    result = {}
    for metric, (inter, whole_g, whole_d) in measures.items():
        divisor = whole_d if over == "detection" else whole_g + whole_d - inter
        result[metric] = np.divide(inter, divisor, out=np.zeros_like(inter), where=divisor != 0)
    return result


def _area(boxes: FloatArray) -> FloatArray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _intersect_rectangles(truth: Objects, g: Indices, detections: Objects, d: Indices) -> FloatArray:
    """Area that two boxes share in bird's-eye view, for every pair."""
    area = np.zeros(len(g))
    reach_g = np.hypot(truth.dimensions[:, 1], truth.dimensions[:, 2]) / 2
    reach_d = np.hypot(detections.dimensions[:, 1], detections.dimensions[:, 2]) / 2
    offset = truth.location[g][:, [0, 2]] - detections.location[d][:, [0, 2]]
    # Most pairs are too far apart to touch.
    near = np.flatnonzero(np.hypot(offset[:, 0], offset[:, 1]) < reach_g[g] + reach_d[d])
    g, d, offset = g[near], d[near], offset[near]
    # The ground truth's corners as the detection sees them: its centre the origin, its length along x.
    corners = rectangle_corners(
        np.zeros_like(offset), truth.dimensions[g][:, [1, 2]], truth.rotation_y[g] - detections.rotation_y[d]
    )
    turned = detections.rotation_y[d]
    cos, sin = np.cos(turned), np.sin(turned)
    center = np.stack([offset[:, 0] * cos - offset[:, 1] * sin, offset[:, 0] * sin + offset[:, 1] * cos], axis=1)
    half = np.abs(detections.dimensions[d][:, [2, 1]]) / 2
    area[near] = clipped_area(corners + center[:, None, :], half)
    return area


def rectangle_corners(centers: FloatArray, sizes: FloatArray, rotation_y: FloatArray) -> FloatArray:
    """Corners ``[n, 4, 2]`` (x, z) in ring order of boxes in bird's-eye view.

    Args:
        centers: ``[n, 2]`` (x, z).
        sizes: ``[n, 2]`` width and length.
        rotation_y: ``[n]`` radians.
    """
    along = sizes[:, 1:2] / 2 * np.array([1.0, 1.0, -1.0, -1.0])
    across = sizes[:, 0:1] / 2 * np.array([1.0, -1.0, -1.0, 1.0])
    cos, sin = np.cos(rotation_y)[:, None], np.sin(rotation_y)[:, None]
    x = centers[:, 0:1] + along * cos + across * sin
    z = centers[:, 1:2] - along * sin + across * cos
    return np.stack([x, z], axis=-1)


def clipped_area(polygons: FloatArray, half: FloatArray) -> FloatArray:
    """Area of convex polygons inside upright rectangles about the origin (Sutherland-Hodgman, in step).

    Args:
        polygons: ``[n, k, 2]`` in ring order; vertices may repeat.
        half: ``[n, 2]`` half the rectangles' extent in x and in y.

    Returns:
        ``[n]`` areas.
    """
    for axis in (0, 1):
        for sign in (1.0, -1.0):
            polygons = _clip(polygons, half[:, axis, None] - sign * polygons[:, :, axis])
    x, y = polygons[:, :, 0], polygons[:, :, 1]
    twice = x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y
    return np.asarray(np.abs(twice.sum(axis=1)) / 2)


def _clip(polygons: FloatArray, inside: FloatArray) -> FloatArray:
    """Cut convex polygons ``[n, k, 2]`` where ``inside`` ``[n, k]`` is negative; gives ``[n, k + 1, 2]``.

    Unused slots repeat the first vertex, which adds no area. A polygon that is wholly outside becomes a
    point.
    """
    count, slots, _ = polygons.shape
    following, inside_next = np.roll(polygons, -1, axis=1), np.roll(inside, -1, axis=1)
    kept = inside >= 0
    crossed = kept != (inside_next >= 0)
    share = np.divide(inside, inside - inside_next, out=np.zeros_like(inside), where=crossed)
    crossings = polygons + share[:, :, None] * (following - polygons)
    # After each vertex comes the crossing on the edge that leaves it.
    points = np.stack([polygons, crossings], axis=2).reshape(count, 2 * slots, 2)
    used = np.stack([kept, crossed], axis=2).reshape(count, 2 * slots)
    order = np.argsort(~used, axis=1, kind="stable")[:, : slots + 1]
    clipped = np.take_along_axis(points, order[:, :, None], axis=1)
    spare = ~np.take_along_axis(used, order, axis=1)
    return np.where(spare[:, :, None], clipped[:, :1], clipped)
