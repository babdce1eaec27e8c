"""Cameras and boxes: projection, corners, angles, and what flips and resizes do to them.

Conventions, all KITTI's:

- Camera frame: x right, y down, z forward, metres. Angles in radians.
- ``location`` is the centre of a box's *bottom* face; ``dimensions`` are (height, width, length).
- At ``rotation_y = 0`` the length runs along x; the angle turns the box about the y axis (from z towards x).
- ``alpha = rotation_y - atan2(x, z)`` is the orientation as the camera sees it.
- Pixel coordinates put the *centre* of the first pixel at (0, 0), so an image spans ``[0, width - 1]``
  from first to last centre, and mirroring sends ``u`` to ``width - 1 - u``.

Arrays are float64. The formulas are plain arithmetic on the last axis, so they carry over to tensors.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Signs of half length, height and half width of the 8 corners: bottom face first, then the top face, each
# in ring order. Corners i and i ^ 1 differ in the width's sign only: they swap in a mirrored image.
_LENGTH_SIGNS = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
_HEIGHT_SIGNS = np.array([0.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0])
_WIDTH_SIGNS = np.array([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])

MIRRORED_CORNERS = np.array([1, 0, 3, 2, 5, 4, 7, 6])
"""Index of each corner in the list of corners of the mirrored box."""

BOX_EDGES = np.array([(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)])
"""Pairs of corners that the 12 edges of a box join."""

NEAR = 0.1
"""Depth in metres of the plane that boxes are cut at before projection."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A rectified pinhole camera, ``depth · (u, v, 1) = projection · (x, y, z, 1)``.

    Attributes:
        projection: ``[3, 4]`` float64, of the form ``[[fx, 0, cx, a], [0, fy, cy, b], [0, 0, 1, c]]``.
            The last column is the offset between this camera and the frame that boxes are given in.
            Kept as a read-only copy.

    Raises:
        ValueError: The matrix has another shape or form, or entries that are not finite.
    """

    projection: FloatArray

    def __post_init__(self) -> None:
        matrix = np.array(self.projection, dtype=np.float64)
        if matrix.shape != (3, 4):
            raise ValueError(f"projection must have shape [3, 4], got {list(matrix.shape)}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"projection must be finite, got {matrix.tolist()}")
        pinhole = matrix[0, 1] == 0 and matrix[1, 0] == 0 and (matrix[2, :3] == (0, 0, 1)).all()
        if not pinhole or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
            raise ValueError(
                "projection must be a rectified pinhole [[fx, 0, cx, a], [0, fy, cy, b], [0, 0, 1, c]] "
                f"with positive fx and fy, got {matrix.tolist()}"
            )
        matrix.flags.writeable = False
        object.__setattr__(self, "projection", matrix)

    def project(self, points: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Project points to pixels.

        Args:
            points: ``[..., 3]``, metres.

        Returns:
            Pixels ``[..., 2]`` and depths ``[...]`` in front of the camera. A point that is not in front
            of it (depth <= 0) has no image: its pixel is NaN, never a mirrored ghost.
        """
        points = np.asarray(points, dtype=np.float64)
        matrix = self.projection
        depth = points[..., 2] + matrix[2, 3]
        visible = depth > 0
        safe = np.where(visible, depth, 1.0)
        u = (matrix[0, 0] * points[..., 0] + matrix[0, 2] * points[..., 2] + matrix[0, 3]) / safe
        v = (matrix[1, 1] * points[..., 1] + matrix[1, 2] * points[..., 2] + matrix[1, 3]) / safe
        pixels = np.where(visible[..., None], np.stack([u, v], axis=-1), np.nan)
        return pixels, depth

    def back_project(self, pixels: npt.ArrayLike, z: npt.ArrayLike) -> FloatArray:
        """Find the points that project to ``pixels`` and have the coordinate ``z``.

        Args:
            pixels: ``[..., 2]``.
            z: ``[...]``, the z coordinate of the points in metres (not the depth from the camera's own
                centre, which differs by the offset ``projection[2, 3]``).

        Returns:
            ``[..., 3]`` points in metres.
        """
        pixels = np.asarray(pixels, dtype=np.float64)
        z = np.asarray(z, dtype=np.float64)
        matrix = self.projection
        depth = z + matrix[2, 3]
        x = (pixels[..., 0] * depth - matrix[0, 2] * z - matrix[0, 3]) / matrix[0, 0]
        y = (pixels[..., 1] * depth - matrix[1, 2] * z - matrix[1, 3]) / matrix[1, 1]
        return np.stack(np.broadcast_arrays(x, y, z), axis=-1)

    def flipped(self, width: int) -> "Calibration":
        """Calibration of the mirrored image of ``width`` pixels, for boxes mirrored in x."""
        image_mirror = np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        return Calibration(image_mirror @ self.projection @ np.diag([-1.0, 1.0, 1.0, 1.0]))

    def resized(self, scale_x: float, scale_y: float) -> "Calibration":
        """Calibration of the image resized by the two factors; boxes in space stay as they are."""
        _check_scales(scale_x, scale_y)
        matrix = np.array([[scale_x, 0.0, (scale_x - 1) / 2], [0.0, scale_y, (scale_y - 1) / 2], [0.0, 0.0, 1.0]])
        return Calibration(matrix @ self.projection)


def wrap_angle(angle: npt.ArrayLike) -> FloatArray:
    """Bring angles to [-π, π]; angles already inside stay as they are, to the last bit."""
    angle = np.asarray(angle, dtype=np.float64)
    return np.asarray(angle - 2 * np.pi * np.round(angle / (2 * np.pi)))


def alpha_from_rotation(rotation_y: npt.ArrayLike, location: npt.ArrayLike) -> FloatArray:
    """Observation angle of boxes, in [-π, π].

    Args:
        rotation_y: ``[...]`` radians.
        location: ``[..., 3]`` metres.
    """
    location = np.asarray(location, dtype=np.float64)
    return wrap_angle(np.asarray(rotation_y) - np.arctan2(location[..., 0], location[..., 2]))


def rotation_from_alpha(alpha: npt.ArrayLike, location: npt.ArrayLike) -> FloatArray:
    """Rotation about the y axis from the observation angle, in [-π, π].

    Args:
        alpha: ``[...]`` radians.
        location: ``[..., 3]`` metres.
    """
    location = np.asarray(location, dtype=np.float64)
    return wrap_angle(np.asarray(alpha) + np.arctan2(location[..., 0], location[..., 2]))


def box_corners(location: npt.ArrayLike, dimensions: npt.ArrayLike, rotation_y: npt.ArrayLike) -> FloatArray:
    """The 8 corners of 3D boxes.

    Args:
        location: ``[..., 3]``, bottom centres in metres.
        dimensions: ``[..., 3]``, height, width, length in metres.
        rotation_y: ``[...]`` radians.

    Returns:
        ``[..., 8, 3]``: the bottom face's ring, then the top face's, starting at the front; `BOX_EDGES`
        lists the edges, `MIRRORED_CORNERS` the order in a mirrored image.
    """
    location = np.asarray(location, dtype=np.float64)[..., None, :]
    dimensions = np.asarray(dimensions, dtype=np.float64)[..., None, :]
    rotation_y = np.asarray(rotation_y, dtype=np.float64)[..., None]
    along = _LENGTH_SIGNS * dimensions[..., 2] / 2
    across = _WIDTH_SIGNS * dimensions[..., 1] / 2
    cos, sin = np.cos(rotation_y), np.sin(rotation_y)
    x = location[..., 0] + along * cos + across * sin
    y = location[..., 1] + _HEIGHT_SIGNS * dimensions[..., 0]
    z = location[..., 2] - along * sin + across * cos
    return np.stack([x, y, z], axis=-1)


def box_centers(location: npt.ArrayLike, dimensions: npt.ArrayLike) -> FloatArray:
    """Centres ``[..., 3]`` of 3D boxes: half a height above the bottom centres (y points down)."""
    centers = np.array(location, dtype=np.float64)
    centers[..., 1] -= np.asarray(dimensions, dtype=np.float64)[..., 0] / 2
    return centers


def project_boxes(calibration: Calibration, corners: npt.ArrayLike, size: tuple[int, int]) -> FloatArray:
    """2D boxes that 3D boxes fill in the image.

    Edges that cross the plane at depth `NEAR` are cut there, so a box that the camera stands in or beside is bounded
    too. What of it lies beside the image counts: its part inside may be smaller than the box that is given.

    Args:
        calibration: The camera.
        corners: ``[N, 8, 3]``, as `box_corners` gives them.
        size: (width, height) of the image; boxes are clipped to its pixel centres.

    Returns:
        ``[N, 4]`` (x1, y1, x2, y2); NaN for a box that lies behind the camera or outside the image.

    Raises:
        ValueError: ``corners`` has another shape.
    """
    corners = np.asarray(corners, dtype=np.float64)
    if corners.ndim != 3 or corners.shape[1:] != (8, 3):
        raise ValueError(f"corners must have shape [N, 8, 3], got {list(corners.shape)}")
    near_z = NEAR - calibration.projection[2, 3]
    starts, ends = corners[:, BOX_EDGES[:, 0]], corners[:, BOX_EDGES[:, 1]]
    rise = ends[..., 2] - starts[..., 2]
    share = np.clip((near_z - starts[..., 2]) / np.where(rise == 0, 1.0, rise), 0.0, 1.0)
    crossing = (starts[..., 2] < near_z) != (ends[..., 2] < near_z)
    cuts = starts + share[..., None] * (ends - starts)
    cuts[..., 2] = near_z
    points = np.concatenate([corners, cuts], axis=1)
    shown = np.concatenate([corners[..., 2] >= near_z, crossing], axis=1)
    pixels, _ = calibration.project(points)
    low = np.where(shown[..., None], pixels, np.inf).min(axis=1)
    high = np.where(shown[..., None], pixels, -np.inf).max(axis=1)
    last = np.array(size, dtype=np.float64) - 1
    outside = ((low > last) | (high < 0)).any(axis=1)
    boxes = np.concatenate([np.clip(low, 0, last), np.clip(high, 0, last)], axis=1)
    boxes[outside] = np.nan
    return boxes


def flip_boxes(boxes: npt.ArrayLike, width: int) -> FloatArray:
    """Mirror 2D boxes ``[..., 4]`` in an image of ``width`` pixels."""
    boxes = np.asarray(boxes, dtype=np.float64)
    x1, y1, x2, y2 = np.moveaxis(boxes, -1, 0)
    return np.stack([width - 1 - x2, y1, width - 1 - x1, y2], axis=-1)


def flip_rotation(angle: npt.ArrayLike) -> FloatArray:
    """Mirror ``rotation_y`` or ``alpha``: π - angle, wrapped to [-π, π]."""
    return wrap_angle(np.pi - np.asarray(angle, dtype=np.float64))


def resize_boxes(boxes: npt.ArrayLike, scale_x: float, scale_y: float) -> FloatArray:
    """2D boxes ``[..., 4]`` (or points ``[..., 2]``) in the image resized by the two factors."""
    _check_scales(scale_x, scale_y)
    boxes = np.asarray(boxes, dtype=np.float64)
    scales = np.tile([scale_x, scale_y], boxes.shape[-1] // 2)
    return np.asarray((boxes + 0.5) * scales - 0.5)


def _check_scales(scale_x: float, scale_y: float) -> None:
    if not (np.isfinite(scale_x) and np.isfinite(scale_y) and scale_x > 0 and scale_y > 0):
        raise ValueError(f"scale_x and scale_y must be positive and finite, got {scale_x} and {scale_y}")
