"""Rendered scenes as Waymo's version 2 hands out its segments: parquet files of a tilted camera."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rakd.data.frames import find_frames
from rakd.data.labels import Objects
from rakd.data.waymo_geometry import optical_from_vehicle, to_vehicle
from rakd.geometry import Calibration

NUMBERS = {"Car": 1, "Van": 1, "Pedestrian": 2, "Cyclist": 4}
CAMERA = "[CameraCalibrationComponent]."
LIDAR, SYNCED = "[LiDARBoxComponent].", "[LiDARCameraSyncedBoxComponent]."
FIELDS = ("center.x", "center.y", "center.z", "size.x", "size.y", "size.z", "heading")
SEGMENTS = {"training": ("10_a", "20_b"), "validation": ("30_c",)}


def extrinsic(yaw: float = 0.03, pitch: float = 0.06, roll: float = -0.04) -> np.ndarray:
    """A camera that looks ahead but for these angles (radians), 1.5 m before and 2.1 m above the vehicle's origin."""

    def turn(axis: int, angle: float) -> np.ndarray:
        matrix, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        matrix[[i, j], [i, j]] = np.cos(angle)
        matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
        return matrix

    result = np.eye(4)
    result[:3, :3] = turn(2, yaw) @ turn(1, pitch) @ turn(0, roll)
    result[:3, 3] = (1.5, -0.02, 2.1)
    return result


def optical(objects: Objects, calibration: Calibration) -> Objects:
    """Objects in the frame of the camera's own centre, from which Waymo's calibrations project."""
    matrix = calibration.projection
    shift = np.linalg.solve(matrix[:, :3], matrix[:, 3])
    known = objects.select(np.isin(objects.types, list(NUMBERS)))
    types = np.where(known.types == "Van", "Car", known.types)
    return Objects(
        types,
        np.zeros(len(known)),
        np.zeros(len(known), np.int64),
        known.alpha,
        known.boxes,
        known.dimensions,
        known.location + shift,
        known.rotation_y,
    )


def points_of(frame: int, count: int) -> np.ndarray:
    """Lidar points: the last object of each frame has none, others few or many."""
    points = np.random.default_rng(frame).choice([3, 5, 6, 60, 300, 900, 900, 900], count)
    return points * (np.arange(count) < count - 1)


def write_waymo(scenes: Path, root: Path) -> dict[str, list[Objects]]:
    """Write the scenes' frames as segments of both splits; gives all objects of each segment's frames."""
    frames = find_frames(scenes)
    names = [(split, name) for split, found in SEGMENTS.items() for name in found]
    share = len(frames) // len(names)
    written = {}
    for i, (split, name) in enumerate(names):
        written[name] = write_segment(root / split, name, frames[i * share : (i + 1) * share], first=i * share)
    return written


def write_segment(folder: Path, name: str, frames: list, *, first: int) -> list[Objects]:
    matrix = extrinsic()
    transform = optical_from_vehicle(matrix)
    images, lidar, projected, synced = [], [], [], []
    written = []
    for i, frame in enumerate(frames):
        time = 1_000_000 + 100_000 * i
        objects = optical(frame.read_labels(), frame.read_calibration())
        written.append(objects)
        stream = io.BytesIO()
        Image.fromarray(frame.read_image()).save(stream, "JPEG", quality=95)
        for camera in (2, 1):
            image = stream.getvalue() if camera == 1 else b"another"
            images.append(key(name, time) | {"key.camera_name": camera, "[CameraImageComponent].image": image})
        boxes = to_vehicle(objects.location, objects.dimensions, objects.rotation_y, transform)
        points = points_of(first + i, len(objects))
        for j, (box, count) in enumerate(zip(boxes, points, strict=True)):
            own = key(name, time) | {"key.laser_object_id": f"object-{j}"}
            number = NUMBERS[str(objects.types[j])]
            row = own | {f"{LIDAR}box.{field}": value for field, value in zip(FIELDS, box.tolist(), strict=True)}
            row |= {f"{LIDAR}type": number, f"{LIDAR}num_lidar_points_in_box": int(count)}
            row |= {f"{LIDAR}num_top_lidar_points_in_box": int(count) // 2}
            lidar.append(row | {f"{LIDAR}difficulty_level.detection": 2 if j % 3 == 2 else None})
            x1, y1, x2, y2 = objects.boxes[j].tolist()
            area = {"center.x": (x1 + x2) / 2, "center.y": (y1 + y2) / 2, "size.x": x2 - x1, "size.y": y2 - y1}
            area = {f"[ProjectedLiDARBoxComponent].box.{field}": value for field, value in area.items()}
            projected.append(own | {"key.camera_name": 1, "[ProjectedLiDARBoxComponent].type": number} | area)
            moved = box + np.array([0.1, 0, 0, 0, 0, 0, 0])
            row = own | {f"{SYNCED}camera_synced_box.{f}": v for f, v in zip(FIELDS, moved.tolist(), strict=True)}
            synced.append(row | {f"{SYNCED}most_visible_camera_name": 1})
        # Of a box that only another camera sees.
        own = key(name, time) | {"key.laser_object_id": "behind"}
        box = (-20.0, 0.0, 1.0, 4.0, 2.0, 1.5, 0.0)
        row = own | {f"{LIDAR}box.{field}": value for field, value in zip(FIELDS, box, strict=True)}
        row |= {f"{LIDAR}type": 1, f"{LIDAR}num_lidar_points_in_box": 50, f"{LIDAR}num_top_lidar_points_in_box": 9}
        lidar.append(row | {f"{LIDAR}difficulty_level.detection": None})
    projection = frames[0].read_calibration().projection
    height, width = frames[0].read_image().shape[:2]
    cameras = []
    for camera in (1, 2):
        values = {"f_u": projection[0, 0], "f_v": projection[1, 1], "c_u": projection[0, 2], "c_v": projection[1, 2]}
        row = {"key.segment_context_name": name, "key.camera_name": camera, f"{CAMERA}width": width}
        row |= {f"{CAMERA}height": height, f"{CAMERA}extrinsic.transform": matrix.ravel().tolist()}
        cameras.append(row | {f"{CAMERA}intrinsic.{field}": float(value) for field, value in values.items()})
    write(folder / "camera_image" / f"{name}.parquet", images[::-1])
    write(folder / "camera_calibration" / f"{name}.parquet", cameras)
    write(folder / "lidar_box" / f"{name}.parquet", lidar)
    write(folder / "projected_lidar_box" / f"{name}.parquet", projected)
    write(folder / "lidar_camera_synced_box" / f"{name}.parquet", synced)
    return written


def key(segment: str, time: int) -> dict[str, object]:
    return {"key.segment_context_name": segment, "key.frame_timestamp_micros": time}


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, kind in {
        f"{CAMERA}extrinsic.transform": pa.list_(pa.float64(), 16),
        "key.camera_name": pa.int8(),
        f"{LIDAR}type": pa.int8(),
        f"{LIDAR}difficulty_level.detection": pa.int8(),
    }.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table.column(name).cast(kind))
    pq.write_table(table, path, row_group_size=7)
