"""Validation of tensors: brings maps, boxes and weights into one form, or says what is wrong with which argument.

Only shapes, dtypes and devices are looked at here. Values of boxes and weights are read where they are read anyway, by
``prepare_boxes``; where that op finds a fault on the CPU, :func:`refuse_values` words the error. On other devices, and
under ``torch.compile``, faulty boxes contribute zero, since looking would wait for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from rakd_ops._options import DEFAULTS, REDUCTIONS, RoIOptions, check_choice

MAP_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BOX_DTYPES = (*MAP_DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # csrc/prepare.h, Number
MAX_CELLS = 2**31 - 64  # channels, rows or columns of one map; kernels count in 32 bits, in blocks of up to 64
BOX_LAYOUTS = {4: "(x1, y1, x2, y2)", 5: "(batch_index, x1, y1, x2, y2)"}

Maps = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Boxes = Tensor | Sequence[Tensor]


class BoxInputs(NamedTuple):
    """Boxes and weights as the caller has them, checked as far as that needs no values."""

    boxes: list[Tensor]  # one [K, 5], or one [K_b, 4] per image
    box_weights: Tensor | None  # [K]
    level_weights: Tensor | None  # [K, L]
    images: int | None  # None: not known
    mean: bool  # weights are divided by the number of boxes


class Distillation(NamedTuple):
    """Checked tensors of ``soft_roi_distill``."""

    apprentice: list[Tensor]
    expert: list[Tensor]
    boxes: BoxInputs


def list_maps(name: str, maps: Any, levels: int, keys: Sequence[str] | None = None) -> list[Tensor]:
    """Return maps as a list, fine to coarse; a dict's values in the order of ``keys`` or else its own."""
    if isinstance(maps, Tensor):
        maps = [maps]
    elif isinstance(maps, Mapping):
        if keys is not None and set(keys) != set(maps):
            raise ValueError(f"{name}: expected the maps {list(keys)} as in apprentice, got {list(maps)}")
        maps = [maps[key] for key in (keys if keys is not None else maps)]
    elif not isinstance(maps, Sequence):
        raise TypeError(f"{name}: expected a map, or a sequence or dict of maps, got {type(maps).__name__}")
    if len(maps) != levels:
        remedy = ""
        if levels == len(DEFAULTS["strides"]):
            remedy = f" (four strides, {DEFAULTS['strides']}, are the default: pass strides=... of your maps)"
        raise ValueError(f"{name}: expected {levels} maps, one per stride, got {len(maps)}{remedy}")
    for level, feature in enumerate(maps):
        if not isinstance(feature, Tensor):
            raise TypeError(f"{name}[{level}]: expected a tensor, got {type(feature).__name__}")
        if feature.is_nested:  # has no shape
            raise TypeError(f"{name}[{level}]: expected a dense map, got a nested tensor")
    return list(maps)


def check_maps(
    name: str, maps: list[Tensor], like: list[Tensor], like_name: str, same_channels: str = ""
) -> tuple[tuple[int, int], ...]:
    """Check rank, batch size, channels, dtype and device of maps.

    Args:
        name: The argument's name.
        maps: The maps, fine to coarse.
        like: Maps whose batch size, device and, level by level, channels must be met.
        like_name: The name of the argument ``like``.
        same_channels: The remedy to name where all levels must have one number of channels and have not.

    Returns:
        Height and width of each.
    """
    images, device = like[0].shape[:1], like[0].device
    sizes = []
    for level, feature in enumerate(maps):
        model = 0 if same_channels else level
        shape = feature.shape
        good = len(shape) == 4 and feature.dtype in MAP_DTYPES and shape[1] > 0 and shape[2] > 0 and shape[3] > 0
        good = good and shape[:1] == images and shape[1] == like[model].shape[1] and feature.device == device
        good = good and feature.layout is torch.strided
        if not good or (not torch.compiler.is_compiling() and max(shape[1:]) > MAX_CELLS):
            _refuse_map(f"{name}[{level}]", feature, like, like_name, model, same_channels)
        sizes.append((shape[2], shape[3]))
    return tuple(sizes)


def _refuse_map(
    label: str, feature: Tensor, like: list[Tensor], like_name: str, model: int, same_channels: str
) -> NoReturn:
    shape = list(feature.shape)
    if len(shape) != 4:
        raise ValueError(f"{label}: expected shape [B, C, H, W], got {shape}")
    if feature.layout is not torch.strided:
        raise TypeError(f"{label}: expected a dense map, got one of layout {feature.layout}")
    if feature.dtype not in MAP_DTYPES:
        raise TypeError(f"{label}: expected float32, float64, float16 or bfloat16, got {feature.dtype}")
    if min(shape[1:]) == 0:
        raise ValueError(f"{label}: expected at least one channel, row and column, got {shape}")
    if max(shape[1:]) > MAX_CELLS:
        raise ValueError(f"{label}: expected at most {MAX_CELLS} channels, rows and columns, got {shape}")
    if shape[0] != like[0].shape[0]:
        raise ValueError(f"{label}: expected {like[0].shape[0]} images as in {like_name}[0], got {shape}")
    if shape[1] != like[model].shape[1]:
        expected = f"{like[model].shape[1]} channels as in {like_name}[{model}]"
        remedy = f"; {same_channels}" if same_channels else ""
        raise ValueError(f"{label}: expected {expected}, got shape {shape}{remedy}")
    raise ValueError(f"{label}: expected device {like[0].device} as in {like_name}[0], got {feature.device}")


@functools.lru_cache(maxsize=256)
def check_pyramid(
    groups: tuple[tuple[str, str, tuple[tuple[int, int], ...], tuple[float, ...]], ...], padded: bool = False
) -> None:
    """Check that maps fit their strides: all sizes times strides must belong to one image.

    A map of ``n`` cells of stride ``s`` comes from more than ``(n - 1) s`` and less than ``(n + 1) s`` pixels,
    whatever mixture of rounding up and down its network uses. Where the caller says so, two networks may pad
    differently, by up to the coarsest stride. By itself that looks just like an expert that sees resized images, which
    would be compared at the wrong places.

    Args:
        groups: Per network: name of its strides' argument, name of its maps' argument, heights and widths, strides.
        padded: Whether one network's images may be padded more than the other's.
    """
    for axis, noun in ((0, "heights"), (1, "widths")):
        intervals = []
        for _, _, sizes, strides in groups:
            low = max((size[axis] - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            intervals.append((low, min((size[axis] + 1) * stride for size, stride in zip(sizes, strides, strict=True))))
        padding = max(strides[-1] for _, _, _, strides in groups) if padded else 0.0
        consistent = max(low for low, _ in intervals) < min(high for _, high in intervals) + padding
        for (argument, _, _, _), (low, high) in zip(reversed(groups), reversed(intervals), strict=True):
            if low >= high or not consistent:
                listed = "; ".join(
                    f"{name} {[size[axis] for size in sizes]} at strides {list(strides)}"
                    for _, name, sizes, strides in groups
                )
                remedy = ""
                if low < high and not padded:
                    remedy = "; give expert_strides, equal to strides if one network only pads its images more"
                raise ValueError(
                    f"{argument}: expected strides that fit the maps' {noun} (size times stride about the same for "
                    f"all maps), got {listed}{remedy}"
                )


def _to_xyxy(name: str, rows: Any) -> Any:
    """Return boxes of ``torchvision.tv_tensors`` as a plain tensor (x1, y1, x2, y2), by the format they carry."""
    if type(rows) is Tensor or not isinstance(rows, Tensor) or not hasattr(rows, "canvas_size"):
        return rows
    carried = getattr(rows, "format", "XYXY")
    layout = str(getattr(carried, "value", carried)).upper()
    plain = rows.as_subclass(Tensor)
    if layout == "XYXY":
        return plain
    plain = plain.to(torch.promote_types(plain.dtype, torch.float32))  # sums of small integers overflow
    if layout == "XYWH":
        return torch.cat([plain[:, :2], plain[:, :2] + plain[:, 2:]], dim=1)
    if layout == "CXCYWH":
        half = plain[:, 2:] / 2
        return torch.cat([plain[:, :2] - half, plain[:, :2] + half], dim=1)
    raise ValueError(f"{name}: expected boxes in format XYXY, XYWH or CXCYWH, got {layout}")


def _check_numbers(name: str, values: Any, device: torch.device | None) -> Tensor:
    """Check a tensor of boxes or weights: real numbers on the right device that need no gradient."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}")
    if values.is_nested or values.layout is not torch.strided:
        kind = "a nested tensor" if values.is_nested else f"one of layout {values.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if values.dtype == torch.bool or values.is_complex() or values.is_quantized:
        raise TypeError(f"{name}: expected real numbers, got {values.dtype}")
    if device is not None and values.device != device:
        raise ValueError(f"{name}: expected device {device} as the maps, got {values.device}")
    if values.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradient to be asked for (detach them), got requires_grad")
        values = values.detach()
    checked: Tensor = values if values.dtype in BOX_DTYPES else values.to(torch.float64)
    return checked


def _check_box_tensor(name: str, boxes: Any, columns: int, device: torch.device | None) -> Tensor:
    checked = _check_numbers(name, _to_xyxy(name, boxes), device)
    if checked.dim() != 2 or checked.shape[1] != columns:
        raise ValueError(f"{name}: expected shape [K, {columns}], {BOX_LAYOUTS[columns]}, got {list(checked.shape)}")
    return checked


def list_boxes(boxes: Any, images: int | None, device: torch.device | None) -> list[Tensor]:
    """Return boxes as one ``[K, 5]`` or as one ``[K_b, 4]`` per image, without looking at values."""
    if isinstance(boxes, Tensor) or not isinstance(boxes, Sequence) or isinstance(boxes, (str, bytes)):
        return [_check_box_tensor("boxes", boxes, 5, device)]
    if images is not None and len(boxes) != images:
        raise ValueError(f"boxes: expected {images} tensors, one per image, got {len(boxes)}")
    listed = [_check_box_tensor(f"boxes[{i}]", rows, 4, device) for i, rows in enumerate(boxes)]
    if device is None and any(rows.device != listed[0].device for rows in listed):
        raise ValueError(f"boxes: expected one device, got {sorted({str(rows.device) for rows in listed})}")
    return listed or [torch.empty((0, 5), device=device)]


def check_boxes(
    boxes: Any,
    box_weights: Any,
    level_weights: Any,
    images: int,
    device: torch.device,
    levels: int,
    reduction: str = "sum",
) -> BoxInputs:
    """Check boxes and their weights beside maps of so many images on a device."""
    listed = list_boxes(boxes, images, device)
    count = sum(rows.shape[0] for rows in listed)
    if box_weights is not None:
        box_weights = _check_numbers("box_weights", box_weights, device)
        if box_weights.dim() != 1 or box_weights.shape[0] != count:
            raise ValueError(f"box_weights: expected shape [{count}], one per box, got {list(box_weights.shape)}")
    if level_weights is not None:
        level_weights = _check_numbers("level_weights", level_weights, device)
        if level_weights.dim() != 2 or level_weights.shape[0] != count or level_weights.shape[1] != levels:
            expected = f"[{count}, {levels}], one per box and level"
            raise ValueError(f"level_weights: expected shape {expected}, got {list(level_weights.shape)}")
    return BoxInputs(listed, box_weights, level_weights, images, reduction == "mean")


def check_boxes_alone(boxes: Any) -> BoxInputs:
    """Check boxes where there are no maps to compare with."""
    listed = list_boxes(boxes, None, None)
    images = len(listed) if listed[0].dim() == 2 and listed[0].shape[1] == 4 else None
    return BoxInputs(listed, None, None, images, False)


def refuse_values(inputs: BoxInputs) -> None:
    """Raise the error of the first faulty box or weight, in the order of the arguments; return if there is none."""
    first = 0
    for image, group in enumerate(inputs.boxes):
        rows = group.detach().to(torch.float64)
        name = "boxes"
        if group.shape[1] == 4:
            name = f"boxes[{image}]"
            rows = torch.cat([torch.full_like(rows[:, :1], image), rows], dim=1)
        most = math.inf if inputs.images is None else inputs.images
        indices = "batch indices of at least 0" if inputs.images is None else f"batch indices from 0 to {most - 1}"
        faults = (
            ("finite numbers", ~rows.isfinite().all(dim=1)),
            ("whole batch indices", rows[:, 0] != rows[:, 0].floor()),
            (indices, (rows[:, 0] < 0) | (rows[:, 0] >= most)),
            ("x1 <= x2 and y1 <= y2", (rows[:, 1] > rows[:, 3]) | (rows[:, 2] > rows[:, 4])),
        )
        for expected, wrong in faults:
            if wrong.any():
                _refuse(name, expected, group, wrong)
        first += group.shape[0]
    if inputs.box_weights is not None:
        wrong = ~inputs.box_weights.isfinite()
        if wrong.any():
            _refuse("box_weights", "finite numbers", inputs.box_weights, wrong)
    if inputs.level_weights is not None:
        wrong = ~(inputs.level_weights.isfinite() & (inputs.level_weights >= 0)).all(dim=1)
        if wrong.any():
            _refuse("level_weights", "finite numbers that are not negative", inputs.level_weights, wrong)


def _refuse(name: str, expected: str, values: Tensor, wrong: Tensor) -> NoReturn:
    row = int(wrong.nonzero()[0])
    raise ValueError(f"{name}: expected {expected}, got {values[row].tolist()} in row {row}")


def _check_known_pyramid(groups: Any, padded: bool = False) -> None:
    """`check_pyramid`, but for symbolic sizes: a comparison would fix them."""
    if torch.compiler.is_compiling():
        return
    try:
        check_pyramid(groups, padded)
    except TypeError:  # those of make_fx and AOTAutograd, which have no hash
        return


def check_distillation(
    apprentice: Any,
    expert: Any,
    boxes: Any,
    box_weights: Any,
    level_weights: Any,
    reduction: Any,
    options: RoIOptions,
) -> Distillation:
    """Check the tensors of ``soft_roi_distill`` and bring them into one form."""
    check_choice("reduction", reduction, REDUCTIONS)
    levels = len(options.strides)
    keys = list(apprentice) if isinstance(apprentice, Mapping) else None
    own = list_maps("apprentice", apprentice, levels)
    others = list_maps("expert", expert, levels, keys)
    sizes = check_maps("apprentice", own, own, "apprentice")
    expert_sizes = check_maps("expert", others, own, "apprentice")
    groups = (
        ("strides", "apprentice", sizes, options.strides),
        ("expert_strides", "expert", expert_sizes, options.expert_strides),
    )
    _check_known_pyramid(groups, padded=options.expert_stated)
    images, device = own[0].shape[0], own[0].device
    return Distillation(own, others, check_boxes(boxes, box_weights, level_weights, images, device, levels, reduction))


def check_alignment(
    features: Any, boxes: Any, level_weights: Any, options: RoIOptions
) -> tuple[list[Tensor], BoxInputs]:
    """Check the tensors of ``multilevel_roi_align``; maps of several dtypes are brought to the widest."""
    levels = len(options.strides)
    maps = list_maps("features", features, levels)
    remedy = "all levels add up to one tensor: bring them to one width (a 1x1 convolution each), or pool one at a time"
    sizes = check_maps("features", maps, maps, "features", same_channels=remedy)
    _check_known_pyramid((("strides", "features", sizes, options.strides),))
    if any(feature.dtype != maps[0].dtype for feature in maps):
        widest = functools.reduce(torch.promote_types, (feature.dtype for feature in maps))
        maps = [feature.to(widest) for feature in maps]
    return maps, check_boxes(boxes, None, level_weights, maps[0].shape[0], maps[0].device, levels)
