"""Training targets of a frame: objects to learn, regions to ignore, and the values to predict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rakd.data.labels import CLASSES as CLASSES
from rakd.data.labels import Objects
from rakd.data.rules import DataRules
from rakd.geometry import NEAR, Calibration, FloatArray, box_centers, box_corners

_RULES = DataRules()


@dataclass(frozen=True, eq=False)
class Targets:
    """Objects that a detector shall find in a frame, one row an object; float32 unless noted.

    Attributes:
        classes: ``[N]`` int64, place in `rakd.data.labels.CLASSES`.
        boxes: ``[N, 4]`` 2D boxes (x1, y1, x2, y2), pixels.
        dimensions: ``[N, 3]`` height, width, length, metres.
        location: ``[N, 3]`` bottom centre (x, y, z), metres.
        rotation_y: ``[N]`` radians.
        alpha: ``[N]`` observation angle, radians.
        keypoints: ``[N, 9, 2]`` pixels of the 8 corners (order of `rakd.geometry.box_corners`) and of the 3D
            centre; 0 where a corner is behind the camera.
        keypoints_seen: ``[N, 9]`` bool, False where a corner is behind the camera.
        projected_height: ``[N]`` ``fy · height / z``, pixels: the height that gives the distance back.
        ignored: ``[M, 4]`` 2D boxes that count neither as objects nor as background.
    """

    classes: Tensor
    boxes: Tensor
    dimensions: Tensor
    location: Tensor
    rotation_y: Tensor
    alpha: Tensor
    keypoints: Tensor
    keypoints_seen: Tensor
    projected_height: Tensor
    ignored: Tensor

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True, eq=False)
class PackedTargets:
    """The targets of a batch in one tensor, which one copy brings to a device.

    Attributes:
        numbers: ``[T]`` float32: all images' rows of each field of `Targets` in turn.
        counts: Objects and regions to ignore of each image.
    """

    numbers: Tensor
    counts: list[tuple[int, int]]

    @classmethod
    def pack(cls, targets: Sequence[Targets]) -> "PackedTargets":
        """Pack the targets of a batch's images, at least one. Classes and flags are exact as float32, too."""
        names = [field.name for field in fields(Targets)]
        parts = [getattr(target, name).reshape(-1).float() for name in names for target in targets]
        return cls(torch.cat(parts), [(len(target), len(target.ignored)) for target in targets])

    def pin_memory(self) -> "PackedTargets":
        """The same in pinned memory."""
        return PackedTargets(self.numbers.pin_memory(), self.counts)

    def unpack(self, device: torch.device | str) -> list[Targets]:
        """The targets of each image on a device; from pinned memory nothing waits for the copy."""
        numbers = self.numbers.to(device, non_blocking=True)
        objects, ignored = ([counts[i] for counts in self.counts] for i in (0, 1))
        columns, start = {}, 0
        for name, (shape, dtype) in _FIELDS.items():
            rows = ignored if name == "ignored" else objects
            end = start + sum(rows) * math.prod(shape)
            columns[name] = numbers[start:end].view(-1, *shape).to(dtype).split_with_sizes(rows)
            start = end
        return [Targets(**dict(zip(columns, own, strict=True))) for own in zip(*columns.values(), strict=True)]


_FIELDS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "classes": ((), torch.int64),
    "boxes": ((4,), torch.float32),
    "dimensions": ((3,), torch.float32),
    "location": ((3,), torch.float32),
    "rotation_y": ((), torch.float32),
    "alpha": ((), torch.float32),
    "keypoints": ((9, 2), torch.float32),
    "keypoints_seen": ((9,), torch.bool),
    "projected_height": ((), torch.float32),
    "ignored": ((4,), torch.float32),
}
"""Shape of a row and dtype of each field of `Targets`, in their order."""


def make_targets(
    objects: Objects,
    calibration: Calibration,
    size: tuple[int, int],
    *,
    scale: float = 1.0,
    rules: DataRules = _RULES,
) -> Targets:
    """Make the targets of a frame.

    Ignored are DontCare regions, objects of other classes, without a 3D box, with the 3D centre outside the image, and
    those that the rules leave out.

    Args:
        objects: Labels.
        calibration: The camera.
        size: (width, height) of the image in pixels.
        scale: Height of this image over that of the original.
        rules: Which objects are learned.
    """
    centers, depth = calibration.project(box_centers(objects.location, objects.dimensions))
    inside = ((centers >= 0) & (centers <= np.array(size) - 1)).all(axis=1)
    if rules.center_in_box:
        inside &= ((centers >= objects.boxes[:, :2]) & (centers <= objects.boxes[:, 2:])).all(axis=1)
    tall = objects.boxes[:, 3] - objects.boxes[:, 1] >= rules.min_height * scale
    has_box = objects.has_box_3d
    # What has no place in space cannot hide anything: put it behind everything.
    distance = np.where(has_box, objects.location[:, 2], np.inf)
    seen = visible_shares(objects.boxes, distance) >= rules.min_visible
    seen &= (objects.truncation <= rules.max_truncation) & (objects.occlusion <= rules.max_occlusion)
    near = (depth > 0) & (distance >= rules.depth[0]) & (distance <= rules.depth[1])
    wanted = objects.is_type(*CLASSES) & has_box & tall & seen & inside & near
    wanted &= np.cumsum(wanted) <= rules.most
    used = objects.select(wanted)
    corners = box_corners(used.location, used.dimensions, used.rotation_y)
    points = np.concatenate([corners, box_centers(used.location, used.dimensions)[:, None]], axis=1)
    keypoints, keypoint_depth = calibration.project(points)
    in_front = keypoint_depth > NEAR  # nearer to the camera's plane, pixels grow without bound
    names = [name.lower() for name in CLASSES]
    return Targets(
        classes=torch.tensor([names.index(name.lower()) for name in used.types], dtype=torch.int64),
        boxes=_tensor(used.boxes),
        dimensions=_tensor(used.dimensions),
        location=_tensor(used.location),
        rotation_y=_tensor(used.rotation_y),
        alpha=_tensor(used.observed_alpha),
        keypoints=_tensor(np.where(in_front[..., None], keypoints, 0.0)),
        keypoints_seen=torch.from_numpy(in_front),
        projected_height=_tensor(calibration.projection[1, 1] * used.dimensions[:, 0] / used.location[:, 2]),
        ignored=_tensor(objects.boxes[~wanted]),
    )


def pooling_boxes(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Turn boxes of a data set into boxes to pool features from.

    KITTI's coordinates are 0 at the centre of the first pixel; those of pooled boxes are 0 at its outer edge, half a
    pixel before (`rakd_ops.multilevel_roi_align`, and torchvision's RoIAlign with ``aligned``).

    Args:
        boxes: Per image ``[K_b, 4]`` (x1, y1, x2, y2), pixels.

    Returns:
        New tensors of the same shapes and types.
    """
    return [rows + 0.5 for rows in boxes]


def visible_shares(boxes: FloatArray, distance: FloatArray) -> FloatArray:
    """Share of each 2D box that no nearer box covers.

    Exact: the lines of all boxes cut the image into cells, and each cell belongs to the nearest box over it.

    Args:
        boxes: ``[N, 4]`` pixels.
        distance: ``[N]``; at equal distance the earlier box is the nearer one.

    Returns:
        ``[N]`` in 0..1; 0 for an empty box.
    """
    x, y = np.unique(boxes[:, [0, 2]]), np.unique(boxes[:, [1, 3]])
    cells = np.diff(y)[:, None] * np.diff(x)
    free, shares = np.ones(cells.shape, dtype=bool), np.zeros(len(boxes))
    for i in np.argsort(distance, kind="stable"):
        x1, y1, x2, y2 = boxes[i]
        own = np.s_[np.searchsorted(y, y1) : np.searchsorted(y, y2), np.searchsorted(x, x1) : np.searchsorted(x, x2)]
        whole = cells[own].sum()
        if whole > 0:
            shares[i] = (free[own] * cells[own]).sum() / whole
            free[own] = False
    return shares


def _tensor(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
