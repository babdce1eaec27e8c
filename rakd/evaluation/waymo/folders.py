"""Folders of label and result files in KITTI's form, as Waymo's metric wants them.

Labels have two columns more than KITTI's: 16 the number of lidar points, 17 (which may be missing) the difficulty that
an annotator gave. ``rakd convert-waymo`` writes such labels, and other converters' have the 16th column too. The
transform from the vehicle frame, ``Tr_velo_to_cam`` in ``../calib/NNNNNN.txt`` beside the labels, takes boxes back.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from rakd.data.frames import is_frame_name
from rakd.data.labels import Objects
from rakd.data.waymo_geometry import check_optical, check_rigid, to_vehicle
from rakd.errors import MissingFileError, UserError
from rakd.evaluation.kitti import read_folders
from rakd.evaluation.waymo.objects import KITTI_TYPES, TYPES, FrameKey, WaymoObjects
from rakd.files import read_text
from rakd.geometry import FloatArray

Axes = Literal["vehicle", "camera"]

_POINTS, _DIFFICULTY = 15, 16  # columns


def read_waymo_folders(
    gt_dir: Path, pred_dir: Path, axes: Axes, *, frames: Sequence[str] | None = None, progress: bool = True
) -> tuple[WaymoObjects, WaymoObjects]:
    """Truths and predictions of folders of label and result files.

    Args:
        gt_dir: Folder of labels ``NNNNNN.txt`` with the number of lidar points in column 16. DontCare rows are skipped.
        pred_dir: Folder of result files, one for each frame.
        axes: "vehicle" takes boxes to the vehicle frame, by the calibrations beside ``gt_dir``. "camera" takes each row
            as PCT does: the camera's (x, y, z) of the bottom centre as if z were up, in single precision, without the
            annotated difficulty of column 17.
        frames: Frames to read instead of all in ``gt_dir``.
        progress: Show a progress bar when it takes more than two seconds.

    Raises:
        MissingFileError: A folder or a frame's file is missing.
        UserError: A row does not parse, has a type that Waymo has not, or lacks a 3D box or the number of points; or
            a calibration is no Waymo one. Names the file.
    """
    _check_results(pred_dir)
    labels, results = read_folders(gt_dir, pred_dir, frames=frames, progress=progress)
    names = sorted(path.stem for path in label_files(gt_dir)) if frames is None else list(frames)
    transforms = _Transforms(gt_dir.parent / "calib")
    truth, predictions = ObjectColumns(), ObjectColumns()
    regions = sum(int(label.is_type("DontCare").sum()) for label in labels)
    if regions:
        warnings.warn(
            f"{gt_dir}: {regions} objects with few lidar points are DontCare regions, as for training: they are "
            "missing here, and detections of them count as false; convert with --min-points 0 0 to score these frames",
            stacklevel=2,
        )
    for name, label, result in zip(names, labels, results, strict=True):
        points, difficulty = _read_counts(gt_dir / f"{name}.txt")
        named = label.types != "DontCare"
        if axes == "camera":
            named &= (label.boxes[:, 2] > label.boxes[:, 0]) & (label.boxes[:, 3] > label.boxes[:, 1])
            difficulty = 0 * difficulty  # PCT's come from points alone
        transform = transforms.read(name) if axes == "vehicle" else None
        path = gt_dir / f"{name}.txt"
        truth.add(path, label.select(named), transform, points[named], difficulty[named])
        predictions.add(pred_dir / f"{name}.txt", result, transform)
    keys: list[FrameKey] = [(name, 0, 0) for name in names]
    return truth.objects(keys), predictions.objects(keys)


def label_files(folder: Path) -> list[Path]:
    """Label or result files of a folder, those named by a number, sorted."""
    return sorted(path for path in folder.glob("*.txt") if is_frame_name(path.stem))


def read_transform(path: Path) -> FloatArray:
    """Read the transform ``[4, 4]`` from the vehicle to the optical frame, a file's ``Tr_velo_to_cam``.

    Raises:
        MissingFileError: There is no such file.
        UserError: The line is missing or malformed, or does not lead from a vehicle to a camera; names the file.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path} is not there: official numbers need each frame's calibration, in a folder beside the labels"
        )
    text = read_text(path, "a calibration file")
    return _parse_transform(path, text)


def _parse_transform(path: Path, text: str) -> FloatArray:
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name.strip() != "Tr_velo_to_cam":
            continue
        try:
            values = np.array([float(word) for word in rest.split()])
            matrix = np.concatenate([values.reshape(3, 4), [[0.0, 0.0, 0.0, 1.0]]])
            check_rigid(matrix, "Tr_velo_to_cam")
            check_optical(matrix, "Tr_velo_to_cam")
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return matrix
    raise UserError(f"{path}: expected a line 'Tr_velo_to_cam: <12 numbers>', found none")


class _Transforms:
    """Transforms of a folder of calibrations; a segment's files are all alike, so each text is parsed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parsed: dict[str, FloatArray] = {}

    def read(self, name: str) -> FloatArray:
        path = self.folder / f"{name}.txt"
        if not path.is_file():
            return read_transform(path)  # says what is wrong
        text = read_text(path, "a calibration file")
        if text not in self._parsed:
            self._parsed[text] = _parse_transform(path, text)
        return self._parsed[text]


class ObjectColumns:
    """Columns of `rakd.evaluation.waymo.objects.WaymoObjects` that grow frame by frame."""

    def __init__(self) -> None:
        self._frames = 0
        self._parts: list[tuple[npt.NDArray[np.generic], ...]] = []

    def add(
        self,
        path: Path,
        objects: Objects,
        transform: FloatArray | None,
        points: npt.NDArray[np.int64] | None = None,
        difficulty: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Add the objects of the next frame.

        Args:
            path: Their file, for errors.
            objects: The objects.
            transform: To their optical frame from the vehicle frame, which boxes are taken to. None: rows as they are.
            points: Lidar points of truths.
            difficulty: Annotated difficulty of truths.
        """
        known = np.array([TYPES[KITTI_TYPES[name]] if name in KITTI_TYPES else 0 for name in objects.types], np.int8)
        if not known.all():
            raise UserError(
                f"{path}: types must be {', '.join(KITTI_TYPES)}, got {str(objects.types[int(known.argmin())])!r}"
            )
        if not objects.has_box_3d.all():
            raise UserError(f"{path}: object {int(objects.has_box_3d.argmin()) + 1} has no 3D box")
        if transform is None:
            rows = np.concatenate([objects.location, objects.dimensions[:, ::-1], objects.rotation_y[:, None]], axis=1)
            boxes = rows.astype(np.float32).astype(np.float64)
        else:
            boxes = to_vehicle(objects.location, objects.dimensions, objects.rotation_y, transform)
        count = len(objects)
        none = np.zeros(count, dtype=np.int64)
        scores = np.ones(count) if objects.scores is None else objects.scores
        frame = np.full(count, self._frames)
        self._parts.append(
            (
                frame,
                known,
                boxes,
                scores,
                none if points is None else points,
                none if difficulty is None else difficulty,
            )
        )
        self._frames += 1

    def objects(self, keys: list[FrameKey]) -> WaymoObjects:
        """All that was added."""
        columns = zip(*self._parts, strict=True)
        frames, types, boxes, scores, points, difficulty = (np.concatenate(column) for column in columns)
        return WaymoObjects(
            keys=keys,
            frames=frames.astype(np.int64),
            types=types.astype(np.int8),
            boxes=boxes.astype(np.float64),
            scores=scores.astype(np.float32),
            in_no_label_zone=np.zeros(len(frames), dtype=np.bool_),
            points=points.astype(np.int64),
            difficulty=difficulty.astype(np.int8),
        )


def _check_results(folder: Path) -> None:
    """Refuse a folder of these labels in the place of results: points would be taken for scores."""
    for path in label_files(folder):
        columns = [len(line.split()) for line in read_text(path, "a result file").splitlines()]
        if max(columns, default=0) > _DIFFICULTY:
            raise UserError(
                f"pred: {path} has over 16 columns, as labels have: expected results; are GT and PRED in each other's "
                "place?"
            )
        if any(columns):
            return


def _read_counts(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lidar points and annotated difficulty of each row of a label file; both 0 for DontCare rows."""
    points, difficulty = [], []
    for number, line in enumerate(read_text(path, "a label file").split("\n"), start=1):
        words = line.split()
        if not words:
            continue
        try:
            if words[0] == "DontCare":
                words += ["0"] * (_POINTS + 1 - len(words))
            # Some converters write whole numbers with a point.
            points.append(_whole(words[_POINTS]))
            difficulty.append(_whole(words[_DIFFICULTY]) if len(words) > _DIFFICULTY else 0)
            if not 0 <= points[-1] < 2**31 or not 0 <= difficulty[-1] <= 2:
                raise ValueError
        except (ValueError, IndexError, OverflowError):
            raise UserError(
                f"{path}:{number}: expected the number of lidar points in column 16 and, if there is a column 17, a "
                f"difficulty of 0, 1 or 2 there, got {' '.join(words[_POINTS:]) or 'no column 16'!r}"
            ) from None
    return np.array(points, dtype=np.int64), np.array(difficulty, dtype=np.int64)


def _whole(word: str) -> int:
    value = float(word)
    if value != int(value):
        raise ValueError
    return int(value)
