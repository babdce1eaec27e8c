"""From matches to average precision: score thresholds, precision at them, and the averages."""

import numpy as np

from rakd.evaluation.matching import Counts
from rakd.geometry import FloatArray

POINTS = 41


def recall_thresholds(scores: FloatArray, objects: int) -> FloatArray:
    """Score thresholds at which recall comes nearest to 0, 1/40, 2/40, ...

    Args:
        scores: ``[m]`` scores of the true positives, in any order.
        objects: Number of objects to be found.

    Returns:
        At most 41 scores, descending. Equal scores give equal thresholds.
    """
    ordered = np.sort(scores)[::-1].tolist()
    kept = []
    recall = 0.0
    for i, score in enumerate(ordered):
        last = i == len(ordered) - 1
        left, right = (i + 1) / objects, (i + 2) / objects
        if not last and right - recall < recall - left:
            continue
        kept.append(score)
        recall += 1 / (POINTS - 1)
    return np.array(kept[:POINTS], dtype=np.float64)


def precision_curves(counts: Counts) -> tuple[FloatArray, FloatArray]:
    """Precision and orientation similarity at each of the 41 points.

    Each point is the best of all points from it on. A point without detections is NaN (0/0), but does not
    spread to the points before it.

    Returns:
        Two arrays ``[41]``; zero beyond the last threshold.
    """
    total = counts.true_positives + counts.false_positives
    curves = []
    for hits in (counts.true_positives, counts.similarity):
        points = np.zeros(POINTS)
        with np.errstate(invalid="ignore"):
            points[: len(total)] = hits / total
        best = np.fmax.accumulate(points[::-1])[::-1]
        curves.append(np.where(np.isnan(points), np.nan, best))
    return curves[0], curves[1]


def average_precision(curve: FloatArray, *, positions: int) -> float:
    """Average precision in percent over 40 recall positions (1/40, ..., 1) or 11 (0, 0.1, ..., 1)."""
    points = curve[1:] if positions == 40 else curve[::4]
    return float(100 * points.sum() / positions)
