"""From matches to average precision: score cut-offs, counts at each, and the area under precision over recall."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rakd.evaluation.overlaps import Indices
from rakd.evaluation.waymo.matching import Matches
from rakd.evaluation.waymo.overlaps import WaymoPairs
from rakd.geometry import FloatArray

Scores = npt.NDArray[np.float32]

OFFICIAL_CUTOFFS: Scores = np.array([0.01 * i for i in range(100)] + [1.0], dtype=np.float32)
"""The 101 score cut-offs of the devkit's command-line tool."""

# Of metrics.proto: the largest step in recall that is integrated in one piece.
_MAX_STEP = np.float32(0.05)
_ROUNDING = np.float32(1e-6)


@dataclass(frozen=True, eq=False)
class Counts:
    """Sums over all frames at each of ``c`` cut-offs.

    Attributes:
        hits: ``[c]`` matched predictions.
        heading: ``[c]`` sum of their agreement in heading.
        affinity: ``[c]`` sum of their longitudinal affinity.
        false: ``[c]`` false positives.
        missed: ``[c]`` truths of the level that are not matched.
    """

    hits: FloatArray
    heading: FloatArray
    affinity: FloatArray
    false: FloatArray
    missed: FloatArray


def quantile_cutoffs(scores: Scores, count: int) -> Scores:
    """Cut-offs that the devkit takes from the scores where none are given: equally many predictions between them.

    Args:
        scores: ``[D]`` of all predictions of all types, in any order.
        count: Number of cut-offs.

    Returns:
        ``[count]``, ascending for scores in 0..1: the lowest score, quantiles held within 0..1, and 1. With at most
        ``count`` scores: 0, 1 / (count - 1), ..., 1.
    """
    if len(scores) <= count:
        return np.linspace(0, 1, count).astype(np.float32)
    ordered = np.sort(scores)
    sizes, left = [], len(ordered)
    for i in range(count - 1):
        sizes.append(left // (count - 1 - i))
        left -= sizes[-1]
    inner = np.clip(ordered[np.cumsum(sizes[:-1])], 0, 1)
    return np.concatenate([ordered[:1], inner, [1]]).astype(np.float32)


def alive_at(scores: Scores, cutoffs: Scores) -> Indices:
    """Number of cut-offs, from the lowest on, that leave a prediction with each score."""
    return np.asarray(np.searchsorted(cutoffs, scores, side="right"), dtype=np.int64)


def count(
    pairs: WaymoPairs,
    matches: Matches,
    *,
    truth_levels: npt.NDArray[np.int8],
    level: int,
    alive: Indices,
    in_no_label_zone: npt.NDArray[np.bool_],
    cutoffs: int,
) -> Counts:
    """Count at each cut-off.

    A match counts whatever the level of its truth, so that LEVEL_1 also credits found LEVEL_2 objects.

    Args:
        pairs: Of the shard.
        matches: Of those pairs.
        truth_levels: ``[G]`` levels of the truths, those outside the shard 0.
        level: 1 or 2.
        alive: ``[D]`` how many cut-offs leave each prediction, those outside the shard 0.
        in_no_label_zone: ``[D]``.
        cutoffs: Number of cut-offs.
    """
    free = ~in_no_label_zone
    matched_free = free[pairs.prediction[matches.pair]].astype(np.float64)
    matched_truth = (truth_levels[pairs.truth[matches.pair]] <= level).astype(np.float64)

    def at_cutoffs(values: FloatArray) -> FloatArray:
        change = np.bincount(matches.start, values, cutoffs + 1) - np.bincount(matches.stop, values, cutoffs + 1)
        return np.cumsum(change)[:-1]

    left = np.cumsum(np.bincount(alive[free], minlength=cutoffs + 1)[::-1])[::-1][1:]
    hits = at_cutoffs(np.ones(len(matches.pair)))
    wanted = np.count_nonzero((truth_levels > 0) & (truth_levels <= level))
    return Counts(
        hits=hits,
        heading=at_cutoffs(pairs.heading[matches.pair]),
        affinity=at_cutoffs(pairs.affinity[matches.pair]),
        false=left - at_cutoffs(matched_free),
        missed=wanted - at_cutoffs(matched_truth),
    )


def average_precision(counts: Counts, hits: FloatArray) -> float:
    """Area under precision over recall, 0..1.

    Args:
        counts: Counts at each cut-off.
        hits: ``[c]`` numerator of the precision: ``counts.hits``, or a weighted sum of the hits. The recall has the
            hits themselves.

    Returns:
        The devkit's integral, computed in single precision as there.
    """
    predicted, wanted = counts.hits + counts.false, counts.hits + counts.missed
    precision, recall = (
        np.divide(a.astype(np.float32), b.astype(np.float32), out=np.zeros(len(a), np.float32), where=b > 0)
        for a, b in ((hits, predicted), (counts.hits, wanted))
    )
    best: dict[np.float32, np.float32] = {np.float32(0): np.float32(1)}
    for p, r in zip(precision, recall, strict=True):
        best[r] = max(best.get(r, np.float32(0)), p)
    points: list[tuple[np.float32, np.float32]] = []
    highest, last = np.float32(0), np.float32(0)
    for r in sorted(best, reverse=True):
        while last - r > _MAX_STEP + _ROUNDING:
            last -= _MAX_STEP
            points.append((highest, last))
        highest = max(highest, best[r])
        points.append((highest, r))
        last = r
    if len(points) > 1:
        # Precision 1 at recall 0 is made up: the point takes its neighbour's.
        points[-1] = (points[-2][0], points[-1][1])
    area = np.float32(0)
    for (p1, r1), (p2, r2) in pairwise(points):
        area = np.float32(float(area) + 0.5 * float(r1 - r2) * float(p1 + p2))
    return min(float(area), 1.0)  # rounding may leave a little more
