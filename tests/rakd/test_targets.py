import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import roi_align

from rakd.data.labels import Objects
from rakd.data.targets import make_targets, pooling_boxes, visible_shares
from rakd.geometry import MIRRORED_CORNERS, Calibration, alpha_from_rotation, box_corners, project_boxes

SIZE = (1242, 375)
CALIBRATION = Calibration(np.array([[720.0, 0, 610, 45], [0, 720, 173, 0.2], [0, 0, 1, 0.003]]))


def make_objects(*rows: tuple[str, float, float]) -> Objects:
    """Cars and the like, each a type with x and z; 2D boxes are their projections."""
    types, x, z = zip(*rows, strict=True)
    count = len(rows)
    location = np.stack([x, np.full(count, 1.65), z], axis=1)
    dimensions = np.tile([1.5, 1.6, 3.9], (count, 1))
    rotation = np.full(count, 0.4)
    boxes = project_boxes(CALIBRATION, box_corners(location, dimensions, rotation), SIZE)
    zeros = np.zeros(count)
    alpha = alpha_from_rotation(rotation, location)
    return Objects(np.array(types), zeros, zeros.astype(np.int64), alpha, boxes, dimensions, location, rotation)


def test_targets_give_the_object_back():
    targets = make_targets(make_objects(("car", 2, 15), ("Cyclist", -5, 20)), CALIBRATION, SIZE)
    assert targets.classes.tolist() == [0, 2]
    depth = CALIBRATION.projection[1, 1] * targets.dimensions[:, 0] / targets.projected_height
    np.testing.assert_allclose(depth, [15, 20], rtol=1e-6)
    centers = CALIBRATION.back_project(targets.keypoints[:, 8].numpy(), depth.numpy())
    np.testing.assert_allclose(centers, [[2, 0.9, 15], [-5, 0.9, 20]], atol=1e-4)
    assert targets.keypoints_seen.all()
    low, high = targets.keypoints[:, :8].amin(1), targets.keypoints[:, :8].amax(1)
    np.testing.assert_allclose(targets.boxes[:, :2], low, atol=1e-3)
    np.testing.assert_allclose(targets.boxes[:, 2:], high, atol=1e-3)


@pytest.mark.parametrize(
    ("objects", "wanted"),
    [
        (make_objects(("Van", 0, 15)), False),  # another class
        (make_objects(("Car", 0, 55)), False),  # 1.5 m at 55 m: under 22 px
        (make_objects(("Car", 0, 45)), True),
        (make_objects(("Car", -14.5, 16)), False),  # centre outside the image
        (dataclasses.replace(make_objects(("Car", 0, 15)), location=np.full((1, 3), -1000.0)), False),
    ],
)
def test_what_is_ignored(objects, wanted):
    targets = make_targets(objects, CALIBRATION, SIZE)
    assert len(targets) == wanted
    np.testing.assert_allclose(targets.ignored, objects.boxes[[not wanted]], rtol=1e-6)


def test_hidden_objects_are_ignored_and_any_type_hides():
    for front in ("Car", "Tram"):
        targets = make_targets(make_objects(("Car", 0, 30), (front, 0, 12)), CALIBRATION, SIZE)
        assert targets.location[:, 2].tolist() == ([12] if front == "Car" else [])
    apart = make_targets(make_objects(("Car", 8, 30), ("Car", 0, 12)), CALIBRATION, SIZE)
    assert len(apart) == 2


def test_least_height_goes_with_the_image():
    objects = make_objects(("Car", 0, 45)).resized(0.5, 0.5)
    half = CALIBRATION.resized(0.5, 0.5)
    assert len(make_targets(objects, half, (621, 188))) == 0
    assert len(make_targets(objects, half, (621, 188), scale=0.5)) == 1


def test_no_objects():
    empty = make_objects(("Car", 0, 10)).select(np.zeros(0, dtype=np.int64))
    targets = make_targets(empty, CALIBRATION, SIZE)
    assert len(targets) == 0
    assert targets.keypoints.shape == (0, 9, 2)
    assert targets.ignored.shape == (0, 4)


def test_flipping_mirrors_targets():
    objects = make_objects(("Car", 2, 15), ("Pedestrian", -5, 20))
    plain = make_targets(objects, CALIBRATION, SIZE)
    mirrored = make_targets(objects.flipped(SIZE[0]), CALIBRATION.flipped(SIZE[0]), SIZE)
    order = [*MIRRORED_CORNERS, 8]
    expected = plain.keypoints[:, order].numpy()
    expected[..., 0] = SIZE[0] - 1 - expected[..., 0]
    np.testing.assert_allclose(mirrored.keypoints, expected, atol=2e-3)
    np.testing.assert_allclose(mirrored.projected_height, plain.projected_height)
    np.testing.assert_allclose(mirrored.alpha.sin(), plain.alpha.sin(), atol=1e-6)
    np.testing.assert_allclose(mirrored.alpha.cos(), -plain.alpha.cos(), atol=1e-6)


def test_an_angle_that_other_tools_leave_out_is_that_of_rotation_and_place():
    objects = make_objects(("Car", 2, 15), ("Car", -6, 20))
    without = dataclasses.replace(objects, alpha=np.full(2, -10.0))
    for ours, theirs in ((without, objects), (without.flipped(SIZE[0]), objects.flipped(SIZE[0]))):
        found, expected = (make_targets(each, CALIBRATION, SIZE).alpha for each in (ours, theirs))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_corners_behind_the_camera_are_marked():
    objects = dataclasses.replace(
        make_objects(("Car", 0.5, 1.5)),
        boxes=np.array([[400.0, 100, 1241, 374]]),
        rotation_y=np.array([1.57]),
    )
    targets = make_targets(objects, CALIBRATION, (1242, 2000))
    assert targets.keypoints_seen.sum() == 5
    assert (targets.keypoints[~targets.keypoints_seen] == 0).all()
    # So are those less than NEAR before it, at 0.05 m here, whose pixels would be far away; not those at 0.25 m.
    for z, seen in ((2.0, 5), (2.2, 9)):
        moved = dataclasses.replace(objects, location=np.array([[0.5, 1.65, z]]))
        assert make_targets(moved, CALIBRATION, (1242, 2000)).keypoints_seen.sum() == seen


boxes = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(0, 8)] * 2)


@given(st.lists(st.tuples(boxes, st.integers(1, 5)), max_size=6))
def test_visible_shares_agree_with_painting(rows):
    table = np.array([(x, y, x + w, y + h) for (x, y, w, h), _ in rows], dtype=float).reshape(-1, 4)
    distance = np.array([z for _, z in rows], dtype=float)
    canvas = np.full((24, 24), -1)
    for i in np.argsort(distance, kind="stable")[::-1]:
        x1, y1, x2, y2 = table[i].astype(int)
        canvas[y1:y2, x1:x2] = i
    # Painting from far to near leaves the nearest; of equals the first one, which is painted last.
    for i, share in enumerate(visible_shares(table, distance)):
        area = (table[i, 2] - table[i, 0]) * (table[i, 3] - table[i, 1])
        assert share == pytest.approx((canvas == i).sum() / area if area else 0.0)


def test_pooling_boxes_cover_the_pixels_that_the_box_does() -> None:
    # Of an image whose pixels hold their places, boxes pool their own centres.
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    boxes = [torch.tensor([[4.0, 5, 20, 13], [10.5, 9.25, 30, 20]]), torch.zeros(0, 4)]
    before = [rows.clone() for rows in boxes]
    pooled = roi_align(torch.stack([x, y])[None], pooling_boxes(boxes)[:1], 7, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(pooled.mean(dim=(2, 3)), (boxes[0][:, :2] + boxes[0][:, 2:]) / 2)
    assert [rows.shape for rows in pooling_boxes(boxes)] == [(2, 4), (0, 4)]
    assert all(torch.equal(*pair) for pair in zip(boxes, before, strict=True))
