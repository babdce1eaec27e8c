"""``rakd inspect``: the objects of a data set, and impossible values in its files."""

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from rakd.data.frames import find_frames, read_image_size
from rakd.data.labels import LABEL_TYPES, Objects, concatenate
from rakd.errors import UserError
from rakd.evaluation.kitti import DIFFICULTIES, LEVELS
from rakd.files import check_output
from rakd.geometry import (
    Calibration,
    FloatArray,
    alpha_from_rotation,
    box_corners,
    project_boxes,
    wrap_angle,
)
from rakd.progress import bar


@dataclass(frozen=True)
class Inspect:
    """Count the objects of a data set by type and difficulty, and draw a sheet of labelled frames.

    Reads every label and calibration file and the size of every image, so malformed ones show up with file and line;
    impossible values, such as a negative size, an alpha that does not belong to rotation_y, or a 3D box that the
    calibration takes elsewhere than to its 2D box, are warnings.
    """

    data: Annotated[Path, arg(metavar="DIR")]
    """KITTI folder: holds training/{image_2,label_2,calib} and, for splits, ImageSets."""

    split: Annotated[str | None, arg(metavar="NAME")] = None
    """Frames of this list in ImageSets, such as train; without it, all."""

    out: Annotated[Path, arg(metavar="FILE")] = Path("runs/inspect.png")
    """Picture to write the sheet of frames to."""

    count: int = 8
    """Number of frames to draw, evenly spaced in the data."""

    def run(self) -> None:
        """Print the counts and write the sheet."""
        from rakd.visualize import check_picture, draw_sheet

        if self.count < 1:
            raise UserError(f"count must be at least 1, got {self.count}")
        check_picture(self.out, "--out")
        frames = find_frames(self.data, self.split)
        check_output(self.out, "--out", {frame.image.resolve() for frame in frames})
        labels = []
        for frame in bar(frames, desc="reading", unit="frame", delay=2):
            objects = frame.read_labels()
            doubts = doubtful(objects, frame.read_calibration(), read_image_size(frame.image))
            if doubts:
                warnings.warn(f"{frame.label}: {'; '.join(doubts)}", stacklevel=1)
            labels.append(objects)
        together = concatenate(labels)
        regions = int(np.count_nonzero(together.is_type("DontCare")))
        count = len(together) - regions
        print(f"{self.data}: {len(frames)} frames, {count} labelled objects, {regions} DontCare regions\n")
        print(format_counts(together))
        drawn = min(self.count, len(frames))
        chosen = [(frames[i], labels[i]) for i in (n * len(frames) // drawn for n in range(drawn))]
        sheet = [
            (f"frame {frame.id}", frame.read_image(), frame.read_calibration(), objects)
            for frame, objects in bar(chosen, desc="drawing", unit="frame", delay=2)
        ]
        draw_sheet(self.out, sheet, title=f"{self.data.resolve().name}: {len(frames)} frames")
        print(f"\nsheet of {len(sheet)} frames: {self.out}")


def doubtful(objects: Objects, calibration: Calibration, size: tuple[int, int]) -> list[str]:
    """Name values of a label file that can be read but are impossible.

    Args:
        objects: Labels.
        calibration: Of their frame.
        size: (width, height) of their image in pixels.

    Returns:
        A phrase for each kind of fault, with how many objects have it; DontCare regions are not looked at.
    """
    objects = objects.select(~objects.is_type("DontCare"))
    outside = (objects.boxes < -1) | (objects.boxes > np.array(size * 2))
    huge = (objects.dimensions > _MAX_SIZE).any(axis=1) | (np.abs(objects.location) > _MAX_DISTANCE).any(axis=1)
    width, height = (objects.boxes[:, 2:] - objects.boxes[:, :2]).T
    turned = np.abs(wrap_angle(objects.observed_alpha - alpha_from_rotation(objects.rotation_y, objects.location)))
    overlap = _overlaps(objects, calibration, size)
    seen = objects.has_box_3d & (objects.truncation < _MOSTLY_OUTSIDE)
    faults = {
        "a 2D box without area": (width <= 0) | (height <= 0),
        f"a 2D box that leaves the image, {size[0]} x {size[1]} pixels": outside.any(axis=1),
        "no 3D box (a size that is not positive, or no place or angle)": ~objects.has_box_3d,
        f"a 3D box over {_MAX_SIZE:g} m in size or {_MAX_DISTANCE:g} m away": objects.has_box_3d & huge,
        "a place behind the camera": objects.has_box_3d & (objects.location[:, 2] <= 0),
        "an angle beyond half a turn": objects.has_box_3d & (np.abs(objects.rotation_y) > _HALF_TURN),
        "an alpha that is not rotation_y - atan2(x, z)": objects.has_box_3d & (turned > _MAX_ALPHA_ERROR),
        f"a 3D box whose image overlaps the 2D box by less than {_MIN_OVERLAP:.0%}; is the calibration this "
        "frame's, and for images of this size?": seen & (width > 0) & (overlap < _MIN_OVERLAP),
    }
    counts = {fault: int(np.count_nonzero(rows)) for fault, rows in faults.items()}
    return [f"{count} of {len(objects)} objects: {fault}" for fault, count in counts.items() if count]


def _overlaps(objects: Objects, calibration: Calibration, size: tuple[int, int]) -> FloatArray:
    """IoU ``[N]`` of each 2D box and the image of its 3D box; 0 where that lies outside the image."""
    corners = box_corners(objects.location, objects.dimensions, objects.rotation_y)
    projected = project_boxes(calibration, corners, size)
    sides = np.minimum(projected, objects.boxes)[:, 2:] - np.maximum(projected, objects.boxes)[:, :2]
    shared = np.clip(sides, 0, None).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (projected, objects.boxes)]
    overlaps: FloatArray = shared / (areas[0] + areas[1] - shared)
    return np.nan_to_num(overlaps)


# KITTI's labels: alphas are within 0.1 but for 13 of 40,570; overlaps of 401 real and 2,597 rendered ones over 39 %.
_MAX_ALPHA_ERROR, _MIN_OVERLAP = 0.2, 0.2
_MOSTLY_OUTSIDE = 0.9  # of such objects the image of the 3D box says little: some of KITTI's overlap by less
_HALF_TURN = np.pi + 0.01  # files round to two digits
_MAX_SIZE, _MAX_DISTANCE = 100.0, 1000.0  # metres; a tram of two cars is under 60 long


def format_counts(objects: Objects) -> str:
    """Table of the number of objects by type and difficulty.

    The difficulties are KITTI's and contain each other: what is easy is moderate too.
    """
    totals = Counter(objects.types.tolist())
    known = [name for name in LABEL_TYPES if totals[name]]
    names = known + sorted(set(totals) - set(known))
    rows = [f"{'type':<15}" + "".join(f"{title:>10}" for title in (*LEVELS, "all"))]
    height = objects.boxes[:, 3] - objects.boxes[:, 1]
    for name in names:
        counts = []
        for least_height, most_occlusion, most_truncation in DIFFICULTIES:
            fits = (objects.occlusion <= most_occlusion) & (objects.truncation <= most_truncation)
            fits &= (height > least_height) & (objects.types == name)
            counts.append("-" if name == "DontCare" else str(np.count_nonzero(fits)))
        rows.append(f"{name:<15}" + "".join(f"{value:>10}" for value in (*counts, str(totals[name]))))
    return "\n".join(rows)
