"""Segments of the Waymo Open Dataset, version 2: one parquet file for each segment and component.

The layout, as Waymo hands it out::

    ROOT/{training,validation,testing}/COMPONENT/SEGMENT.parquet

with the components ``camera_image``, ``camera_calibration`` and, where there are labels, ``lidar_box``,
``projected_lidar_box`` and ``lidar_camera_synced_box``. Needs the extra ``waymo`` (pyarrow). Lens distortion is
ignored, as all monocular work on this data does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rakd.data.labels import Objects
from rakd.data.waymo_geometry import optical_from_vehicle, to_optical
from rakd.errors import MissingFileError, UserError
from rakd.extras import require
from rakd.geometry import Calibration, FloatArray, alpha_from_rotation

WaymoSplit = Literal["training", "validation", "testing"]
CameraName = Literal["FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT"]
BoxSource = Literal["lidar", "synced"]

CAMERAS: dict[CameraName, int] = {"FRONT": 1, "FRONT_LEFT": 2, "FRONT_RIGHT": 3, "SIDE_LEFT": 4, "SIDE_RIGHT": 5}
"""Waymo's numbers of its cameras."""

WAYMO_TYPES = {1: "Car", 2: "Pedestrian", 3: "Sign", 4: "Cyclist"}
"""Types as KITTI's files, and converters of this data, spell them; objects of other types are left out."""

_SEGMENT, _TIME, _CAMERA = "key.segment_context_name", "key.frame_timestamp_micros", "key.camera_name"
_OBJECT = "key.laser_object_id"
_IMAGE = "[CameraImageComponent].image"
_INTRINSIC = tuple(f"[CameraCalibrationComponent].intrinsic.{name}" for name in ("f_u", "f_v", "c_u", "c_v"))
_EXTRINSIC = "[CameraCalibrationComponent].extrinsic.transform"
_BOX = ("center.x", "center.y", "center.z", "size.x", "size.y", "size.z", "heading")
_LIDAR = "[LiDARBoxComponent]."
_SYNCED = "[LiDARCameraSyncedBoxComponent].camera_synced_box."
_PROJECTED = tuple(f"[ProjectedLiDARBoxComponent].box.{name}" for name in ("center.x", "center.y", "size.x", "size.y"))
_DIFFICULTY = f"{_LIDAR}difficulty_level.detection"

_IMAGES_AT_ONCE = 8
_READ_BUFFER = 1 << 20  # bytes; without it pyarrow reads a whole row group's images at once


@dataclass(frozen=True, eq=False)
class WaymoCamera:
    """A camera of one segment.

    Attributes:
        name: Its name.
        calibration: Projection from the optical frame to pixels.
        transform: ``[4, 4]`` from the vehicle frame to the optical frame.
    """

    name: CameraName
    calibration: Calibration
    transform: FloatArray


@dataclass(frozen=True, eq=False)
class WaymoBoxes:
    """The labelled objects of one frame, whether the camera sees them or not.

    Attributes:
        ids: ``[N]`` names of the objects.
        types: ``[N]`` Waymo's numbers of their types.
        boxes: ``[N, 7]`` x, y, z (centre), length, width, height, heading in the vehicle frame; metres, radians.
        points: ``[N]`` lidar points inside; of the top lidar for camera-synced boxes.
        difficulty: ``[N]`` level that an annotator gave; 0 none.
        image_boxes: ``[N, 4]`` (x1, y1, x2, y2) in the camera's pixels; NaN where it does not see the object.
    """

    ids: npt.NDArray[np.str_]
    types: npt.NDArray[np.int64]
    boxes: FloatArray
    points: npt.NDArray[np.int64]
    difficulty: npt.NDArray[np.int64]
    image_boxes: FloatArray


@dataclass(frozen=True, eq=False)
class WaymoFrame:
    """One image and what is known of it.

    Attributes:
        segment: Name of the segment.
        time: Microseconds.
        number: Place of the frame in its segment, by time, from 0; frames that were left out count.
        camera: The camera.
        image: The JPEG file; empty if images were not asked for.
        labels: The labelled objects; None in ``testing``.
    """

    segment: str
    time: int
    number: int
    camera: WaymoCamera
    image: bytes
    labels: WaymoBoxes | None

    def visible(self) -> npt.NDArray[np.int64]:
        """Rows of the objects that are evaluated: of a known type, seen by the camera, with lidar points.

        Raises:
            UserError: The frame has no labels.
        """
        labels = self._labels()
        width, height = (labels.image_boxes[:, 2:] - labels.image_boxes[:, :2]).T
        seen = (width > 0) & (height > 0)  # False for NaN
        return np.flatnonzero(seen & (labels.points > 0) & np.isin(labels.types, list(WAYMO_TYPES)))

    def objects(self) -> Objects:
        """The `visible` objects in the camera's optical frame. Truncation and occlusion, which Waymo has not, are 0.

        Raises:
            UserError: The frame has no labels.
        """
        labels, rows = self._labels(), self.visible()
        location, dimensions, rotation_y = to_optical(labels.boxes[rows], self.camera.transform)
        return Objects(
            types=np.array([WAYMO_TYPES[int(number)] for number in labels.types[rows]], dtype=np.str_),
            truncation=np.zeros(len(rows)),
            occlusion=np.zeros(len(rows), dtype=np.int64),
            alpha=alpha_from_rotation(rotation_y, location),
            boxes=labels.image_boxes[rows],
            dimensions=dimensions,
            location=location,
            rotation_y=rotation_y,
        )

    def _labels(self) -> WaymoBoxes:
        if self.labels is None:
            raise UserError(f"frame {self.number} of segment {self.segment} has no labels")
        return self.labels


def is_waymo(root: Path) -> bool:
    """Whether a folder holds Waymo's parquet files of some split."""
    return any((Path(root) / split / "camera_image").is_dir() for split in ("training", "validation", "testing"))


def find_segments(root: Path, split: WaymoSplit, listed: Sequence[str] | None = None) -> list[str]:
    """Names of the segments of a split.

    Args:
        root: The folder that holds the splits.
        split: Its name.
        listed: Names to take, in this order; None: all with images, sorted.

    Raises:
        MissingFileError: The split or a listed segment has no images there.
        UserError: There are no segments, a segment is listed twice, or the folder holds version 1.
    """
    folder = Path(root) / split / "camera_image"
    if not folder.is_dir():
        old = next(iter(sorted((Path(root) / split).glob("*.tfrecord"))), None)
        if old is not None:
            raise UserError(
                f"{old}: a file of version 1 of the data set; expected version 2, parquet files in {folder}"
            )
        raise MissingFileError(f"{folder} is not there: expected version 2 of the Waymo Open Dataset")
    if listed is None:
        segments = sorted(path.stem for path in folder.glob("*.parquet") if not path.name.startswith("."))
    else:
        segments = list(listed)
        twice = sorted({name for name in segments if segments.count(name) > 1})
        if twice:
            raise UserError(f"segments must be listed once, {twice[0]} is listed several times")
        for name in segments:
            if not (folder / f"{name}.parquet").is_file():
                raise MissingFileError(f"{folder / f'{name}.parquet'} is not there: the list names this segment")
    if not segments:
        raise UserError(f"{folder} holds no segments (SEGMENT.parquet)")
    return segments


def read_segment(
    root: Path,
    split: WaymoSplit,
    segment: str,
    *,
    camera: CameraName = "FRONT",
    every: int = 1,
    boxes: BoxSource = "lidar",
    images: bool = True,
) -> Iterator[WaymoFrame]:
    """Read the frames of one segment, few images at a time.

    Args:
        root: The folder that holds the splits.
        split: Its name; ``testing`` has no labels.
        segment: Its name.
        camera: Its images are read.
        every: Take the frames whose number is a multiple of it.
        boxes: "lidar": boxes as labelled. "synced": boxes moved to the time at which the camera saw them, of objects
            that have such a box; the challenge for cameras is scored on these.
        images: Read the images; without them it takes a fraction of the time.

    Returns:
        The frames one after the other, in the order of the file.

    Raises:
        MissingFileError: A component's file is missing; names it.
        UserError: ``camera`` or ``every`` is out of range, or a file is truncated, has not the columns of version 2,
            or belongs to another segment; names the file.
    """
    if camera not in CAMERAS:
        raise UserError(f"camera must be one of {', '.join(CAMERAS)}, got {camera!r}")
    if every < 1:
        raise UserError(f"every must be at least 1, got {every}")
    if boxes not in ("lidar", "synced"):
        raise UserError(f"boxes must be lidar or synced, got {boxes!r}")
    folder = Path(root) / split
    view = _read_camera(folder, segment, camera)
    # Labels first: a missing component should not be found out after the images have been read.
    labels = None if split == "testing" else _Labels(folder, segment, camera, boxes)
    file = _Component(folder / "camera_image" / f"{segment}.parquet", segment, (_SEGMENT, _TIME, _CAMERA, _IMAGE))
    keys = file.read(_TIME, _CAMERA)
    number = {time: i for i, time in enumerate(sorted(set(keys[_TIME][keys[_CAMERA] == CAMERAS[camera]].tolist())))}
    if not number:
        raise UserError(f"{file.path}: no image of the camera {camera}")

    def frames() -> Iterator[WaymoFrame]:
        for time, image in file.images(CAMERAS[camera], images):
            if image is None:
                raise UserError(f"{file.path}: {_IMAGE} has missing values")
            if number[time] % every == 0:
                here = None if labels is None else labels.at(time)
                yield WaymoFrame(segment, time, number[time], view, image, here)

    return frames()


class _Component:
    """One parquet file, with what is wrong with it said of its path."""

    def __init__(self, path: Path, segment: str, columns: Sequence[str]) -> None:
        if not path.is_file():
            raise MissingFileError(f"{path} is not there: the component {path.parent.name} of segment {segment}")
        self.path = path
        self._arrow = require("pyarrow", "waymo")
        parquet = require("pyarrow.parquet", "waymo")
        try:
            # Opened and closed for each use: a reader of many segments should not run out of file handles.
            self._open: Callable[[], Any] = partial(
                parquet.ParquetFile, path, buffer_size=_READ_BUFFER, pre_buffer=False
            )
            with self._open() as file:
                self.columns = set(file.schema_arrow.names)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._broken(error) from None
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise UserError(
                f"{path}: expected the columns of version 2 of the data set, {missing[0]!r} is missing "
                f"({len(missing)} of {len(columns)})"
            )
        segments = set(np.unique(self.read(_SEGMENT)[_SEGMENT]).tolist())
        if segments - {segment}:
            raise UserError(f"{path}: expected rows of segment {segment}, got some of {sorted(segments)[0]}")

    def read(self, *columns: str) -> dict[str, npt.NDArray[Any]]:
        """Whole columns, which may not have missing values."""
        found = {}
        for name, values in zip(columns, self.lists(*columns), strict=True):
            if None in values:
                raise UserError(f"{self.path}: {name} has missing values")
            found[name] = np.array(values)
        return found

    def lists(self, *columns: str) -> list[list[Any]]:
        """Whole columns; None for missing values."""
        try:
            with self._open() as file:
                table = file.read(columns=list(columns), use_threads=False)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._broken(error) from None
        return [table.column(name).to_pylist() for name in columns]

    def images(self, camera: int, wanted: bool) -> Iterator[tuple[int, bytes | None]]:
        """Time and JPEG file of each image of a camera; None for a missing value."""
        columns = [_TIME, _CAMERA, *([_IMAGE] if wanted else [])]
        try:
            with self._open() as file:
                for batch in file.iter_batches(batch_size=_IMAGES_AT_ONCE, columns=columns, use_threads=False):
                    times, cameras = batch.column(_TIME).to_pylist(), batch.column(_CAMERA).to_pylist()
                    for row, (time, name) in enumerate(zip(times, cameras, strict=True)):
                        if name == camera:
                            yield time, batch.column(_IMAGE)[row].as_py() if wanted else b""
        except (self._arrow.ArrowException, OSError) as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: not a whole parquet file: {error}")


class _Labels:
    """The labels of a segment by time, as one camera sees them."""

    def __init__(self, folder: Path, segment: str, camera: CameraName, boxes: BoxSource) -> None:
        box_columns = tuple(f"{_LIDAR}box.{name}" for name in _BOX)
        count = f"{_LIDAR}num_{'top_' if boxes == 'synced' else ''}lidar_points_in_box"
        own = (_TIME, _OBJECT, *box_columns, f"{_LIDAR}type", count)
        lidar = _Component(folder / "lidar_box" / f"{segment}.parquet", segment, (_SEGMENT, *own))
        rows = lidar.read(*own)
        self.times, self.ids = rows[_TIME].astype(np.int64), rows[_OBJECT].astype(np.str_)
        self.types, self.points = rows[f"{_LIDAR}type"].astype(np.int64), rows[count].astype(np.int64)
        self.boxes = np.stack([rows[name].astype(np.float64) for name in box_columns], axis=1)
        self.difficulty = _optional(lidar, _DIFFICULTY, len(self.times))
        if boxes == "synced":
            self._take_synced(folder, segment)
        if not np.isfinite(self.boxes).all():
            raise UserError(f"{lidar.path}: boxes must be finite, that of {self.ids[~_finite(self.boxes)][0]} is not")
        path = folder / "projected_lidar_box" / f"{segment}.parquet"
        own = (_TIME, _CAMERA, _OBJECT, *_PROJECTED)
        seen = _Component(path, segment, (_SEGMENT, *own)).read(*own)
        here = np.flatnonzero(seen[_CAMERA] == CAMERAS[camera])
        x, y, width, height = (seen[name][here].astype(np.float64) for name in _PROJECTED)
        found = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
        if not _finite(found).all():
            raise UserError(f"{path}: boxes must be finite, that of {seen[_OBJECT][here][~_finite(found)][0]} is not")
        places = _places(path, seen[_TIME][here], seen[_OBJECT][here])
        known = _places(lidar.path, rows[_TIME], rows[_OBJECT])
        if places and not places.keys() & known.keys():
            time, name = next(iter(places))
            raise UserError(f"{path}: no box is of a time and object in {lidar.path}, such as {name} at {time}")
        self.image_boxes = np.full((len(self.times), 4), np.nan)
        for row, key in enumerate(zip(self.times.tolist(), self.ids.tolist(), strict=True)):
            if key in places:
                self.image_boxes[row] = found[places[key]]
        self._order = np.argsort(self.times, kind="stable")
        self._sorted = self.times[self._order]

    def _take_synced(self, folder: Path, segment: str) -> None:
        columns = tuple(_SYNCED + name for name in _BOX)
        path = folder / "lidar_camera_synced_box" / f"{segment}.parquet"
        rows = _Component(path, segment, (_SEGMENT, _TIME, _OBJECT, *columns)).read(_TIME, _OBJECT, *columns)
        boxes = np.stack([rows[name].astype(np.float64) for name in columns], axis=1)
        places = _places(path, rows[_TIME], rows[_OBJECT])
        keys = list(zip(self.times.tolist(), self.ids.tolist(), strict=True))
        kept = np.array([i for i, key in enumerate(keys) if key in places], dtype=np.int64)
        for name in ("times", "ids", "types", "points", "difficulty"):
            setattr(self, name, getattr(self, name)[kept])
        self.boxes = boxes[[places[keys[i]] for i in kept.tolist()]].reshape(-1, 7)

    def at(self, time: int) -> WaymoBoxes:
        rows = self._order[np.searchsorted(self._sorted, time) : np.searchsorted(self._sorted, time, side="right")]
        return WaymoBoxes(
            self.ids[rows],
            self.types[rows],
            self.boxes[rows],
            self.points[rows],
            self.difficulty[rows],
            self.image_boxes[rows],
        )


def _read_camera(folder: Path, segment: str, camera: CameraName) -> WaymoCamera:
    path = folder / "camera_calibration" / f"{segment}.parquet"
    columns = (_CAMERA, *_INTRINSIC, _EXTRINSIC)
    rows = _Component(path, segment, (_SEGMENT, *columns)).read(*columns)
    found = np.flatnonzero(rows[_CAMERA] == CAMERAS[camera])
    if len(found) != 1:
        raise UserError(f"{path}: expected one calibration of the camera {camera}, got {len(found)}")
    row = int(found[0])
    f_u, f_v, c_u, c_v = (float(rows[name][row]) for name in _INTRINSIC)
    try:
        calibration = Calibration(np.array([[f_u, 0, c_u, 0], [0, f_v, c_v, 0], [0, 0, 1, 0]]))
        transform = optical_from_vehicle(np.asarray(rows[_EXTRINSIC][row], dtype=np.float64).reshape(4, 4))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return WaymoCamera(camera, calibration, transform)


def _optional(component: _Component, name: str, count: int) -> npt.NDArray[np.int64]:
    """A column of whole numbers that may be missing, as may its values: 0 there."""
    if name not in component.columns:
        return np.zeros(count, dtype=np.int64)
    return np.array([value or 0 for value in component.lists(name)[0]], dtype=np.int64)


def _places(path: Path, times: npt.NDArray[Any], ids: npt.NDArray[Any]) -> dict[tuple[int, str], int]:
    """Row of each time and object, of which there may be one."""
    places: dict[tuple[int, str], int] = {}
    for i, (time, name) in enumerate(zip(times.tolist(), ids.tolist(), strict=True)):
        if places.setdefault((time, name), i) != i:
            raise UserError(f"{path}: expected one row for each time and object, got several of {name} at {time}")
    return places


def _finite(boxes: FloatArray) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(boxes).all(axis=1))
