import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rakd.geometry import (
    BOX_EDGES,
    MIRRORED_CORNERS,
    Calibration,
    alpha_from_rotation,
    box_centers,
    box_corners,
    flip_boxes,
    flip_rotation,
    project_boxes,
    resize_boxes,
    rotation_from_alpha,
    wrap_angle,
)

WIDTH, HEIGHT = 1242, 375


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


calibrations = st.builds(
    lambda fx, fy, cx, cy, a, b, c: Calibration(np.array([[fx, 0, cx, a], [0, fy, cy, b], [0, 0, 1, c]])),
    *(numbers(200, 2000), numbers(200, 2000), numbers(0, 1500), numbers(0, 500)),
    *(numbers(-400, 400), numbers(-5, 5), numbers(-0.01, 0.01)),
)
angles = numbers(-math.pi, math.pi)
places = st.tuples(numbers(-40, 40), numbers(-3, 3), numbers(1, 90))
sizes = st.tuples(numbers(0.3, 4), numbers(0.3, 3), numbers(0.3, 12))
scales = numbers(0.2, 3)


@pytest.fixture
def kitti() -> Calibration:
    return Calibration(np.array([[721.5, 0, 609.6, 44.86], [0, 721.5, 172.9, 0.2164], [0, 0, 1, 0.002746]]))


@given(calibrations, st.lists(places, min_size=1, max_size=5))
def test_back_projection_inverts_projection(calibration, points):
    points = np.array(points)
    pixels, depth = calibration.project(points)
    assert (depth > 0).all()
    np.testing.assert_allclose(calibration.back_project(pixels, points[:, 2]), points, atol=1e-7)


@given(calibrations, places)
def test_flipping_twice_changes_nothing(calibration, point):
    twice = calibration.flipped(WIDTH).flipped(WIDTH)
    np.testing.assert_allclose(twice.projection, calibration.projection, atol=1e-9)
    boxes = np.array([[10.0, 20.0, 30.5, 40.0]])
    np.testing.assert_allclose(flip_boxes(flip_boxes(boxes, WIDTH), WIDTH), boxes)


@given(calibrations, places)
def test_flipped_camera_sees_mirrored_points_mirrored(calibration, point):
    x, y, z = point
    pixel, _ = calibration.project([x, y, z])
    mirrored, _ = calibration.flipped(WIDTH).project([-x, y, z])
    np.testing.assert_allclose(mirrored, [WIDTH - 1 - pixel[0], pixel[1]], rtol=1e-9, atol=1e-6)


@given(calibrations, places, scales, scales)
def test_resized_camera_sees_points_where_resized_pixels_are(calibration, point, sx, sy):
    pixel, _ = calibration.project(point)
    resized, _ = calibration.resized(sx, sy).project(point)
    np.testing.assert_allclose(resized, resize_boxes(pixel, sx, sy), rtol=1e-9, atol=1e-6)


@given(calibrations, scales, scales)
def test_resizing_back_changes_nothing(calibration, sx, sy):
    back = calibration.resized(sx, sy).resized(1 / sx, 1 / sy)
    np.testing.assert_allclose(back.projection, calibration.projection, rtol=1e-9, atol=1e-7)


def test_resize_keeps_the_edges_of_the_image():
    # Pixel centres 0..99 lie 0.5 inside the edges -0.5 and 99.5; at twice the size the edge is at 199.5.
    np.testing.assert_allclose(resize_boxes([-0.5, -0.5, 99.5, 49.5], 2, 3), [-0.5, -0.5, 199.5, 149.5])


@given(angles, places)
def test_alpha_and_rotation_are_inverse_over_the_circle(rotation, place):
    alpha = alpha_from_rotation(rotation, place)
    assert -math.pi <= alpha <= math.pi
    back = rotation_from_alpha(alpha, place)
    assert abs(math.remainder(float(back) - rotation, 2 * math.pi)) < 1e-9


def test_alpha_known_values():
    # Straight ahead both angles agree; at 45 degrees to the right alpha is 45 degrees less.
    np.testing.assert_allclose(alpha_from_rotation(0.3, [0, 1, 20]), 0.3)
    np.testing.assert_allclose(alpha_from_rotation(0.3, [20, 1, 20]), 0.3 - math.pi / 4)
    np.testing.assert_allclose(alpha_from_rotation(-3.0, [20, 1, 20]), 2 * math.pi - 3 - math.pi / 4)


@given(numbers(-50, 50))
def test_wrapped_angles_point_the_same_way(angle):
    wrapped = float(wrap_angle(angle))
    assert -math.pi - 1e-12 <= wrapped <= math.pi + 1e-12
    assert math.isclose(math.cos(wrapped), math.cos(angle), abs_tol=1e-9)
    assert math.isclose(math.sin(wrapped), math.sin(angle), abs_tol=1e-9)


@given(angles)
def test_wrapping_leaves_angles_inside_alone(angle):
    assert float(wrap_angle(angle)) == angle


def test_corners_of_a_known_box():
    corners = box_corners([1, 2, 10], [1.5, 2, 4], 0.0)
    np.testing.assert_allclose(corners[0], [3, 2, 11])
    np.testing.assert_allclose(corners[6], [-1, 0.5, 9])
    # A quarter turn brings the front from +x to -z, towards the camera.
    turned = box_corners([1, 2, 10], [1.5, 2, 4], math.pi / 2)
    np.testing.assert_allclose(turned[[0, 1], 2], [8, 8])


@given(places, sizes, angles)
def test_corners_keep_size_and_center(place, size, rotation):
    corners = box_corners(place, size, rotation)
    lengths = np.linalg.norm(corners[BOX_EDGES[:, 0]] - corners[BOX_EDGES[:, 1]], axis=1)
    height, width, length = size
    np.testing.assert_allclose(lengths, [width, length] * 4 + [height] * 4, rtol=1e-9)
    np.testing.assert_allclose(corners.mean(axis=0), box_centers(place, size), atol=1e-9)


@given(places, sizes, angles)
def test_mirrored_box_has_mirrored_corners(place, size, rotation):
    x, y, z = place
    mirrored = box_corners([-x, y, z], size, flip_rotation(rotation))
    expected = box_corners(place, size, rotation) * [-1, 1, 1]
    np.testing.assert_allclose(mirrored[MIRRORED_CORNERS], expected, atol=1e-9)


def test_points_behind_the_camera_have_no_image(kitti):
    pixels, depth = kitti.project([[0, 0, -5], [0, 0, 5], [1, 1, -0.002746]])
    assert np.isnan(pixels[[0, 2]]).all()
    assert np.isfinite(pixels[1]).all()
    assert depth[0] < 0 < depth[1]


def test_box_behind_the_camera_or_aside_has_no_image(kitti):
    corners = box_corners([[0, 1.6, -10], [-60, 1.6, 10]], [[1.5, 1.6, 4]] * 2, [0.0, 0.0])
    assert np.isnan(project_boxes(kitti, corners, (WIDTH, HEIGHT))).all()


def test_box_through_the_camera_plane_is_cut(kitti):
    # A car beside the camera, from 2 m behind to 2 m in front: it fills the image's right edge.
    corners = box_corners([[1.5, 1.6, 0.0]], [[1.5, 1.6, 4.0]], [math.pi / 2])
    (box,) = project_boxes(kitti, corners, (WIDTH, HEIGHT))
    assert box[2] == WIDTH - 1
    assert box[3] == HEIGHT - 1
    assert WIDTH / 2 < box[0] < WIDTH - 1
    # Its nearest point, 0.7 m aside and 2 m ahead, bounds it on the left.
    np.testing.assert_allclose(box[0], kitti.project([0.7, 0, 2.0])[0][0])


@given(places, sizes, angles)
def test_projected_box_holds_all_corners_in_the_image(place, size, rotation):
    calibration = Calibration(np.array([[700.0, 0, 600, 40], [0, 700, 170, 0.2], [0, 0, 1, 0.003]]))
    corners = box_corners([place], [size], [rotation])
    pixels, depth = calibration.project(corners[0])
    (box,) = project_boxes(calibration, corners, (WIDTH, HEIGHT))
    inside = (depth > 0.1) & (pixels >= 0).all(axis=1) & (pixels <= [WIDTH - 1, HEIGHT - 1]).all(axis=1)
    assert (pixels[inside] >= box[:2] - 1e-9).all()
    assert (pixels[inside] <= box[2:] + 1e-9).all()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), r"shape \[3, 4\], got \[3, 3\]"),
        (np.full((3, 4), np.nan), "finite"),
        (np.ones((3, 4)), "rectified pinhole"),
        (np.diag([-1.0, 1, 1]) @ np.eye(3, 4), "positive fx"),
    ],
)
def test_bad_calibration(matrix, message):
    with pytest.raises(ValueError, match=message):
        Calibration(matrix)


def test_calibration_cannot_be_changed(kitti):
    with pytest.raises(ValueError, match="read-only"):
        kitti.projection[0, 0] = 1


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf])
def test_bad_scale(kitti, scale):
    with pytest.raises(ValueError, match="scale_x and scale_y must be positive"):
        kitti.resized(1.0, scale)


def test_bad_corners(kitti):
    with pytest.raises(ValueError, match=r"corners must have shape \[N, 8, 3\], got \[8, 3\]"):
        project_boxes(kitti, np.zeros((8, 3)), (10, 10))
