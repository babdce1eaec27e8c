"""The Waymo Open Dataset in KITTI's layout, one camera of it.

::

    OUT/training/{image_2,label_2,calib}/SSSFFF.{jpg,txt,txt}
    OUT/testing/{image_2,calib}/SSSFFF.{jpg,txt}
    OUT/ImageSets/{train,val,trainval,test}.txt
    OUT/waymo/SPLIT/SEGMENT.csv       which frame is which; says that the segment is complete
    OUT/waymo.json                    the settings

A frame's name is the number of its segment (3 digits; those of ``validation`` count from 798, the number of training
segments) and its number in the segment. Images are Waymo's JPEG files, byte for byte.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rakd.data.frames import write_calibration
from rakd.data.labels import Objects
from rakd.data.waymo import CAMERAS, BoxSource, CameraName, WaymoFrame, WaymoSplit, find_segments, read_segment
from rakd.errors import MissingFileError, UserError
from rakd.files import check_folder, locked, remove_stale, write_bytes, write_text
from rakd.progress import do_all

MANIFEST = "waymo.json"
_VERSION = 1
_FIRST = {"training": 0, "validation": 798, "testing": 0}
_LIMIT = {"training": 798, "validation": 1000, "testing": 1000}
_LISTS = {"training": "train", "validation": "val", "testing": "test"}
_COLUMNS = ("frame", "segment", "time", "camera")
_DECIMALS = 8
_DONT_CARE = "DontCare -1 -1 -10 {} -1 -1 -1 -1000 -1000 -1000 -10 0 0"


@dataclass(frozen=True)
class WaymoConversion:
    """Settings of a conversion.

    Attributes:
        camera: Its images are taken.
        every: Take every n-th frame of training segments, and of all others. Papers train on every third.
        boxes: "lidar" or "synced", see `rakd.data.waymo.read_segment`.
        min_points: Most lidar points of cars, and of other objects, that training ignores: they become DontCare
            regions. Validation keeps all objects with points.

    Raises:
        UserError: A value is out of range.
    """

    camera: CameraName = "FRONT"
    every: tuple[int, int] = (3, 1)
    boxes: BoxSource = "lidar"
    min_points: tuple[int, int] = (100, 50)

    def __post_init__(self) -> None:
        if self.camera not in CAMERAS:
            raise UserError(f"camera must be one of {', '.join(CAMERAS)}, got {self.camera!r}")
        if min(self.every) < 1:
            raise UserError(f"every must be at least 1, got {self.every}")
        if self.boxes not in ("lidar", "synced"):
            raise UserError(f"boxes must be lidar or synced, got {self.boxes!r}")
        if min(self.min_points) < 0:
            raise UserError(f"min_points must be 0 or more, got {self.min_points}")


@dataclass(frozen=True)
class FrameName:
    """The frame of Waymo's data that a converted frame comes from.

    Attributes:
        segment: Name of the segment.
        time: Microseconds.
        camera: Number of the camera.
    """

    segment: str
    time: int
    camera: int


def convert_waymo(
    root: Path | str,
    out: Path | str,
    settings: WaymoConversion | None = None,
    *,
    splits: Sequence[WaymoSplit] = ("training", "validation"),
    segments: dict[WaymoSplit, Sequence[str]] | None = None,
    workers: int = 1,
    progress: bool = False,
) -> int:
    """Write Waymo's segments in KITTI's layout.

    Files appear whole or not at all. The same call completes an interrupted run: segments that are there are kept.

    Args:
        root: The folder that holds the splits, see `rakd.data.waymo`.
        out: Folder to write to. New, empty, or begun by a call with the same settings and segments.
        settings: None: as the papers do.
        splits: To convert.
        segments: Names of the segments to take of a split, in this order; all of the other splits.
        workers: Number of processes, which share the segments. With more than one, the calling script needs the usual
            ``if __name__ == "__main__"`` guard.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        Number of frames in ``out``.

    Raises:
        MissingFileError: A file of ``root`` is missing.
        UserError: An argument is out of range, a file is broken, or ``out`` holds something else.
    """
    root, out = Path(root), Path(out)
    settings = settings or WaymoConversion()
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if not splits or len(set(splits)) < len(splits) or not set(splits) <= set(_FIRST):
        raise UserError(f"splits must be some of {', '.join(_FIRST)}, each once, got {', '.join(splits) or 'none'}")
    idle = [split for split in segments or {} if split not in splits]
    if idle:
        raise UserError(f"segments: there is a list for {idle[0]}, which is not among splits, {', '.join(splits)}")
    names = {split: find_segments(root, split, (segments or {}).get(split)) for split in splits}
    for split, found in names.items():
        most = _LIMIT[split] - _FIRST[split]
        if len(found) > most:
            raise UserError(f"{root / split}: frames have names for {most} segments of this split, got {len(found)}")
    check_folder(out, "out")
    with locked(out):
        _claim(out, settings, names)
    remove_stale(chain(out.glob("*/*/.*"), out.glob("*/.*")))
    tasks = [
        (split, _FIRST[split] + i, name)
        for split, found in names.items()
        for i, name in enumerate(found)
        if not _index(out, split, name).exists()
    ]
    write = partial(_convert_segment, root, out, settings)
    do_all(write, tasks, workers, desc="converting", unit="segment", disable=not progress)
    return _write_lists(out)


def read_names(out: Path, split: WaymoSplit) -> dict[str, FrameName]:
    """Read the frame of Waymo's data of each converted frame, by its name, in the order of the segments.

    Args:
        out: The folder that `convert_waymo` wrote.
        split: Whose frames.

    Raises:
        MissingFileError: The folder was not written by `convert_waymo`.
        UserError: An index is malformed; names it.
    """
    settings = read_manifest(out)
    found: dict[str, FrameName] = {}
    for segment in settings["segments"].get(split, ()):
        found.update(_read_index(_index(out, split, segment)))
    return found


def read_manifest(out: Path) -> dict[str, Any]:
    """The settings of a converted folder.

    Raises:
        MissingFileError: The folder was not written by `convert_waymo`.
        UserError: The file is malformed.
    """
    path = Path(out) / MANIFEST
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["version"] != _VERSION or not isinstance(settings["segments"], dict):
            raise UserError(f"version {settings['version']}, expected {_VERSION}")
    except FileNotFoundError:
        raise MissingFileError(f"{path} is not there: expected a folder that rakd convert-waymo wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the settings of rakd convert-waymo: {error}") from None
    return dict(settings)


def label_text(
    objects: Objects,
    points: npt.NDArray[np.int64],
    difficulty: npt.NDArray[np.int64],
    ignored: npt.NDArray[np.bool_] | None = None,
) -> str:
    """A label file of KITTI's form with two more columns: lidar points and annotated difficulty.

    Args:
        objects: ``[N]`` objects.
        points: ``[N]``.
        difficulty: ``[N]``, 0 for none.
        ignored: ``[N]`` objects to write as DontCare regions, last; None: none.
    """
    numbers = np.column_stack([objects.alpha, objects.boxes, objects.dimensions, objects.location, objects.rotation_y])
    numbers = np.round(numbers, _DECIMALS) + 0.0  # no -0.0
    rows, regions = [], []
    for i, name in enumerate(objects.types):
        if ignored is not None and ignored[i]:
            regions.append(_DONT_CARE.format(" ".join(f"{value:.{_DECIMALS}f}" for value in numbers[i, 1:5])))
            continue
        values = " ".join(f"{value:.{_DECIMALS}f}" for value in numbers[i])
        rows.append(f"{name} 0 0 {values} {points[i]} {difficulty[i]}")
    return "".join(f"{row}\n" for row in (*rows, *regions))


def _claim(out: Path, settings: WaymoConversion, names: dict[WaymoSplit, list[str]]) -> None:
    """Make sure that ``out`` is this conversion's own, so that no other one is mixed up or overwritten."""
    here: dict[str, Any] = {
        "version": _VERSION,
        "camera": settings.camera,
        "every": list(settings.every),
        "boxes": settings.boxes,
        "min_points": list(settings.min_points),
        "segments": names,
    }
    path = out / MANIFEST
    if path.exists():
        there = read_manifest(out)
        differing = [key for key in here if key != "segments" and there.get(key) != here[key]]
        # Splits can be added one after the other; a split that is there has to stay as it is, since numbers are names.
        kept = there["segments"]
        differing += [f"segments of {split}" for split, found in names.items() if found != kept.get(split, found)]
        if differing:
            raise UserError(f"out: {out} holds a conversion with other {', '.join(differing)}; choose another folder")
        here["segments"] = {**kept, **names}
    elif any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise UserError(f"out: {out} is not an empty folder and holds no {MANIFEST}; choose another folder")
    write_text(path, json.dumps(here, indent=1) + "\n")


def _convert_segment(root: Path, out: Path, settings: WaymoConversion, task: tuple[WaymoSplit, int, str]) -> None:
    split, number, segment = task
    folder = out / ("testing" if split == "testing" else "training")
    every = settings.every[0 if split == "training" else 1]
    rows = []
    for frame in read_segment(root, split, segment, camera=settings.camera, every=every, boxes=settings.boxes):
        if frame.number > 999:
            raise UserError(f"{root / split}: segment {segment} has over 1000 frames, which have no names")
        name = f"{number:03d}{frame.number:03d}"
        write_bytes(folder / "image_2" / f"{name}.jpg", frame.image)
        write_calibration(folder / "calib" / f"{name}.txt", frame.camera.calibration, frame.camera.transform)
        if split != "testing":
            min_points = settings.min_points if split == "training" else (0, 0)
            write_text(folder / "label_2" / f"{name}.txt", _frame_labels(frame, min_points))
        rows.append((name, segment, frame.time, CAMERAS[settings.camera]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_COLUMNS, *sorted(rows)])
    # Last, since it says that the segment is complete.
    write_text(_index(out, split, segment), text.getvalue())


def _frame_labels(frame: WaymoFrame, min_points: tuple[int, int]) -> str:
    objects, rows = frame.objects(), frame.visible()
    if frame.labels is None:
        raise AssertionError("frames of splits with labels have some")
    points = frame.labels.points[rows]
    few = points <= np.where(objects.is_type("Car"), *min_points)
    return label_text(objects, points, frame.labels.difficulty[rows], few)


def _index(out: Path, split: str, segment: str) -> Path:
    return out / "waymo" / split / f"{segment}.csv"


def _read_index(path: Path) -> dict[str, FrameName]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if not rows or tuple(rows[0]) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
            raise UserError(f"expected the columns {', '.join(_COLUMNS)}")
        return {name: FrameName(segment, int(time), int(camera)) for name, segment, time, camera in rows[1:]}
    except FileNotFoundError:
        raise MissingFileError(f"{path} is not there: this segment is not converted; repeat convert-waymo") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _write_lists(out: Path) -> int:
    """Write the lists of frames of all complete splits; gives the number of frames."""
    lists = {}
    for part, segments in read_manifest(out)["segments"].items():
        if all(_index(out, part, segment).exists() for segment in segments):
            lists[_LISTS[part]] = sorted(read_names(out, part))
    total = sum(map(len, lists.values()))
    if "train" in lists and "val" in lists:
        lists["trainval"] = lists["train"] + lists["val"]
    for name, frames in lists.items():
        write_text(out / "ImageSets" / f"{name}.txt", "".join(f"{frame}\n" for frame in frames))
    return total
