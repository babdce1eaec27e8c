"""Boxes between Waymo's vehicle frame and a camera's optical frame, which is the project's (KITTI's).

- Vehicle frame: x forward, y left, z up, metres. A box is (x, y, z, length, width, height, heading): its centre, its
  sizes, and the angle in radians about z from x to its front. Boxes are upright: z is their vertical.
- Waymo's camera frame: x forward, y left, z up; its extrinsic turns and moves it to the vehicle frame.
- Optical frame: x right, y down, z forward, as `rakd.geometry` describes it.
"""

import numpy as np
import numpy.typing as npt

from rakd.geometry import FloatArray

OPTICAL_AXES = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
"""Turns x forward, y left, z up into x right, y down, z forward."""

# Below, the ground is seen so nearly edge-on to the optical x-z plane that angles about y say nothing about headings.
_MIN_GROUND = 0.1


def optical_from_vehicle(extrinsic: npt.ArrayLike) -> FloatArray:
    """The transform from the vehicle frame to a camera's optical frame.

    Args:
        extrinsic: ``[4, 4]`` from Waymo's camera frame to the vehicle frame, as the calibration holds it.

    Returns:
        ``[4, 4]``.

    Raises:
        ValueError: The extrinsic has another shape or is not a rigid motion, or the camera does not look along the
            ground.
    """
    matrix = np.asarray(extrinsic, dtype=np.float64)
    check_rigid(matrix, "extrinsic")
    turn = OPTICAL_AXES @ matrix[:3, :3].T
    result = np.eye(4)
    result[:3, :3] = turn
    result[:3, 3] = -turn @ matrix[:3, 3]
    check_optical(result, "extrinsic")
    return result


def check_rigid(matrix: FloatArray, name: str) -> None:
    """Raise a ValueError unless a matrix is a ``[4, 4]`` rotation with a translation."""
    if matrix.shape != (4, 4):
        raise ValueError(f"{name} must have shape [4, 4], got {list(matrix.shape)}")
    turn = matrix[:3, :3]
    rigid = np.isfinite(matrix).all() and np.abs(turn @ turn.T - np.eye(3)).max() < 1e-4 and np.linalg.det(turn) > 0
    if not rigid or (matrix[3] != (0, 0, 0, 1)).any():
        raise ValueError(f"{name} must be a rotation with a translation, got {matrix.tolist()}")


def check_optical(transform: FloatArray, name: str) -> None:
    """Raise a ValueError unless a transform turns z up into y down, more or less."""
    ground = transform[[0, 2], :2]
    if transform[1, 2] > -_MIN_GROUND or abs(np.linalg.det(ground)) < _MIN_GROUND:
        raise ValueError(
            f"{name} must turn a vehicle's axes (z up) into those of a camera that looks along the ground (y down), "
            f"got the rotation {transform[:3, :3].tolist()}"
        )


def to_optical(boxes: FloatArray, transform: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Take boxes from the vehicle frame to a camera's optical frame.

    The bottom centre moves with the camera's full rotation. ``rotation_y`` is the angle, about the camera's y axis, of
    the turned direction of the box; the camera's tilt moves it by little, and `to_vehicle` takes it back exactly.

    Args:
        boxes: ``[N, 7]`` x, y, z (centre), length, width, height, heading.
        transform: ``[4, 4]``, as `optical_from_vehicle` gives it.

    Returns:
        Bottom centres ``[N, 3]``; height, width, length ``[N, 3]``; rotation_y ``[N]`` in [-π, π].
    """
    bottom = boxes[:, :3].copy()
    bottom[:, 2] -= boxes[:, 5] / 2
    heading = boxes[:, 6]
    front = np.stack([np.cos(heading), np.sin(heading)], axis=1) @ transform[:3, :2].T
    location = bottom @ transform[:3, :3].T + transform[:3, 3]
    return location, boxes[:, [5, 4, 3]], np.arctan2(-front[:, 2], front[:, 0])


def to_vehicle(
    location: FloatArray, dimensions: FloatArray, rotation_y: FloatArray, transform: FloatArray
) -> FloatArray:
    """Take boxes from a camera's optical frame to the vehicle frame; undoes `to_optical`.

    Args:
        location: ``[N, 3]`` bottom centres.
        dimensions: ``[N, 3]`` height, width, length.
        rotation_y: ``[N]`` radians.
        transform: ``[4, 4]`` of `optical_from_vehicle`, or one for each box, ``[N, 4, 4]``.

    Returns:
        ``[N, 7]`` x, y, z (centre), length, width, height, heading in [-π, π].
    """
    turn, shift = transform[..., :3, :3], transform[..., :3, 3]
    center = np.einsum("...ji,...j->...i", turn, location - shift)
    center[:, 2] += dimensions[:, 0] / 2
    # The front is the direction on the vehicle's ground whose image in the optical x-z plane has the angle rotation_y.
    sin, cos = np.sin(rotation_y), np.cos(rotation_y)
    (x_of_x, x_of_y), (z_of_x, z_of_y) = np.moveaxis(turn[..., [0, 2], :2], (-2, -1), (0, 1))
    x = z_of_y * cos + x_of_y * sin
    y = -(z_of_x * cos + x_of_x * sin)
    determinant = x_of_x * z_of_y - x_of_y * z_of_x
    heading = np.arctan2(y * np.sign(determinant), x * np.sign(determinant))
    return np.concatenate([center, dimensions[:, [2, 1, 0]], heading[:, None]], axis=1)
