"""KITTI label files and result files: one row an object, as arrays.

A row reads ``type truncation occlusion alpha x1 y1 x2 y2 h w l x y z rotation_y [score]``. Labels have 15
columns, results 16. Further columns are skipped, as the official kit skips them.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rakd.errors import UserError
from rakd.files import read_text, write_text
from rakd.geometry import FloatArray, alpha_from_rotation, flip_boxes, flip_rotation, resize_boxes

CLASSES = ("Car", "Pedestrian", "Cyclist")
"""The classes that are learned, detected and evaluated; a target's class is the place in this list."""

LABEL_TYPES = (
    "Car",
    "Van",
    "Truck",
    "Pedestrian",
    "Person_sitting",
    "Cyclist",
    "Tram",
    "Misc",
    "DontCare",
)
"""The types in KITTI's label files. Readers take others too: they count as other classes."""

_COLUMNS = (
    *("truncation", "occlusion", "alpha", "x1", "y1", "x2", "y2"),
    *("height", "width", "length", "x", "y", "z", "rotation_y", "score"),
)
LABEL_COLUMNS = 15
WAYMO_LABEL_COLUMNS = 17  # and the numbers of lidar points and the difficulty, as convert-waymo writes them
# Quotes, commas or stray marks would make another class of a known one, which nothing then counts.
_TYPE = re.compile(r"\w[\w./+-]*")
_LARGE = 2**31  # no occlusion is; numpy would make a negative number of one beyond 64 bits

_UNKNOWN_PLACE = -1000.0
_UNKNOWN_ANGLE = -10.0


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one frame, in file order.

    Attributes:
        types: ``[N]`` strings as the file spells them.
        truncation: ``[N]`` share of the object outside the image, 0..1; -1 unknown.
        occlusion: ``[N]`` int64: 0 fully visible, 1 partly, 2 largely occluded, 3 unknown; -1 not given.
        alpha: ``[N]`` observation angle, radians; -10 unknown.
        boxes: ``[N, 4]`` (x1, y1, x2, y2) in pixels.
        dimensions: ``[N, 3]`` height, width, length in metres; -1 unknown.
        location: ``[N, 3]`` bottom centre (x, y, z) in metres; -1000 unknown.
        rotation_y: ``[N]`` radians; -10 unknown.
        scores: ``[N]`` for results, None for labels.

    Raises:
        ValueError: A field's shape does not agree with the number of types.
    """

    types: npt.NDArray[np.str_]
    truncation: FloatArray
    occlusion: npt.NDArray[np.int64]
    alpha: FloatArray
    boxes: FloatArray
    dimensions: FloatArray
    location: FloatArray
    rotation_y: FloatArray
    scores: FloatArray | None = None

    def __post_init__(self) -> None:
        count = len(self.types)
        columns = {"boxes": (count, 4), "dimensions": (count, 3), "location": (count, 3)}
        for field in fields(self):
            value = getattr(self, field.name)
            shape = columns.get(field.name, (count,))
            if value is not None and value.shape != shape:
                raise ValueError(f"{field.name} must have shape {list(shape)}, got {list(value.shape)}")

    def __len__(self) -> int:
        return len(self.types)

    def select(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.integer]) -> "Objects":
        """The objects of a boolean mask or of row numbers, in that order."""
        return Objects(
            self.types[rows],
            self.truncation[rows],
            self.occlusion[rows],
            self.alpha[rows],
            self.boxes[rows],
            self.dimensions[rows],
            self.location[rows],
            self.rotation_y[rows],
            None if self.scores is None else self.scores[rows],
        )

    def is_type(self, *names: str) -> npt.NDArray[np.bool_]:
        """Mask ``[N]`` of the objects of one of these types; case does not matter, as in the official kit."""
        wanted = {name.lower() for name in names}
        return np.isin(self.types, [own for own in set(self.types.tolist()) if own.lower() in wanted])

    @property
    def has_box_3d(self) -> npt.NDArray[np.bool_]:
        """Mask ``[N]`` of the objects with a 3D box (DontCare regions and image-only results have none)."""
        placed = np.all(self.location != _UNKNOWN_PLACE, axis=1)
        sized = np.all(self.dimensions > 0, axis=1)
        return np.asarray(placed & sized & (self.rotation_y != _UNKNOWN_ANGLE))

    @property
    def observed_alpha(self) -> FloatArray:
        """``[N]`` observation angles; from rotation and place where alpha alone is unknown, as some tools write it."""
        unknown = (self.alpha == _UNKNOWN_ANGLE) & self.has_box_3d
        return np.where(unknown, alpha_from_rotation(self.rotation_y, self.location), self.alpha)

    def flipped(self, width: int) -> "Objects":
        """The objects in the mirrored image of ``width`` pixels; unknown places and angles stay unknown."""
        location = self.location.copy()
        location[:, 0] *= np.where(location[:, 0] == _UNKNOWN_PLACE, 1.0, -1.0)
        return replace(
            self,
            boxes=flip_boxes(self.boxes, width),
            location=location,
            alpha=np.where(self.alpha == _UNKNOWN_ANGLE, _UNKNOWN_ANGLE, flip_rotation(self.alpha)),
            rotation_y=np.where(self.rotation_y == _UNKNOWN_ANGLE, _UNKNOWN_ANGLE, flip_rotation(self.rotation_y)),
        )

    def resized(self, scale_x: float, scale_y: float) -> "Objects":
        """The objects in the image resized by the two factors: 2D boxes move, 3D boxes do not."""
        return replace(self, boxes=resize_boxes(self.boxes, scale_x, scale_y))


def concatenate(frames: Sequence[Objects]) -> Objects:
    """The objects of several frames in one, in order.

    Raises:
        ValueError: ``frames`` is empty, or some frames have scores and some have not.
    """
    if not frames:
        raise ValueError("frames must hold at least one frame, got none")
    columns: dict[str, Any] = {}
    for field in fields(Objects):
        values = [getattr(frame, field.name) for frame in frames]
        missing = sum(value is None for value in values)
        if 0 < missing < len(values):
            raise ValueError(f"frames must all have {field.name} or none of them, {missing} have none")
        columns[field.name] = None if missing else np.concatenate(values)
    return Objects(**columns)


def is_label_row(words: Sequence[str]) -> bool:
    """Whether a row's words are a label's: 15, or more where converters of Waymo's data add to them.

    convert-waymo adds a count of lidar points and a difficulty, others the count alone. That stands where results have
    their score, but there columns 2 and 3 are -1.
    """
    added, is_result = words[LABEL_COLUMNS:], all(word.startswith("-1") for word in words[1:3])
    counts = (0, WAYMO_LABEL_COLUMNS - LABEL_COLUMNS) if is_result else (0, 1, WAYMO_LABEL_COLUMNS - LABEL_COLUMNS)
    return len(words) - LABEL_COLUMNS in counts and all(word.isdigit() for word in added)


def read_labels(path: Path) -> Objects:
    """Read a label file.

    Args:
        path: The file. An empty file is a frame without objects.

    Raises:
        MissingFileError: There is no such file.
        UserError: A row does not parse, or holds a number that is not finite; names file and line.
    """
    return _read(path, scored=False)


def read_results(path: Path) -> Objects:
    """Read a result file.

    A row without a score (15 columns) is skipped, as the official kit skips it, with one warning a file.

    Args:
        path: The file. An empty file is a frame without detections.

    Raises:
        MissingFileError: There is no such file.
        UserError: A row does not parse, or holds a number that is not finite; names file and line.
    """
    return _read(path, scored=True)


def write_objects(path: Path, objects: Objects, *, decimals: int = 4) -> None:
    """Write a label file or, when the objects have scores, a result file; atomically.

    Args:
        path: The file to write; folders on the way are made.
        objects: To be written. Types must be plain words.
        decimals: Digits after the point (KITTI's own labels have 2). Scores always get 6.

    Raises:
        ValueError: A type is not a word without quotes and the like, or a number is not finite.
    """
    rows = []
    numbers = np.column_stack([objects.alpha, objects.boxes, objects.dimensions, objects.location, objects.rotation_y])
    # Adding zero turns -0.0, which would be printed as "-0.00", into 0.0.
    numbers = np.round(numbers, decimals) + 0.0
    truncation = np.round(objects.truncation, decimals) + 0.0
    if not (np.isfinite(numbers).all() and np.isfinite(truncation).all()):
        first = int(np.flatnonzero(~np.isfinite(numbers).all(axis=1) | ~np.isfinite(truncation))[0])
        raise ValueError(f"objects must be finite to be written to {path}, object {first} is not")
    if objects.scores is not None and np.isnan(objects.scores).any():
        first = int(np.flatnonzero(np.isnan(objects.scores))[0])
        raise ValueError(f"scores must not be NaN to be written to {path}, object {first}'s is")
    for i, name in enumerate(objects.types):
        if not _TYPE.fullmatch(str(name)):
            raise ValueError(f"types must be plain words such as Car to be written to {path}, got {str(name)!r}")
        row = [str(name), f"{truncation[i]:.{decimals}f}", str(int(objects.occlusion[i]))]
        row += [f"{value:.{decimals}f}" for value in numbers[i]]
        if objects.scores is not None:
            row.append(f"{objects.scores[i]:.6f}")
        rows.append(" ".join(row) + "\n")
    write_text(path, "".join(rows))


def _read(path: Path, *, scored: bool) -> Objects:
    text = read_text(path, "a result file" if scored else "a label file")
    types: list[str] = []
    rows: list[list[float]] = []
    count = 15 if scored else 14
    missing_score = 0
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < LABEL_COLUMNS:
            what = "16 columns (15 and a score)" if scored else "15 columns"
            raise UserError(f"{path}:{number}: expected {what}, got {len(words)}: {line.strip()!r}")
        if not _TYPE.fullmatch(words[0]):
            raise UserError(f"{path}:{number}: type must be a plain word such as Car, got {words[0]!r}")
        if scored and len(words) == LABEL_COLUMNS:
            missing_score = missing_score or number
            continue
        values = words[1 : count + 1]
        try:
            if not scored:
                int(values[1])
            row = [float(value) for value in values]
        except ValueError:
            raise _bad_number(path, number, values, scored=scored) from None
        # A score may be infinite; everything else must be a plain number.
        plain = all(map(_is_plain, row[:14], values))
        if not plain or abs(row[1]) >= _LARGE or (len(row) > 14 and not _is_score(row[14], values[14])):
            raise _bad_number(path, number, values, scored=scored)
        if (row[8] > 0) != (row[9] > 0):
            sizes = f"{values[8]} and {values[9]}"
            raise UserError(f"{path}:{number}: width and length must both be positive or neither, got {sizes}")
        types.append(words[0])
        rows.append(row)
    if missing_score:
        warnings.warn(f"{path}:{missing_score}: result rows without a score (15 columns) are skipped", stacklevel=3)
    return make_objects(types, rows, scored=scored)


def _is_plain(value: float, text: str) -> bool:
    # float() takes "1_0" for 10; no other reader of KITTI files does.
    return value - value == 0 and "_" not in text


def _is_score(value: float, text: str) -> bool:
    return value == value and "_" not in text


def _bad_number(path: Path, number: int, values: Sequence[str], *, scored: bool) -> UserError:
    """The error for the first of ``values`` that is not what its column wants."""
    for name, text in zip(_COLUMNS, values, strict=False):
        wanted = "a number" if name == "score" else "a finite number"
        try:
            if name == "occlusion" and not scored:
                wanted = "an integer"
                int(text)
            good = _is_score(float(text), text) if name == "score" else _is_plain(float(text), text)
            good = good and not (name == "occlusion" and abs(float(text)) >= _LARGE)
        except ValueError:
            good = False
        if not good:
            return UserError(f"{path}:{number}: {name} must be {wanted}, got {text!r}")
    raise AssertionError("called for a row without a fault")


def make_objects(types: Sequence[str], rows: Sequence[Sequence[float]], *, scored: bool = False) -> Objects:
    """Objects from their types and the 14 numbers of their lines, 15 where they have scores."""
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 15 if scored else 14)
    return Objects(
        types=np.array(types, dtype=np.str_),
        truncation=table[:, 0],
        occlusion=table[:, 1].astype(np.int64),
        alpha=table[:, 2],
        boxes=table[:, 3:7],
        dimensions=table[:, 7:10],
        location=table[:, 10:13],
        rotation_y=table[:, 13],
        scores=table[:, 14] if scored else None,
    )
