"""Targets of MonoDETR's queries and of its map of distances, from the objects of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rakd.data.targets import Targets
from rakd.detector.monodetr.configs import DepthConfig
from rakd.detector.monodetr.depth import bin_indices
from rakd.detector.monodetr.heads import boxes_2d, encode_angles


@dataclass(frozen=True, eq=False)
class QueryTargets:
    """The objects of B images, each filled up to T objects, at least one.

    Attributes:
        counts: Objects of each image.
        valid: ``[B, T]`` bool; the other rows only fill up.
        classes: ``[B, T]`` int64.
        boxes: ``[B, T, 6]``, as `rakd.detector.monodetr.heads.Predictions` has them.
        dimensions: ``[B, T, 3]`` metres; 1 where a row fills up.
        angle_bins: ``[B, T]`` int64.
        angle_residuals: ``[B, T]`` radians.
        depth: ``[B, T]`` metres; 1 where a row fills up.
        focal: ``[B]`` vertical focal length of the images, pixels; 1 for an image without objects.
    """

    counts: list[int]
    valid: Tensor
    classes: Tensor
    boxes: Tensor
    dimensions: Tensor
    angle_bins: Tensor
    angle_residuals: Tensor
    depth: Tensor
    focal: Tensor


def query_targets(targets: Sequence[Targets], size: tuple[int, int]) -> QueryTargets:
    """Make the targets of the queries.

    Args:
        targets: Objects of each image, on a device.
        size: (width, height) of the images, padding included, pixels.
    """
    counts = [len(target) for target in targets]
    most = max(1, *counts) if counts else 1

    def padded(name: str, value: float = 0.0) -> Tensor:
        rows = [getattr(target, name) for target in targets]
        edge = (0, 0) * (rows[0].dim() - 1)
        return torch.stack([F.pad(row, (*edge, 0, most - len(row)), value=value) for row in rows])

    sides = padded("boxes")
    extent = torch.stack([sides.new_full((), float(length)) for length in size])
    center = padded("keypoints")[:, :, 8]
    # KITTI's pixels are 0 at the centre of the first one; shares of the image are 0 at its edge.
    boxes = torch.cat(
        [
            (center + 0.5) / extent,
            torch.stack([center[..., 0] - sides[..., 0], sides[..., 2] - center[..., 0]], dim=-1) / extent[0],
            torch.stack([center[..., 1] - sides[..., 1], sides[..., 3] - center[..., 1]], dim=-1) / extent[1],
        ],
        dim=-1,
    )
    filled = padded("classes", -1)
    valid = filled >= 0
    dimensions, depth = padded("dimensions", 1.0), padded("location", 1.0)[..., 2]
    focal = padded("projected_height", 1.0) * depth / dimensions[..., 0]  # one camera an image: any object tells it
    bins, residuals = encode_angles(padded("alpha"))
    return QueryTargets(counts, valid, filled.clamp(min=0), boxes, dimensions, bins, residuals, depth, focal[:, 0])


def depth_map_targets(targets: QueryTargets, shape: tuple[int, int], config: DepthConfig) -> Tensor:
    """The bin of each cell of the map of distances: the nearest object whose 2D box touches it, or the background.

    Args:
        targets: Of the queries.
        shape: (height, width) of the map.
        config: The bins.

    Returns:
        ``[B, height, width]`` int64; ``config.bins`` for the background.
    """
    height, width = shape
    x1, y1, x2, y2 = boxes_2d(targets.boxes).unbind(dim=-1)
    columns = torch.arange(width, device=x1.device)
    rows = torch.arange(height, device=x1.device)
    across = (columns >= (x1 * width).floor()[..., None]) & (columns < (x2 * width).ceil()[..., None])
    down = (rows >= (y1 * height).floor()[..., None]) & (rows < (y2 * height).ceil()[..., None])
    inside = down[..., :, None] & across[..., None, :] & targets.valid[..., None, None]
    nearest = torch.where(inside, targets.depth[..., None, None], torch.inf).amin(dim=1)
    return bin_indices(nearest, config)
