"""Boxes as masks on feature maps, without waiting for the device."""

import torch
from torch import Tensor

from rakd.distill.base import Boxes


def indexed_boxes(boxes: Boxes, device: torch.device) -> Tensor:
    """Bring boxes of either form to one ``[K, 5]`` tensor of at least float32."""
    if isinstance(boxes, Tensor):
        rows = boxes
    else:
        indexed = [torch.cat([rows.new_full((len(rows), 1), i), rows], dim=1) for i, rows in enumerate(boxes)]
        rows = torch.cat(indexed) if indexed else torch.zeros(0, 5)
    return rows.detach().to(device, torch.float64 if rows.dtype == torch.float64 else torch.float32)


def read_boxes(boxes: Boxes, images: int, device: torch.device) -> Tensor:
    """Bring boxes to ``[K, 5]``, and on the CPU refuse those that `rakd_ops` refuses there.

    Raises:
        ValueError: Names the first of them.
    """
    rows = indexed_boxes(boxes, device)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and len(rows):
        index = rows[:, 0]
        good = rows.isfinite().all(dim=1) & (rows[:, 3] >= rows[:, 1]) & (rows[:, 4] >= rows[:, 2])
        good &= (index >= 0) & (index < images) & (index == index.floor())
        if not bool(good.all()):
            raise ValueError(
                f"boxes: expected numbers of images from 0 to {images - 1} and finite x1 <= x2, y1 <= y2, got "
                f"{rows[~good][0].tolist()}"
            )
    return rows


def cell_ranges(rows: Tensor, stride: float, size: tuple[int, int], *, inclusive: bool) -> tuple[Tensor, Tensor]:
    """Find the rows and columns of a map that boxes touch.

    Args:
        rows: ``[K, 5]`` boxes in pixels.
        stride: Pixels per cell.
        size: Rows and columns of the map.
        inclusive: Whether the cell at the box's rounded-up far edge belongs to it, as in FGD.

    Returns:
        ``[K, H]`` and ``[K, W]`` of booleans.
    """
    found = []
    for axis, n in ((2, size[0]), (1, size[1])):
        first = (rows[:, axis] / stride).floor()[:, None]
        last = (rows[:, axis + 2] / stride).ceil()[:, None]
        cells = torch.arange(n, device=rows.device, dtype=rows.dtype)
        found.append((cells >= first) & ((cells <= last) if inclusive else (cells < last)))
    return found[0], found[1]


def box_masks(rows: Tensor, stride: float, size: tuple[int, int], images: int) -> Tensor:
    """Mark the cells that any box of the image touches.

    Returns:
        ``[B, H, W]`` of ones and zeros in the boxes' dtype.
    """
    y, x = (cells.to(rows.dtype) for cells in cell_ranges(rows, stride, size, inclusive=False))
    own = (rows[:, :1] == torch.arange(images, device=rows.device)).to(rows.dtype)
    counts = (own[:, :, None] * y[:, None, :]).flatten(1).T @ x
    return (counts.view(images, *size) > 0).to(rows.dtype)


def area_masks(rows: Tensor, stride: float, size: tuple[int, int], images: int) -> Tensor:
    """Give each cell the largest 1/area (in cells) of the boxes that cover it; 0 outside all boxes.

    Returns:
        ``[B, H, W]`` in the boxes' dtype.
    """
    mask = rows.new_zeros((images, *size))
    for part in torch.split(rows, 64):  # [64, H, W] at a time
        y, x = cell_ranges(part, stride, size, inclusive=True)
        extents = [(part[:, i + 2] / stride).ceil() + 1 - (part[:, i] / stride).floor() for i in (1, 2)]
        share = 1 / (extents[0] * extents[1]).clamp(min=1)
        covered = (y[:, :, None] & x[:, None, :]).to(rows.dtype) * share[:, None, None]
        for image in range(images):
            own = (part[:, 0] == image).to(rows.dtype)[:, None, None]
            if len(part):
                mask[image] = torch.maximum(mask[image], (covered * own).amax(dim=0))
    return mask
