"""Boxes as trainers hold them, brought to pixels of the apprentice's input as (x1, y1, x2, y2)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rakd.distill.base import Boxes

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
BOX_FORMATS = ("xyxy", "xywh", "cxcywh")


def to_pixels(
    boxes: Any, box_format: BoxFormat, normalized: bool, size: tuple[int, int], images: int, device: torch.device
) -> Boxes:
    """Bring boxes to (x1, y1, x2, y2) in pixels, on the maps' device.

    Args:
        boxes: ``[K, 5]`` with the image's number first, or one ``[K_b, 4]`` per image, of any real dtype. A
            torchvision ``BoundingBoxes`` is read in its own format, in pixels, whatever the next two say.
        box_format: Of the four numbers.
        normalized: Whether they are normalised by the image's width and height.
        size: Height and width of the images in pixels.
        images: Their number.
        device: Of the result.

    Returns:
        The same form: one tensor, or a list.

    Raises:
        ValueError: A shape is wrong, or there are more or fewer tensors than images.
        TypeError: These are no boxes.
    """
    if isinstance(boxes, Tensor):
        if boxes.dim() == 2 and boxes.shape[1] == 4 and images == 1:
            return [_convert(boxes, box_format, normalized, size, device)]
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(
                f"boxes: expected [K, 5] with the image's number in column 0, or a list of [K_b, 4] per image, got "
                f"shape {list(boxes.shape)}"
            )
        boxes = boxes.detach()
        rows = boxes if boxes.is_floating_point() else boxes.float()
        converted = _convert(rows[:, 1:], box_format, normalized, size, device)
        return torch.cat([rows[:, :1].to(converted), converted], dim=1)
    if isinstance(boxes, (str, bytes)) or not isinstance(boxes, Sequence):
        raise TypeError(f"boxes: expected [K, 5] or a sequence of tensors, one per image, got {type(boxes).__name__}")
    if len(boxes) != images:
        raise ValueError(f"boxes: expected {images} tensors, one per image, got {len(boxes)}")
    for i, rows in enumerate(boxes):
        if not isinstance(rows, Tensor):
            raise TypeError(f"boxes[{i}]: expected a tensor, got {type(rows).__name__}")
        if rows.dim() != 2 or rows.shape[1] != 4:
            raise ValueError(f"boxes[{i}]: expected shape [K, 4], got {list(rows.shape)}")
    return [_convert(rows, box_format, normalized, size, device) for rows in boxes]


def refuse_maps(boxes: Any) -> None:
    """Say so where feature maps came in the boxes' place.

    Raises:
        TypeError: They did.
    """
    first = boxes[0] if isinstance(boxes, (list, tuple)) and boxes else boxes
    if isinstance(first, dict) and "boxes" in first:
        raise TypeError(
            "boxes: expected [K, 5] or a sequence of tensors, got targets; give [t['boxes'] for t in targets]"
        )
    if isinstance(boxes, dict) or (isinstance(first, Tensor) and first.dim() == 4):
        raise TypeError(
            f"boxes: expected [K, 5] or a sequence of tensors, one per image, got feature maps in a "
            f"{type(boxes).__name__}; the order of the arguments is images, boxes, apprentice_features"
        )


def check_canvases(boxes: Any, size: tuple[int, int]) -> None:
    """Compare the images' size with that which torchvision's ``BoundingBoxes`` carry; plain tensors carry none.

    Images of a padded batch are smaller than it, the largest by less than the 32 pixels that detectors pad to.

    Raises:
        ValueError: They differ otherwise.
    """
    found = [getattr(rows, "canvas_size", None) for rows in (boxes if isinstance(boxes, Sequence) else [boxes])]
    canvases = [(int(canvas[0]), int(canvas[1])) for canvas in found if canvas is not None]
    if len(canvases) < len(found) or not canvases:
        return
    largest = tuple(max(canvas[side] for canvas in canvases) for side in (0, 1))
    # Padding fills one side, but for what a stride leaves; images that were enlarged without their boxes do not.
    fits = all(own <= pixels for own, pixels in zip(largest, size, strict=True))
    if not (fits and any(own > pixels - 32 for own, pixels in zip(largest, size, strict=True))):
        raise ValueError(
            f"boxes: expected BoundingBoxes of the images' size {tuple(size)}, or of smaller images that are "
            f"padded to it, got canvas_size {largest}; resize images and boxes by the same transform"
        )


def own_format(rows: Tensor) -> BoxFormat | None:
    """The format that torchvision's ``BoundingBoxes`` carry; None for plain tensors.

    Raises:
        ValueError: It is none of the three, such as of rotated boxes.
    """
    carried = getattr(rows, "format", None)
    if carried is None or not hasattr(rows, "canvas_size"):
        return None
    name = str(getattr(carried, "value", carried)).lower()
    if name not in BOX_FORMATS:
        raise ValueError(f"boxes: expected BoundingBoxes of format {', '.join(BOX_FORMATS)}, got {name}")
    return name  # type: ignore[return-value]


def _convert(
    rows: Tensor, box_format: BoxFormat, normalized: bool, size: tuple[int, int], device: torch.device
) -> Tensor:
    own = own_format(rows)
    if own is not None:
        rows, box_format, normalized = rows.as_subclass(Tensor), own, False
    rows = rows.detach().to(device, non_blocking=True)
    if box_format == "xyxy" and not normalized:
        return rows
    if not rows.is_floating_point() or rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    if normalized:
        height, width = size
        rows = rows * rows.new_tensor([width, height, width, height])
    if box_format == "xyxy":
        return rows
    first, extent = rows[:, :2], rows[:, 2:]
    if box_format == "cxcywh":
        first = first - extent / 2
    return torch.cat([first, first + extent], dim=1)
