"""Waymo's parquet files: frames of reference, and the reader."""

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pyarrow", reason="pyarrow is not installed: it comes with the extra waymo")
import pyarrow as pa
import pyarrow.parquet as pq
from waymo_files import NUMBERS, SEGMENTS, extrinsic, points_of, write

from rakd.data.frames import find_frames, read_image
from rakd.data.waymo import find_segments, is_waymo, read_segment
from rakd.data.waymo_geometry import optical_from_vehicle, to_optical, to_vehicle
from rakd.geometry import box_corners, project_boxes, wrap_angle

# Frames of reference


@given(
    st.tuples(*[st.floats(-0.6, 0.6)] * 2),
    st.floats(-np.pi, np.pi),
    st.lists(st.tuples(*[st.floats(-80, 80)] * 3, *[st.floats(0.1, 20)] * 3, st.floats(-4, 4)), min_size=1, max_size=5),
)
def test_boxes_come_back_from_the_camera(tilt, yaw, rows):
    boxes = np.array(rows)
    transform = optical_from_vehicle(extrinsic(yaw, *tilt))
    back = to_vehicle(*to_optical(boxes, transform), transform)
    np.testing.assert_allclose(back[:, :6], boxes[:, :6], rtol=0, atol=1e-9)
    np.testing.assert_allclose(wrap_angle(back[:, 6] - boxes[:, 6]), 0, rtol=0, atol=1e-9)
    one_each = to_vehicle(*to_optical(boxes, transform), np.stack([transform] * len(boxes)))
    np.testing.assert_allclose(one_each, back, rtol=0, atol=1e-12)


def test_an_untilted_camera_turns_angles_as_other_converters_do():
    boxes = np.array([[20.0, 3.0, 1.0, 4.8, 2.0, 1.8, 0.3]])
    location, dimensions, rotation_y = to_optical(boxes, optical_from_vehicle(extrinsic(0, 0, 0)))
    np.testing.assert_allclose(rotation_y, -0.3 - np.pi / 2)
    # 1.5 m before and 2.1 m above the origin; the bottom is at z = 0.1.
    np.testing.assert_allclose(location, [[-3.02, 2.0, 18.5]])
    np.testing.assert_allclose(dimensions, [[1.8, 2.0, 4.8]])


def test_a_tilted_camera_sees_the_box_where_it_is():
    """The corners by way of the vehicle, turned by the whole extrinsic, against those of the converted box."""
    boxes = np.array([[25.0, -4.0, 0.8, 4.8, 2.0, 1.8, 0.7], [12.0, 5.0, 1.0, 0.8, 0.7, 1.7, -2.0]])
    tilt = 0.02
    transform = optical_from_vehicle(extrinsic(0.01, tilt, -tilt))
    corners = box_corners(*to_optical(boxes, transform))
    bottom = boxes[:, :3] - np.array([0, 0, 1]) * boxes[:, 5:6] / 2
    front = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), 0 * boxes[:, 6]], axis=1)
    left = np.stack([-front[:, 1], front[:, 0], front[:, 2]], axis=1)
    along, across = boxes[:, 3:4] / 2 * front, boxes[:, 4:5] / 2 * left
    up = np.array([0, 0, 1]) * boxes[:, 5:6]
    base = [along + across, along - across, -along - across, -along + across]
    exact = np.stack([bottom + step + lift for lift in (0 * up, up) for step in base], axis=1)
    exact = exact @ transform[:3, :3].T + transform[:3, 3]
    # KITTI's boxes are upright in the camera: what the tilt moves corners by remains, no more.
    reach = np.linalg.norm(boxes[:, 3:6], axis=1).max()
    assert np.abs(corners - exact).max() < 2 * tilt * reach
    np.testing.assert_allclose(corners[:, :4].mean(axis=1), exact[:, :4].mean(axis=1), atol=1e-9)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), r"shape \[4, 4\], got \[3, 3\]"),
        (2 * np.eye(4), "a rotation with a translation"),
        (extrinsic(0, np.pi / 2, 0), "looks along the ground"),
    ],
)
def test_no_extrinsic(matrix, message):
    with pytest.raises(ValueError, match=message):
        optical_from_vehicle(matrix)


# The reader


def test_frames_are_those_that_were_written(waymo, scenes):
    root, written = waymo
    images = find_frames(scenes)
    for first, (split, segment) in zip(
        (0, 3, 6), [(s, n) for s, names in SEGMENTS.items() for n in names], strict=True
    ):
        frames = sorted(read_segment(root, split, segment), key=lambda frame: frame.number)
        assert [frame.number for frame in frames] == [0, 1, 2]
        assert [frame.time for frame in frames] == [1_000_000, 1_100_000, 1_200_000]
        for i, (frame, objects) in enumerate(zip(frames, written[segment], strict=True)):
            read = frame.objects()
            kept = points_of(first + i, len(objects)) > 0
            assert read.types.tolist() == objects.types[kept].tolist()
            np.testing.assert_allclose(read.location, objects.location[kept], atol=1e-9)
            np.testing.assert_allclose(read.dimensions, objects.dimensions[kept], atol=1e-9)
            np.testing.assert_allclose(wrap_angle(read.rotation_y - objects.rotation_y[kept]), 0, atol=1e-9)
            np.testing.assert_allclose(read.boxes, objects.boxes[kept], atol=1e-9)
            assert "behind" in frame.labels.ids
            original = images[first + i].read_image().astype(int)
            path = root / "probe.jpg"
            path.write_bytes(frame.image)
            assert np.abs(read_image(path).astype(int) - original).mean() < 4  # JPEG
            path.unlink()


def test_boxes_project_as_those_of_the_scenes_do(waymo, scenes):
    """Through the vehicle and a tilted camera, and in the scenes' own calibration."""
    root, _ = waymo
    compared = 0
    for frame in read_segment(root, "training", "10_a", images=False):
        scene = find_frames(scenes)[frame.number]
        labels = scene.read_labels()
        labels = labels.select(np.isin(labels.types, list(NUMBERS)))
        labels = labels.select(points_of(frame.number, len(labels)) > 0)
        here, there = (
            project_boxes(calibration, box_corners(o.location, o.dimensions, o.rotation_y), (1242, 375))
            for calibration, o in ((frame.camera.calibration, frame.objects()), (scene.read_calibration(), labels))
        )
        np.testing.assert_allclose(here, there, atol=1e-6)
        compared += len(here)
    assert compared > 5


def test_every_second_frame_and_another_camera(waymo):
    root, _ = waymo
    frames = list(read_segment(root, "training", "10_a", every=2, images=False))
    assert sorted(frame.number for frame in frames) == [0, 2]
    assert {frame.image for frame in frames} == {b""}
    others = list(read_segment(root, "training", "10_a", camera="FRONT_LEFT"))
    assert [len(frame.objects()) for frame in others] == [0, 0, 0]
    assert {frame.image for frame in others} == {b"another"}


def test_synced_boxes_count_the_top_lidars_points(waymo):
    root, _ = waymo
    labelled, synced = (
        {f.number: f.labels for f in read_segment(root, "training", "10_a", boxes=boxes, images=False)}
        for boxes in ("lidar", "synced")
    )
    for number, labels in labelled.items():
        seen = labels.ids != "behind"
        moved = synced[number]
        assert moved.ids.tolist() == labels.ids[seen].tolist()
        np.testing.assert_allclose(moved.boxes[:, 0], labels.boxes[seen, 0] + 0.1)
        assert moved.points.tolist() == (labels.points[seen] // 2).tolist()


def test_segments_by_list(waymo):
    root, _ = waymo
    assert is_waymo(root)
    assert find_segments(root, "training") == ["10_a", "20_b"]
    assert find_segments(root, "training", ["20_b"]) == ["20_b"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet is not there: the list names this segment"):
        find_segments(root, "training", ["nowhere"])
    with pytest.raises(ValueError, match="20_b is listed several times"):
        find_segments(root, "training", ["20_b", "20_b"])
    with pytest.raises(FileNotFoundError, match="expected version 2"):
        find_segments(root, "testing")


@pytest.fixture
def broken(waymo, tmp_path):
    """A copy to break."""
    shutil.copytree(waymo[0] / "training", tmp_path / "training")
    return tmp_path


@pytest.mark.parametrize("component", ["camera_image", "camera_calibration", "lidar_box", "projected_lidar_box"])
def test_missing_truncated_and_foreign_files_are_named(broken, component):
    path = broken / "training" / component / "10_a.parquet"
    content = path.read_bytes()

    def error(kind, message):
        with pytest.raises(kind, match=message) as caught:
            list(read_segment(broken, "training", "10_a"))
        assert str(path) in str(caught.value)

    path.unlink()
    error(FileNotFoundError, f"is not there: the component {component} of segment 10_a")
    for length in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        error(ValueError, "not a whole parquet file")
    table = pq.read_table(pa.BufferReader(content))
    pq.write_table(table.rename_columns([f"v3.{name}" for name in table.column_names]), path)
    error(ValueError, "expected the columns of version 2 of the data set")
    shutil.copy(path.with_name("20_b.parquet"), path)
    error(ValueError, "expected rows of segment 10_a, got some of 20_b")


def rewrite(path, change):
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), path)


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        (
            "lidar_box",
            lambda rows: rows + rows[-1:],
            "expected one row for each time and object, got several of behind",
        ),
        ("projected_lidar_box", lambda rows: rows + rows[:1], "expected one row for each time and object"),
        ("lidar_camera_synced_box", lambda rows: rows + rows[:1], "expected one row for each time and object"),
        ("lidar_box", lambda rows: [], r"projected_lidar_box/10_a\.parquet: no box is of a time and object in"),
        (
            "lidar_box",
            lambda rows: [row | {"key.frame_timestamp_micros": row["key.frame_timestamp_micros"] + 1} for row in rows],
            "no box is of a time and object in .*, such as object-0 at 1000000",
        ),
        (
            "projected_lidar_box",
            lambda rows: [row | {"key.laser_object_id": row["key.laser_object_id"] + "_FRONT"} for row in rows],
            "no box is of a time and object in .*, such as object-0_FRONT at 1000000",
        ),
        (
            "projected_lidar_box",
            lambda rows: [rows[0] | {"[ProjectedLiDARBoxComponent].box.size.x": float("nan")}, *rows[1:]],
            "boxes must be finite, that of object-0 is not",
        ),
        (
            "camera_image",
            lambda rows: [row | {"[CameraImageComponent].image": None} for row in rows],
            r"\[CameraImageComponent\]\.image has missing values",
        ),
    ],
)
def test_components_that_do_not_belong_together_give_no_empty_labels(broken, component, change, message):
    rewrite(broken / "training" / component / "10_a.parquet", change)
    with pytest.raises(ValueError, match=rf"10_a\.parquet: .*{message}|{message}") as caught:
        list(read_segment(broken, "training", "10_a", boxes="synced"))
    assert component in str(caught.value)


def test_missing_synced_boxes_matter_only_when_asked_for(broken):
    path = broken / "training" / "lidar_camera_synced_box" / "10_a.parquet"
    path.unlink()
    assert list(read_segment(broken, "training", "10_a", images=False))
    with pytest.raises(FileNotFoundError, match="lidar_camera_synced_box"):
        read_segment(broken, "training", "10_a", boxes="synced")


def test_damaged_images_are_named(broken):
    """A file whose end is whole: what is wrong shows only while images are read."""
    path = broken / "training" / "camera_image" / "10_a.parquet"
    content = bytearray(path.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"camera_image/10_a\.parquet"):
        list(read_segment(broken, "training", "10_a"))


def test_version_1_is_named(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "segment-1.tfrecord").touch()
    with pytest.raises(ValueError, match=r"segment-1\.tfrecord: a file of version 1"):
        find_segments(tmp_path, "training")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"camera": "REAR"}, "camera must be one of FRONT, .*got 'REAR'"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"boxes": "radar"}, "boxes must be lidar or synced, got 'radar'"),
    ],
)
def test_wrong_options(waymo, options, message):
    with pytest.raises(ValueError, match=message):
        read_segment(waymo[0], "training", "10_a", **options)


def test_memory_is_bounded_by_few_images(tmp_path):
    """A segment of 60 MB in one row group is read with a fraction of that; pyarrow's pool counts what it holds."""
    size, count = 500_000, 120
    rng = np.random.default_rng(0)
    rows = [
        {
            "key.segment_context_name": "big",
            "key.frame_timestamp_micros": i,
            "key.camera_name": 1,
            "[CameraImageComponent].image": rng.bytes(size),
        }
        for i in range(count)
    ]
    folder = tmp_path / "testing"
    write(folder / "camera_image" / "big.parquet", rows)
    pq.write_table(pq.read_table(folder / "camera_image" / "big.parquet"), folder / "camera_image" / "big.parquet")
    assert pq.ParquetFile(folder / "camera_image" / "big.parquet").num_row_groups == 1
    names = ("f_u", "f_v", "c_u", "c_v")
    camera = {"key.segment_context_name": "big", "key.camera_name": 1}
    camera |= {f"[CameraCalibrationComponent].intrinsic.{name}": 100.0 for name in names}
    camera |= {"[CameraCalibrationComponent].extrinsic.transform": extrinsic().ravel().tolist()}
    camera |= {"[CameraCalibrationComponent].width": 10, "[CameraCalibrationComponent].height": 10}
    write(folder / "camera_calibration" / "big.parquet", [camera])
    del rows
    before, peak, seen = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for frame in read_segment(tmp_path, "testing", "big"):
        seen += len(frame.image)
        peak = max(peak, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == size * count
    assert peak + python < size * count / 3


def test_without_pyarrow_the_error_names_the_extra(waymo):
    code = (
        "import sys; sys.modules['pyarrow'] = None\nfrom rakd.data.waymo import read_segment\n"
        f"read_segment({str(waymo[0])!r}, 'training', '10_a')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True
    )
    assert "pyarrow is not installed; run: pip install 'rakd[waymo]'" in done.stderr
