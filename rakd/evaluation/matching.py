"""Assigning detections to objects, as the official kit does, for all frames and thresholds in step.

The kit walks over a frame's objects in file order and gives each the best detection that is still free. Two
facts let whole arrays take that walk: frames do not touch each other, so the first objects of all frames can
choose at once, then the second ones, and so on; and an object's order of preference does not depend on the
score threshold, so at each threshold it takes the first one in that order that is free and scores enough.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rakd.evaluation.overlaps import Indices
from rakd.geometry import FloatArray

VALID, IGNORED, DROPPED = 0, 1, -1
"""Flags of objects and detections. A detection that is IGNORED is one below the least height ("small")."""

_LOWEST_SCORE = -1e7

Flags = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Problem:
    """The objects, detections and overlaps of one class, level and metric, over all frames.

    Attributes:
        truth_flags: ``[G]`` ``VALID``, ``IGNORED`` or ``DROPPED``.
        truth_frames: ``[G]`` frame of each object, ascending.
        detection_flags: ``[D]``.
        scores: ``[D]``.
        in_dontcare: ``[D]`` whether the detection lies in a DontCare region.
        truth: ``[n]`` object of each pair that overlaps enough.
        detection: ``[n]`` detection of each pair.
        overlap: ``[n]``.
        similarity: ``[n]`` agreement in orientation, 0..1.
    """

    truth_flags: Flags
    truth_frames: Indices
    detection_flags: Flags
    scores: FloatArray
    in_dontcare: npt.NDArray[np.bool_]
    truth: Indices
    detection: Indices
    overlap: FloatArray
    similarity: FloatArray

    def candidates(self) -> Indices:
        """Numbers of the pairs whose object and detection both take part."""
        truth_kept = self.truth_flags[self.truth] != DROPPED
        detection_kept = self.detection_flags[self.detection] != DROPPED
        return np.flatnonzero(truth_kept & detection_kept)


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts at each threshold, over all frames.

    Attributes:
        true_positives: ``[T]``.
        false_positives: ``[T]``.
        similarity: ``[T]`` sum over the true positives of their agreement in orientation.
    """

    true_positives: FloatArray
    false_positives: FloatArray
    similarity: FloatArray


def collect_scores(problem: Problem) -> FloatArray:
    """Scores of the true positives when every object takes the highest-scoring detection that it can."""
    pairs = problem.candidates()
    pairs = pairs[problem.scores[problem.detection[pairs]] > _LOWEST_SCORE]
    detection = problem.detection[pairs]
    order = np.lexsort((detection, -problem.scores[detection], problem.truth[pairs]))
    chosen = _choose(problem, pairs[order], np.array([-np.inf]))
    hits = chosen[:, 0][chosen[:, 0] >= 0]
    return problem.scores[problem.detection[hits[_counted(problem, hits)]]]


def count(problem: Problem, thresholds: FloatArray) -> Counts:
    """True and false positives when only detections that score at least a threshold take part.

    Args:
        problem: Detections and objects to match.
        thresholds: ``[T]``.
    """
    pairs = problem.candidates()
    detection = problem.detection[pairs]
    small = problem.detection_flags[detection] == IGNORED
    # Valid detections by overlap, which is positive; after them small ones, in file order.
    preference = np.where(small, 0.0, -problem.overlap[pairs])
    order = np.lexsort((detection, preference, problem.truth[pairs]))
    chosen = _choose(problem, pairs[order], thresholds)
    # Detections that would be false positives if no object took them.
    loose = (problem.detection_flags == VALID) & ~problem.in_dontcare
    loose_scores = np.sort(problem.scores[loose])
    false_positives = len(loose_scores) - np.searchsorted(loose_scores, thresholds, side="left").astype(float)
    true_positives, similarity = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for column in range(len(thresholds)):
        taken = chosen[:, column][chosen[:, column] >= 0]
        hits = taken[_counted(problem, taken)]
        true_positives[column] = len(hits)
        similarity[column] = problem.similarity[hits].sum()
        false_positives[column] -= np.count_nonzero(loose[problem.detection[taken]])
    return Counts(true_positives, false_positives, similarity)


def _counted(problem: Problem, pairs: Indices) -> npt.NDArray[np.bool_]:
    """Mask of the assigned pairs that are true positives: object and detection both valid."""
    valid_truth = problem.truth_flags[problem.truth[pairs]] == VALID
    return np.asarray(valid_truth & (problem.detection_flags[problem.detection[pairs]] == VALID))


def _choose(problem: Problem, pairs: Indices, thresholds: FloatArray) -> Indices:
    """Let every object take the first free detection of its list.

    Args:
        problem: Detections and objects to match.
        pairs: ``[n]`` pairs by object, each object's in its order of preference.
        thresholds: ``[T]``.

    Returns:
        ``[objects that have pairs, T]`` the pair taken, or -1.
    """
    objects, first, lengths = np.unique(problem.truth[pairs], return_index=True, return_counts=True)
    detections, local = np.unique(problem.detection[pairs], return_inverse=True)
    free = problem.scores[detections][:, None] >= thresholds
    chosen = np.full((len(objects), len(thresholds)), -1, dtype=np.int64)
    # Turn of each object: how many objects with pairs stand before it in its frame.
    frames = problem.truth_frames[objects]
    turns = np.arange(len(objects)) - np.searchsorted(frames, frames, side="left")
    for turn in range(int(turns.max(initial=-1)) + 1):
        group = np.flatnonzero(turns == turn)
        undecided = np.ones((len(group), len(thresholds)), dtype=np.bool_)
        for place in range(int(lengths[group].max())):
            active = np.flatnonzero(lengths[group] > place)
            entry = first[group[active]] + place
            takes = undecided[active] & free[local[entry]]
            free[local[entry]] &= ~takes
            undecided[active] &= ~takes
            rows = group[active]
            chosen[rows] = np.where(takes, pairs[entry][:, None], chosen[rows])
    return chosen
