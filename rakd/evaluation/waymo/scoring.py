"""Average precision by Waymo's rules: the entry point, and what the two modes do differently."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rakd.data.waymo_convert import MANIFEST, read_manifest
from rakd.data.waymo_geometry import OPTICAL_AXES, to_optical
from rakd.errors import MissingFileError, UserError
from rakd.evaluation.overlaps import Indices
from rakd.evaluation.waymo import curves
from rakd.evaluation.waymo.folders import Axes, read_waymo_folders
from rakd.evaluation.waymo.matching import match
from rakd.evaluation.waymo.objects import LEVELS, TYPES, FrameKey, WaymoObjects, levels
from rakd.evaluation.waymo.overlaps import LET_CAMERA, WaymoPairs, find_pairs
from rakd.evaluation.waymo.wire import read_bin
from rakd.geometry import FloatArray
from rakd.progress import bar

Mode = Literal["official", "pct"]
MODES: tuple[Mode, ...] = ("official", "pct")

RANGES = {"0-30": (0.0, 30.0), "30-50": (30.0, 50.0), "50-inf": (50.0, np.inf)}
"""Distances of the centre from the origin in metres, lower end included."""

ALL = "all"

_OTHERS = ("PEDESTRIAN", "SIGN", "CYCLIST")
IOU: dict[str, dict[str, float]] = {
    "official": {"VEHICLE": 0.7, **dict.fromkeys(_OTHERS, 0.5)},
    "papers": {"VEHICLE": 0.5, **dict.fromkeys(_OTHERS, 0.3)},
}
"""Intersection over union that a pair needs, by type: the benchmark's, and the looser ones that papers add (and that
LET-3D-AP has)."""

_PCT_CUTOFFS = 11


@dataclass(frozen=True)
class WaymoRow:
    """One number of the table. Fields can be read as ``row.ap`` and as ``row["ap"]``.

    Attributes:
        type: "VEHICLE", "PEDESTRIAN", "SIGN" or "CYCLIST".
        range: "all", "0-30", "30-50" or "50-inf".
        level: 1 or 2.
        ap: Average precision, 0..1; with LET that of LET-3D-AP.
        aph: The same, weighted by the agreement of headings.
        apl: LET-3D-APL, weighted by the longitudinal affinity; None without LET.
        mode: "official" or "pct".
        iou: Overlap that a pair needs.
        let: Whether errors along the ray were tolerated.
        objects: Number of truths of the level.
    """

    type: str
    range: str
    level: int
    ap: float
    aph: float
    apl: float | None
    mode: Mode
    iou: float
    let: bool
    objects: int

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def evaluate(
    gt: Path | str,
    pred: Path | str,
    *,
    mode: Mode = "official",
    iou: float | str | Mapping[str, float] | None = None,
    let: bool = False,
    frames: Sequence[str] | None = None,
    progress: bool = True,
) -> list[WaymoRow]:
    """Score detections as the Waymo Open Dataset does, or as PCT, DEVIANT and MonoCoP do.

    ``official`` compares boxes in the vehicle frame, at the 101 score cut-offs of the devkit's tool.

    ``pct`` repeats the script of that line of papers: it hands rows of KITTI files (x right, y down, z forward,
    rotation about y) to a measure whose z is up. Its "height" so lies along the depth: for a car on the axis, 1.8 m
    high and 4.8 m long, it allows 0.32 m of error in depth at an overlap of 0.7, where ``official`` allows 0.85 m. It
    has 11 cut-offs at quantiles of the scores, and ranges from the camera. Numbers of the two modes do not compare.

    Args:
        gt: Folder of label files as ``rakd convert-waymo`` writes them (``training/label_2``; 16th column: lidar
            points), or a ``.bin`` file of the devkit.
        pred: Folder of result files with the same names, or a ``.bin`` file.
        mode: "official" or "pct".
        iou: Overlap that a pair needs: one number for all types, a mapping from type to number, "official" (0.7 for
            vehicles, 0.5 for others) or "papers" (0.5 and 0.3). None: "official", with LET "papers".
        let: Tolerate errors along the camera's ray (LET-3D-AP, of the camera-only challenge); mode official only. Of
            ``.bin`` truths the camera-synced boxes are taken; folders should hold them (``convert-waymo --boxes
            synced``).
        frames: Frames to evaluate ("000123", ...) instead of all in the folder ``gt``, for a split.
        progress: Show progress bars when it takes more than two seconds.

    Returns:
        A row for each type, range and level. Shards without truths have an AP of 0.

    Raises:
        MissingFileError: A file or folder is missing.
        UserError: An argument is out of range, the two inputs are not of one kind, a file is malformed, or in mode
            "official" a score is outside 0..1.

    Warns:
        UserWarning: In mode pct with ``.bin`` files, which do not say where the camera is: an untilted camera is taken.
    """
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if let and mode != "official":
        raise UserError("let must be False in mode pct: LET-3D-AP is defined in the vehicle frame")
    thresholds = _thresholds(iou if iou is not None else ("papers" if let else "official"))
    truth, predictions = _read(Path(gt), Path(pred), mode, let=let, frames=frames, progress=progress)
    predictions = _with_scores(predictions, mode, Path(pred))
    return evaluate_objects(truth, predictions, mode=mode, thresholds=thresholds, let=let, progress=progress)


def evaluate_objects(
    truth: WaymoObjects,
    predictions: WaymoObjects,
    *,
    mode: Mode,
    thresholds: Mapping[str, float],
    let: bool = False,
    progress: bool = False,
) -> list[WaymoRow]:
    """Score objects that are in memory, with boxes in the frame that the mode compares them in.

    Args:
        truth: The truths.
        predictions: The predictions, with scores in 0..1 of known types.
        mode: Says which cut-offs: "official" 101, "pct" 11 quantiles of all scores.
        thresholds: Overlap that a pair needs, of each of `rakd.evaluation.waymo.objects.TYPES`.
        let: Tolerate errors along the camera's ray.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        As `evaluate`.
    """
    cutoffs = curves.OFFICIAL_CUTOFFS
    if mode == "pct":
        cutoffs = curves.quantile_cutoffs(predictions.scores, _PCT_CUTOFFS)
    truth, predictions = _joined(truth, predictions)
    truth_levels = levels(truth)
    rows: list[WaymoRow] = []
    for name, number in bar(TYPES.items(), desc="matching", delay=2, disable=not progress):
        own = np.flatnonzero((truth.types == number) & (truth_levels > 0))
        shards = _Shards(
            truth.select(own),
            truth_levels[own],
            predictions.select(predictions.types == number),
            cutoffs,
            thresholds[name],
            let=let,
        )
        for range_name in (ALL, *RANGES):
            for level in LEVELS:
                counts, objects = shards.count(range_name, level)
                rows.append(
                    WaymoRow(
                        type=name,
                        range=range_name,
                        level=level,
                        ap=curves.average_precision(counts, counts.hits),
                        aph=curves.average_precision(counts, counts.heading),
                        apl=curves.average_precision(counts, counts.affinity) if let else None,
                        mode=mode,
                        iou=thresholds[name],
                        let=let,
                        objects=objects,
                    )
                )
    return rows


class _Shards:
    """One type's pairs and matches, of all ranges together and of each by itself."""

    def __init__(
        self,
        truth: WaymoObjects,
        truth_levels: npt.NDArray[np.int8],
        predictions: WaymoObjects,
        cutoffs: curves.Scores,
        threshold: float,
        *,
        let: bool,
    ) -> None:
        self.truth_levels = truth_levels
        self.in_no_label_zone = predictions.in_no_label_zone
        self.cutoffs = len(cutoffs)
        self.alive = curves.alive_at(predictions.scores, cutoffs)
        self.truth_range, self.prediction_range = _ranges(truth.boxes), _ranges(predictions.boxes)
        self.pairs = find_pairs(truth, predictions, threshold, let=let)
        # A truth and a prediction of different ranges are in different shards, where neither can match the other.
        same = self.truth_range[self.pairs.truth] == self.prediction_range[self.pairs.prediction]
        self.ranged = WaymoPairs(
            self.pairs.truth[same],
            self.pairs.prediction[same],
            self.pairs.weight[same],
            self.pairs.heading[same],
            self.pairs.affinity[same],
        )
        self.matches, self.ranged_matches = (
            match(pairs.truth, pairs.prediction, pairs.weight, self.alive[pairs.prediction])
            for pairs in (self.pairs, self.ranged)
        )

    def count(self, range_name: str, level: int) -> tuple[curves.Counts, int]:
        """Counts at all cut-offs, and the number of truths of the level."""
        pairs, matches, truth_levels, alive = self.pairs, self.matches, self.truth_levels, self.alive
        if range_name != ALL:
            number = list(RANGES).index(range_name)
            pairs = self.ranged
            here = self.truth_range[pairs.truth[self.ranged_matches.pair]] == number
            matches = replace(
                self.ranged_matches,
                pair=self.ranged_matches.pair[here],
                start=self.ranged_matches.start[here],
                stop=self.ranged_matches.stop[here],
            )
            truth_levels = np.where(self.truth_range == number, truth_levels, 0).astype(np.int8)
            alive = np.where(self.prediction_range == number, alive, 0)
        counts = curves.count(
            pairs,
            matches,
            truth_levels=truth_levels,
            level=level,
            alive=alive,
            in_no_label_zone=self.in_no_label_zone,
            cutoffs=self.cutoffs,
        )
        return counts, int(np.count_nonzero((truth_levels > 0) & (truth_levels <= level)))


def _ranges(boxes: FloatArray) -> Indices:
    """Number of the range that each box's centre lies in."""
    distance = np.sqrt((boxes[:, :3] ** 2).sum(axis=1))
    return np.asarray(np.searchsorted([low for low, _ in RANGES.values()], distance, side="right") - 1)


def _thresholds(iou: float | str | Mapping[str, float]) -> dict[str, float]:
    if isinstance(iou, str):
        if iou not in IOU:
            raise UserError(f"iou must be one of {', '.join(IOU)}, a number or a mapping, got {iou!r}")
        return IOU[iou]
    if isinstance(iou, Mapping):
        if set(iou) != set(TYPES):
            raise UserError(f"iou must have a number for each of {', '.join(TYPES)}, got {', '.join(map(str, iou))}")
        found = {name: float(iou[name]) for name in TYPES}
    else:
        found = dict.fromkeys(TYPES, float(iou))
    for name, value in found.items():
        if not 0 < value <= 1:
            raise UserError(f"iou must lie above 0 and not above 1, got {value:g} for {name}")
    return found


def _read(
    gt: Path, pred: Path, mode: Mode, *, let: bool, frames: Sequence[str] | None, progress: bool
) -> tuple[WaymoObjects, WaymoObjects]:
    for name, path in (("gt", gt), ("pred", pred)):
        if not path.exists():
            raise MissingFileError(f"{name}: {path} is not there: expected a folder of text files or a .bin file")
    if gt.is_dir() != pred.is_dir():
        raise UserError(f"gt and pred must both be folders or both .bin files, got {gt} and {pred}")
    if gt.is_dir():
        gt = Path(os.path.abspath(gt))  # noqa: PTH100 - calibrations lie beside it, and "." has no parent
        axes: Axes = "vehicle" if mode == "official" else "camera"
        manifest = gt.parent.parent / MANIFEST
        if let and manifest.is_file() and read_manifest(gt.parent.parent).get("boxes") != "synced":
            warnings.warn(
                f"{manifest}: these are lidar boxes; the challenge scores LET-3D-AP on camera-synced ones "
                "(convert-waymo --boxes synced)",
                stacklevel=3,
            )
        return read_waymo_folders(gt, pred, axes, frames=frames, progress=progress)
    if frames is not None:
        raise UserError("frames must be None for .bin files: they hold the frames that they hold")
    truth, predictions = read_bin(gt, synced=let), read_bin(pred)
    unknown = predictions.types == 0
    if unknown.any():
        raise UserError(f"{pred}: object {int(unknown.argmax()) + 1} has no type: every prediction needs one")
    if (truth.scores != 1).any():
        number = int((truth.scores != 1).argmax())
        raise UserError(
            f"{gt}: truths have no scores, object {number + 1} has {truth.scores[number]:g}: are GT and PRED in each "
            "other's place?"
        )
    if len(truth) and not truth.points.any():
        what = "camera-synced boxes with points of the top lidar" if let else "lidar points, without which none counts"
        raise UserError(f"{gt}: expected truths that have {what}, no object has")
    if len(truth) and len(predictions) and not set(truth.keys) & set(predictions.keys):
        raise UserError(
            "gt and pred must have frames in common, they have none: the devkit tells frames by segment, time and "
            f"camera, such as {truth.keys[0]} in {gt} and {predictions.keys[0]} in {pred}"
        )
    if mode == "pct":
        warnings.warn(
            "pct: .bin files do not say where the camera is: an untilted one at "
            f"({', '.join(f'{value:g}' for value in LET_CAMERA)}) of the vehicle is taken",
            stacklevel=3,
        )
        truth, predictions = _untilted(truth), _untilted(predictions)
    return truth, predictions


def _untilted(objects: WaymoObjects) -> WaymoObjects:
    """Boxes as the papers' script would have them of an untilted camera; difficulties come from points alone there."""
    transform = np.eye(4)
    transform[:3, :3] = OPTICAL_AXES
    transform[:3, 3] = -OPTICAL_AXES @ LET_CAMERA
    location, dimensions, rotation = to_optical(objects.boxes, transform)
    boxes = np.concatenate([location, dimensions[:, ::-1], rotation[:, None]], axis=1)
    return replace(objects, boxes=boxes.astype(np.float32).astype(np.float64), difficulty=0 * objects.difficulty)


def _with_scores(predictions: WaymoObjects, mode: Mode, path: Path) -> WaymoObjects:
    """Predictions with scores in 0..1: an error or, in mode pct, the papers' rescaling if they are not."""
    scores = predictions.scores
    if not len(scores):
        return predictions
    low, high = float(scores.min()), float(scores.max())
    if low >= 0 and high <= 1:
        return predictions
    if mode == "official":
        raise UserError(
            f"{path}: scores must lie in 0..1, they reach from {low:g} to {high:g}: the metric cuts at scores from 0 "
            "to 1, so that all above 1 would stay at every cut-off and the curve would shrink to a point. Rescale them "
            "all together, or use mode pct, which does so as the papers do, (score - lowest) / (highest - lowest)"
        )
    spread = high - low
    rescaled = (scores - np.float32(low)) / np.float32(spread) if spread > 0 else np.ones_like(scores)
    if not np.isfinite(rescaled).all():
        raise UserError(f"{path}: scores must be finite to be rescaled, they reach from {low:g} to {high:g}")
    return replace(predictions, scores=rescaled.astype(np.float32))


def _joined(truth: WaymoObjects, predictions: WaymoObjects) -> tuple[WaymoObjects, WaymoObjects]:
    """Both with the same list of frames, by frame."""
    keys: dict[FrameKey, int] = {}
    for objects in (truth, predictions):
        for key in objects.keys:
            keys.setdefault(key, len(keys))
    joined = []
    for objects in (truth, predictions):
        numbers = np.array([keys[key] for key in objects.keys], dtype=np.int64)
        frames = numbers[objects.frames] if len(objects) else objects.frames
        order = np.argsort(frames, kind="stable")
        joined.append(replace(objects, keys=list(keys), frames=frames).select(order))
    return joined[0], joined[1]
