"""Truths and predictions of many frames as columns, and the names of types, ranges and levels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rakd.geometry import FloatArray

TYPES = {"VEHICLE": 1, "PEDESTRIAN": 2, "SIGN": 3, "CYCLIST": 4}
"""Waymo's numbers of the types that are evaluated; 0 is unknown."""

KITTI_TYPES = {"Car": "VEHICLE", "Pedestrian": "PEDESTRIAN", "Sign": "SIGN", "Cyclist": "CYCLIST"}
"""Waymo's type of each type in files of KITTI's form."""

LEVELS = (1, 2)
"""LEVEL_1: more than 5 lidar points. LEVEL_2: all objects with points."""

FrameKey = tuple[str, int, int]
"""Segment, time in microseconds, number of the camera (0: none). A frame of a folder is its file's name, 0, 0."""


@dataclass(frozen=True, eq=False)
class WaymoObjects:
    """Objects of many frames, in file order.

    Attributes:
        keys: The frames that have objects, in the order in which they were met.
        frames: ``[N]`` int64, row of ``keys``.
        types: ``[N]`` int8, as in `TYPES`; 0 unknown.
        boxes: ``[N, 7]`` float64: x, y, z (centre), length, width, height in metres, heading in radians; z is up.
        scores: ``[N]`` float32; 1 for truths.
        in_no_label_zone: ``[N]`` bool, predictions that are no false positives if they match nothing.
        points: ``[N]`` int64, lidar points inside; truths only, 0 for predictions.
        difficulty: ``[N]`` int8, the level that an annotator gave; 0 none. Truths only.

    Raises:
        ValueError: A field's shape does not agree with the number of boxes.
    """

    keys: list[FrameKey]
    frames: npt.NDArray[np.int64]
    types: npt.NDArray[np.int8]
    boxes: FloatArray
    scores: npt.NDArray[np.float32]
    in_no_label_zone: npt.NDArray[np.bool_]
    points: npt.NDArray[np.int64]
    difficulty: npt.NDArray[np.int8]

    def __post_init__(self) -> None:
        count = len(self.frames)
        for name in ("types", "boxes", "scores", "in_no_label_zone", "points", "difficulty"):
            expected = (count, 7) if name == "boxes" else (count,)
            if getattr(self, name).shape != expected:
                raise ValueError(f"{name} must have shape {list(expected)}, got {list(getattr(self, name).shape)}")

    def __len__(self) -> int:
        return len(self.frames)

    def select(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.integer[Any]]) -> "WaymoObjects":
        """The objects of a boolean mask or of row numbers; the frames stay."""
        return WaymoObjects(
            self.keys,
            self.frames[rows],
            self.types[rows],
            self.boxes[rows],
            self.scores[rows],
            self.in_no_label_zone[rows],
            self.points[rows],
            self.difficulty[rows],
        )


def levels(truth: WaymoObjects) -> npt.NDArray[np.int8]:
    """Level ``[N]`` of truths: 1, 2, or 0 for what is not evaluated.

    An object without lidar points is not evaluated. An annotated difficulty wins; else an object with at most 5
    points is LEVEL_2.
    """
    by_points = np.where(truth.points <= 5, 2, 1)
    level = np.where(truth.difficulty > 0, truth.difficulty, by_points)
    return np.asarray(np.where((truth.points > 0) & (truth.types > 0), level, 0), dtype=np.int8)
