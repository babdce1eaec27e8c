"""Evaluation of KITTI results by the official rules: 2D boxes, orientation, bird's-eye view, 3D boxes."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from rakd.data.frames import is_frame_name
from rakd.data.labels import CLASSES as CLASSES
from rakd.data.labels import Objects, concatenate, read_labels, read_results
from rakd.errors import MissingFileError, NotAFolderError, UserError
from rakd.evaluation import curves, matching
from rakd.evaluation.matching import DROPPED, IGNORED, VALID, Problem
from rakd.evaluation.overlaps import METRICS, Indices, Pairs, find_pairs
from rakd.progress import bar

LEVELS = ("easy", "moderate", "hard")

Overlaps = Literal["official", "loose"]

_STRICT = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
_LOOSE = {"Car": 0.5, "Pedestrian": 0.25, "Cyclist": 0.25}
LIMITS: dict[Overlaps, dict[str, dict[str, float]]] = {
    "official": {"bbox": _STRICT, "bev": _STRICT, "3d": _STRICT},
    "loose": {"bbox": _STRICT, "bev": _LOOSE, "3d": _LOOSE},
}
"""Overlap that a detection must exceed, ``LIMITS[overlaps][metric][class]``.

"official" is what the benchmark ranks by; "loose" is the second table of the kit's descendants, in which only
bird's-eye view and 3D loosen. Monocular papers report both.
"""

# Types that resemble a class: finding them is neither right nor wrong.
_NEIGHBOURS = {"Car": ("Van",), "Pedestrian": ("Person_sitting",), "Cyclist": ()}
# Per level: least height in pixels, most occlusion, most truncation.
DIFFICULTIES = ((40.0, 0, 0.15), (25.0, 1, 0.3), (25.0, 2, 0.5))

_NO_PLACE = -1000.0
_NO_ANGLE = -10.0
_BAR_DELAY = 2.0  # seconds before a progress bar shows


class MetricResult(TypedDict):
    """Figures of one class in one metric, each for easy, moderate and hard.

    Attributes:
        evaluated: False when the detections lack what the metric needs; the figures are then 0.
        R40: Average precision in percent over 40 recall positions.
        R11: The same over 11 positions, as before October 2019.
        precision: The 41 points of each curve (for "aos", of orientation similarity).
        objects: Number of objects to be found.
    """

    evaluated: bool
    R40: list[float]
    R11: list[float]
    precision: list[list[float]]
    objects: list[int]


Result = dict[str, dict[str, MetricResult]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """All rows of all frames, and the pairs that may matter.

    Attributes:
        truth: Labels, by frame.
        truth_frames: ``[G]`` frame of each, ascending.
        detections: Detections, by frame.
        detection_frames: ``[D]`` frame of each, ascending.
        pairs: Labels and detections of a frame that overlap.
        regions: DontCare regions, as labels, and the detections in them.
        limits: ``[metric][class]``, see `LIMITS`.
    """

    truth: Objects
    truth_frames: Indices
    detections: Objects
    detection_frames: Indices
    pairs: Pairs
    regions: Pairs
    limits: dict[str, dict[str, float]]


def evaluate(
    gt_dir: Path | str,
    pred_dir: Path | str,
    *,
    frames: Sequence[str] | None = None,
    overlaps: Overlaps = "official",
    progress: bool = True,
) -> Result:
    """Score detections exactly as the official KITTI development kit does (40 recall positions and 11).

    Args:
        gt_dir: Folder of label files ``NNNNNN.txt``. Every one of them is a frame to evaluate.
        pred_dir: Folder of result files with the same names; one for every frame, if only an empty one.
        frames: Frames to evaluate ("000123", ...) instead of all in ``gt_dir``, for a split.
        overlaps: IoU that a detection must exceed: "official" (Car 0.7, others 0.5), or "loose"
            (Car 0.5, others 0.25 in "bev" and "3d"; "bbox" and "aos" stay), which tells small or early
            models apart that the official limits all give 0. Everything else is the same.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        ``result[class][metric]`` for Car, Pedestrian, Cyclist and "bbox", "aos", "bev", "3d": a
        `MetricResult`, such as ``result["Car"]["3d"]["R40"] -> [easy, moderate, hard]`` in percent. A
        precision without any detections (0/0) makes its average NaN, as in the kit.

    Raises:
        MissingFileError: A folder or a frame's file is missing.
        NotAFolderError: ``gt_dir`` or ``pred_dir`` is not a folder.
        UserError: ``gt_dir`` holds no frames; or a row does not parse, holds NaN, or has exactly one of width and
            length not positive: names file and line.
        ValueError: ``overlaps`` is neither.

    Warns:
        UserWarning: Once for each result file with rows that lack a score; they are skipped. Once for each class of
            which objects count, but no detection.
    """
    if overlaps not in LIMITS:
        raise ValueError(f"overlaps must be one of {', '.join(LIMITS)}, got {overlaps!r}")
    truths, detections = read_folders(gt_dir, pred_dir, frames=frames, progress=progress)
    data = prepare(truths, detections, LIMITS[overlaps])
    check_heights(data, pred_dir, stacklevel=3)
    return evaluate_prepared(data, progress=progress)


def evaluate_prepared(data: Prepared, *, progress: bool = True) -> Result:
    """The part of `evaluate` behind reading."""
    result: Result = {}
    steps = [(name, metric) for name in CLASSES for metric in METRICS]
    for name, metric in bar(steps, desc="matching", delay=_BAR_DELAY, disable=not progress):
        result.setdefault(name, {}).update(evaluate_metric(data, name, metric))
    return {name: {metric: result[name][metric] for metric in ("bbox", "aos", "bev", "3d")} for name in CLASSES}


def read_folders(
    gt_dir: Path | str, pred_dir: Path | str, *, frames: Sequence[str] | None = None, progress: bool = True
) -> tuple[list[Objects], list[Objects]]:
    """Labels and detections of the frames to evaluate, frame by frame.

    Args:
        gt_dir: As in `evaluate`, and so are the other arguments, the errors and the warnings.
        pred_dir: See there.
        frames: See there.
        progress: See there.
    """
    names = _frame_names(Path(gt_dir), Path(pred_dir), frames)
    truths, detections = [], []
    for name in bar(names, desc="reading", unit="frame", delay=_BAR_DELAY, disable=not progress):
        truths.append(read_labels(Path(gt_dir) / name))
        detections.append(read_results(Path(pred_dir) / name))
    return truths, detections


def _frame_names(gt_dir: Path, pred_dir: Path, frames: Sequence[str] | None) -> list[str]:
    """File names of the frames to evaluate, after checking that all are there."""
    for argument, folder in (("gt_dir", gt_dir), ("pred_dir", pred_dir)):
        if not folder.exists():
            raise MissingFileError(f"{argument}: {folder} is not there")
        if not folder.is_dir():
            raise NotAFolderError(f"{argument}: {folder} is not a folder")
    if frames is None:
        names = sorted(path.name for path in gt_dir.iterdir() if path.suffix == ".txt" and is_frame_name(path.stem))
        if not names:
            raise UserError(f"gt_dir: {gt_dir} holds no label files NNNNNN.txt")
    else:
        names = [f"{frame}.txt" for frame in frames]
        if not names:
            raise ValueError("frames must list at least one frame, got none")
        for twice in (frame for frame, count in Counter(frames).items() if count > 1):
            raise ValueError(f"frames must list each frame once, {twice} stands there several times")
    for argument, folder in (("gt_dir", gt_dir), ("pred_dir", pred_dir)):
        there = {path.name for path in folder.iterdir()}
        missing = [name for name in names if name not in there]
        if missing:
            raise MissingFileError(
                f"{argument}: {folder / missing[0]} is not there ({len(missing)} of {len(names)} frames lack "
                "a file; a frame without objects needs an empty one)"
            )
    return names


def prepare(truths: list[Objects], detections: list[Objects], limits: dict[str, dict[str, float]]) -> Prepared:
    """Find the pairs of labels and detections that may matter, in the frames that `read_folders` gave."""
    truth, detection = concatenate(truths), concatenate(detections)
    truth_frames = np.repeat(np.arange(len(truths)), [len(objects) for objects in truths])
    detection_frames = np.repeat(np.arange(len(detections)), [len(objects) for objects in detections])
    least = min(limit for by_class in limits.values() for limit in by_class.values())
    rows = np.flatnonzero(truth.is_type(*CLASSES, *(name for names in _NEIGHBOURS.values() for name in names)))
    # Indices into the rows that can matter are turned back into indices of all rows.
    found = find_pairs(truth.select(rows), truth_frames[rows], detection, detection_frames, least, over="union")
    pairs = Pairs(rows[found.truth], found.detection, found.overlap)
    rows = np.flatnonzero(truth.is_type("DontCare"))
    found = find_pairs(truth.select(rows), truth_frames[rows], detection, detection_frames, least, over="detection")
    regions = Pairs(rows[found.truth], found.detection, found.overlap)
    return Prepared(truth, truth_frames, detection, detection_frames, pairs, regions, limits)


def evaluate_metric(data: Prepared, name: str, metric: str) -> dict[str, MetricResult]:
    """Figures of one class in one metric; "bbox" brings "aos" along, which uses its matches."""
    own = data.detections.select(data.detections.is_type(name))
    is_evaluated = _has_data(own, metric)
    results = {metric: _empty_result(is_evaluated)}
    if metric == "bbox":
        # One row of any class without an angle leaves all classes without orientation.
        has_angles = bool((data.detections.alpha != _NO_ANGLE).all())
        results["aos"] = _empty_result(is_evaluated and has_angles)
    for level in range(len(LEVELS)):
        problem = _problem(data, name, metric, level)
        objects = int(np.count_nonzero(problem.truth_flags == VALID))
        points = (np.zeros(curves.POINTS), np.zeros(curves.POINTS))
        if is_evaluated and objects:
            thresholds = curves.recall_thresholds(matching.collect_scores(problem), objects)
            points = curves.precision_curves(matching.count(problem, thresholds))
        for result, curve in zip(results.values(), points, strict=False):
            curve = curve if result["evaluated"] else np.zeros(curves.POINTS)
            result["R40"].append(curves.average_precision(curve, positions=40))
            result["R11"].append(curves.average_precision(curve, positions=11))
            result["precision"].append(curve.tolist())
            result["objects"].append(objects)
    return results


def check_heights(data: Prepared, pred_dir: Path | str, *, stacklevel: int = 2) -> None:
    """Say when objects count, but all detections of their class are too low in the image to count.

    Results of 3D boxes alone, whose 2D boxes are -1, would score 0 without a word.
    """
    least = DIFFICULTIES[-1][0]
    heights = np.abs(data.detections.boxes[:, 3] - data.detections.boxes[:, 1])
    for name in CLASSES:
        own = heights[data.detections.is_type(name)]
        if len(own) and (own < least).all() and (truth_flags(data.truth, name, len(LEVELS) - 1) == VALID).any():
            warnings.warn(
                f"{pred_dir}: none of the {len(own)} detections of {name} counts, in 2D or 3D: the official rule "
                f"wants 2D boxes {least:g} pixels high or more, the highest is {own.max():g}",
                stacklevel=stacklevel,
            )


def _has_data(detections: Objects, metric: str) -> bool:
    """Whether some detection of the class has what the metric needs."""
    height, width, length = detections.dimensions.T
    x, y, z = detections.location.T
    from_above = (x != _NO_PLACE) & (z != _NO_PLACE) & (width > 0) & (length > 0)
    if metric == "bbox":
        return bool((detections.boxes[:, 0] >= 0).any())
    if metric == "bev":
        return bool(from_above.any())
    return bool((from_above & (y != _NO_PLACE) & (height > 0)).any())


def _empty_result(evaluated: bool) -> MetricResult:
    return MetricResult(evaluated=evaluated, R40=[], R11=[], precision=[], objects=[])


def _problem(data: Prepared, name: str, metric: str, level: int) -> Problem:
    """Detections and objects to match for one class, metric and level."""
    limit = data.limits[metric][name]
    pairs, regions = data.pairs, data.regions
    near = pairs.overlap[metric] > limit
    truth, detection = pairs.truth[near], pairs.detection[near]
    turned = data.truth.alpha[truth] - data.detections.alpha[detection]
    in_dontcare = np.zeros(len(data.detections), dtype=np.bool_)
    in_dontcare[regions.detection[regions.overlap[metric] > limit]] = True
    scores = data.detections.scores
    if scores is None:
        raise AssertionError("read_results gives scores")
    return Problem(
        truth_flags=truth_flags(data.truth, name, level),
        truth_frames=data.truth_frames,
        detection_flags=_detection_flags(data.detections, name, level),
        scores=scores,
        in_dontcare=in_dontcare,
        truth=truth,
        detection=detection,
        overlap=pairs.overlap[metric][near],
        similarity=(1 + np.cos(turned)) / 2,
    )


def truth_flags(truth: Objects, name: str, level: int) -> npt.NDArray[np.int8]:
    """Flag of each labelled object for a class: valid, ignored or dropped, see `rakd.evaluation.matching`.

    Args:
        truth: ``[G]`` labels.
        name: The class.
        level: 0 easy, 1 moderate, 2 hard.
    """
    least_height, most_occlusion, most_truncation = DIFFICULTIES[level]
    is_class = truth.is_type(name)
    height = truth.boxes[:, 3] - truth.boxes[:, 1]
    clear = (truth.occlusion <= most_occlusion) & (truth.truncation <= most_truncation)
    flags = np.full(len(truth), DROPPED, dtype=np.int8)
    flags[is_class | truth.is_type(*_NEIGHBOURS[name])] = IGNORED
    flags[is_class & clear & (height > least_height)] = VALID
    return flags


def _detection_flags(detections: Objects, name: str, level: int) -> npt.NDArray[np.int8]:
    flags = np.full(len(detections), DROPPED, dtype=np.int8)
    flags[detections.is_type(name)] = VALID
    # Small ones of any type: the kit looks at the height first.
    flags[np.abs(detections.boxes[:, 1] - detections.boxes[:, 3]) < DIFFICULTIES[level][0]] = IGNORED
    return flags
