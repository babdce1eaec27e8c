"""Absolute relative error (AbsRel) of the depth of found objects, and recall.

Average precision at strict IoU is 0 for a detector that is nearly right; AbsRel shows how near it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rakd.data.labels import Objects, concatenate
from rakd.evaluation.kitti import CLASSES, LEVELS, read_folders, truth_flags
from rakd.evaluation.matching import DROPPED, VALID
from rakd.evaluation.overlaps import Indices, find_pairs
from rakd.geometry import FloatArray

MIN_IOU = 0.5
"""Intersection over union of 2D boxes from which on a detection belongs to an object."""

SIZES = (0.0, 24.0, 34.0, 48.0, 68.0, 96.0, 136.0, math.inf)
"""Ends of the groups of objects by size, the root of the area of the 2D box in pixels: half a pyramid level each."""

ALL = "all"
_NO_PLACE = -1000.0
_HARDEST = len(LEVELS) - 1


@dataclass(frozen=True)
class DepthFigures:
    """AbsRel and recall.

    Attributes:
        abs_rel: Mean over the objects found of ``|z_predicted - z_labelled| / z_labelled``; NaN when none was found.
        recall: Share of the objects that were found, 0..1; NaN when there are none. AbsRel means little
            without it: a detector that finds only the easy objects has a small one.
        objects: Number of objects to be found.
    """

    abs_rel: float
    recall: float
    objects: int


def depth_errors(
    gt_dir: Path | str, pred_dir: Path | str, *, frames: Sequence[str] | None = None, progress: bool = True
) -> dict[str, DepthFigures]:
    """AbsRel of the depth of the objects found, and recall.

    Detections of a class choose objects in order of their score (file order on ties): each takes the free one
    that its 2D box overlaps most, if intersection over union is at least `MIN_IOU`. To be found are the
    objects that the official kit counts at level hard. Those that it ignores there (smaller, more occluded,
    Van for Car, Person_sitting for Pedestrian) can be taken too, which then counts neither way. Detections
    without a place (x or z of -1000) do not take part. Scores have no threshold: what should not count as found
    must not be in the files.

    Args:
        gt_dir: As in `rakd.evaluation.kitti.evaluate`, and so are the other arguments, the errors and the
            warnings.
        pred_dir: See there.
        frames: See there.
        progress: See there.

    Returns:
        Figures of Car, Pedestrian, Cyclist, and of all their objects together as "all".
    """
    found = find_depth_errors(*read_folders(gt_dir, pred_dir, frames=frames, progress=progress))
    return found.figures()


@dataclass(frozen=True, eq=False)
class DepthErrors:
    """Relative depth errors of the objects found, and the objects to be found, of each class.

    Attributes:
        errors: By class: ``[n]``, in the order of the scores that found them.
        frames: By class: ``[n]``, the frame of each.
        objects: By class: ``[F]``, how many are to be found in each frame.
        found_sizes: By class: ``[n]``, roots of the areas of the 2D boxes, pixels.
        sizes: By class: the same of all objects to be found.
    """

    errors: dict[str, FloatArray]
    frames: dict[str, Indices]
    objects: dict[str, Indices]
    found_sizes: dict[str, FloatArray]
    sizes: dict[str, FloatArray]

    def figures(self, times: Indices | None = None) -> dict[str, DepthFigures]:
        """Figures of each class and of "all".

        Args:
            times: ``[F]`` how often each frame counts; None: once.
        """
        sums = np.zeros(3)
        result = {}
        for name in CLASSES:
            errors, found, objects = self.errors[name], np.ones(len(self.errors[name])), self.objects[name]
            if times is not None:
                found, objects = times[self.frames[name]].astype(float), objects * times
            own = np.array([(errors * found).sum(), found.sum(), objects.sum()])
            result[name] = _figures(own)
            sums += own
        result[ALL] = _figures(sums)
        return result

    def by_size(self) -> tuple[DepthFigures, ...]:
        """Figures of the objects of all classes in each group of `SIZES`."""
        errors, found, all_ = (
            np.concatenate([of[name] for name in CLASSES]) for of in (self.errors, self.found_sizes, self.sizes)
        )
        group, groups = np.digitize(found, SIZES[1:]), len(SIZES) - 1
        error, count = np.bincount(group, errors, groups), np.bincount(group, minlength=groups)
        objects = np.bincount(np.digitize(all_, SIZES[1:]), minlength=groups)
        return tuple(_figures(sums) for sums in np.stack([error, count, objects], axis=1))


def find_depth_errors(truths: Sequence[Objects], detections: Sequence[Objects]) -> DepthErrors:
    """Match detections and labels, given frame by frame, as `depth_errors` says."""
    truth, detection = concatenate(list(truths)), concatenate(list(detections))
    truth_frames = np.repeat(np.arange(len(truths)), [len(objects) for objects in truths])
    detection_frames = np.repeat(np.arange(len(detections)), [len(objects) for objects in detections])
    placed = (detection.location[:, [0, 2]] != _NO_PLACE).all(axis=1)
    found = DepthErrors({}, {}, {}, {}, {})
    sizes = np.sqrt(np.prod((truth.boxes[:, 2:] - truth.boxes[:, :2]).clip(min=0), axis=1))
    for name in CLASSES:
        flags = truth_flags(truth, name, _HARDEST)
        # Relative to a depth that is not positive, nothing can be said.
        flags[truth.location[:, 2] <= 0] = DROPPED
        rows, own = np.flatnonzero(flags != DROPPED), np.flatnonzero(detection.is_type(name) & placed)
        found.errors[name], objects = _errors(
            *(truth.select(rows), truth_frames[rows], flags[rows] == VALID),
            *(detection.select(own), detection_frames[own]),
        )
        found.frames[name] = truth_frames[rows][objects]
        found.objects[name] = np.bincount(truth_frames[flags == VALID], minlength=len(truths))
        found.found_sizes[name], found.sizes[name] = sizes[rows][objects], sizes[flags == VALID]
    return found


def _errors(
    truth: Objects,
    truth_frames: npt.NDArray[np.int64],
    valid: npt.NDArray[np.bool_],
    detections: Objects,
    detection_frames: npt.NDArray[np.int64],
) -> tuple[FloatArray, list[int]]:
    """Relative errors of the valid objects found, in the order of the scores that found them, and the objects."""
    pairs = find_pairs(truth, truth_frames, detections, detection_frames, 0.0, over="union")
    overlap = pairs.overlap["bbox"]
    if detections.scores is None:
        raise AssertionError("read_results gives scores")
    # By score, then detection in file order; each detection's objects by overlap, then in file order.
    order = np.lexsort((pairs.truth, -overlap, pairs.detection, -detections.scores[pairs.detection]))
    order = order[overlap[order] >= MIN_IOU]
    found: list[int] = []
    meant: list[int] = []
    taken, spent = set(), set()
    for g, d in zip(pairs.truth[order].tolist(), pairs.detection[order].tolist(), strict=True):
        if g in taken or d in spent:
            continue
        taken.add(g)
        spent.add(d)
        if valid[g]:
            found.append(g)
            meant.append(d)
    depth = truth.location[found, 2]
    return np.asarray(np.abs(detections.location[meant, 2] - depth) / depth), found


def _figures(sums: FloatArray) -> DepthFigures:
    """Figures from the sum of the errors, the number of objects found, and the number of objects to be found."""
    error, found, objects = sums.tolist()
    return DepthFigures(
        abs_rel=error / found if found else math.nan,
        recall=found / objects if objects else math.nan,
        objects=int(objects),
    )
