"""The ops in plain PyTorch: the executable specification that every backend is tested against.

Clarity before speed. RoIAlign on an axis-aligned box is separable: one channel of the pooled output is
``Ry F Rxᵀ``, where ``Ry`` and ``Rx`` hold the bilinear sampling weights along each axis. Gradients are autograd's.
Positions and sampling weights are computed in float64 whatever the maps' dtype; half types are pooled in float32.

Only cells that some sample of a box reads enter its result: a NaN elsewhere, or on a level of weight zero, changes
nothing. The public functions here are those of ``rakd_ops`` without ``backend``, and take the same options by keyword.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rakd_ops import _inputs
from rakd_ops._inputs import Boxes, BoxInputs, Distillation, Maps
from rakd_ops._layout import accumulation_dtype
from rakd_ops._options import LevelRule, RoIOptions, check_options
from rakd_ops.levels import weigh_levels

_MOST_SAMPLES = 2**20  # of a bin and axis: all of them lie in memory

__all__ = ["axis_matrix", "level_weights", "multilevel_roi_align", "soft_roi_distill"]


def axis_matrix(low: Tensor, high: Tensor, stride: float, size: int, bins: int, sampling_ratio: int) -> Tensor:
    """RoIAlign along one axis as a matrix (``torchvision.ops.roi_align`` with ``aligned=True``).

    Args:
        low: ``[K]`` float64, the boxes' lower ends in pixels.
        high: ``[K]`` float64, the boxes' upper ends in pixels.
        stride: Pixels per cell.
        size: Cells of the map along this axis.
        bins: Output bins along this axis.
        sampling_ratio: Samples per bin; 0 means ``ceil(box size in cells / bins)``.

    Returns:
        ``[K, bins, size]`` float64: the weight of each cell in each bin.
    """
    return _axis_weights(low, high, stride, size, bins, sampling_ratio)[0]


def _axis_weights(
    low: Tensor, high: Tensor, stride: float, size: int, bins: int, sampling_ratio: int
) -> tuple[Tensor, Tensor]:
    """Return :func:`axis_matrix`, and ``[K, size]``: which cells some sample reads, be it with weight zero."""
    scale = 1.0 / stride
    start = low * scale - 0.5
    bin_size = (high * scale - 0.5 - start) / bins
    samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().clamp(min=0)
    most = sampling_ratio if sampling_ratio > 0 else float(samples.max()) if samples.numel() else 0
    if most > _MOST_SAMPLES:
        raise ValueError(
            f"boxes: with sampling_ratio=0 the reference takes at most {_MOST_SAMPLES} samples a bin and axis, one for "
            f"each cell, got a box that needs {most:g}"
        )
    most = int(most)

    sample = torch.arange(most, dtype=low.dtype, device=low.device)
    bin_start = start[:, None] + torch.arange(bins, dtype=low.dtype, device=low.device) * bin_size[:, None]
    within_bin = (sample + 0.5) * bin_size[:, None] / samples[:, None]
    position = bin_start[:, :, None] + within_bin[:, None, :]  # [K, bins, samples]
    counts = (sample < samples[:, None])[:, None, :] & (position >= -1.0) & (position <= size)

    position = torch.where(counts, position, 0.0).clamp(min=0.0)
    low_cell = position.floor().clamp(max=size - 1)
    high_weight = torch.where(low_cell >= size - 1, 0.0, position - low_cell)
    high_cell = (low_cell + 1).clamp(max=size - 1)
    share = torch.where(counts, 1.0 / samples[:, None, None], 0.0)

    matrix = low.new_zeros((low.shape[0], bins, size))
    reads = torch.zeros_like(matrix)
    for cell, weight in ((low_cell.long(), 1.0 - high_weight), (high_cell.long(), high_weight)):
        matrix.scatter_add_(2, cell, share * weight)
        reads.scatter_add_(2, cell, counts.to(low.dtype))
    return matrix, (reads > 0).any(dim=1)


def _pool(feature: Tensor, rows: Tensor, level: int, stride: float, options: RoIOptions, dtype: torch.dtype) -> Tensor:
    """RoIAlign of one level, ``[K, C, Py, Px]``; zeros, of which no gradient flows, for boxes of weight zero there."""
    (bins_y, bins_x), ratio = options.output_size, options.sampling_ratio
    selected = ((rows[:, 0] >= 0) & (rows[:, 5 + level] != 0)).nonzero()[:, 0]
    boxes = rows[selected]
    y, reads_y = _axis_weights(boxes[:, 2], boxes[:, 4], stride, feature.shape[2], bins_y, ratio)
    x, reads_x = _axis_weights(boxes[:, 1], boxes[:, 3], stride, feature.shape[3], bins_x, ratio)
    pooled = [
        torch.einsum(
            "py,cyx,qx->cpq",
            y[k][:, reads_y[k]].to(dtype),
            feature[int(boxes[k, 0])][:, reads_y[k]][:, :, reads_x[k]].to(dtype),
            x[k][:, reads_x[k]].to(dtype),
        )
        for k in range(boxes.shape[0])
    ]
    empty = feature[:0].sum().to(dtype)  # zero, and still a function of the map
    out = empty.new_zeros((rows.shape[0], feature.shape[1], bins_y, bins_x)) + empty
    return out.index_copy(0, selected, torch.stack(pooled)) if pooled else out


def _join(groups: list[Tensor]) -> Tensor:
    """Boxes as the caller has them as one float64 ``[K, 5]``."""
    boxes = [group.to(torch.float64) for group in groups]
    if boxes[0].shape[1] == 4:
        boxes = [torch.cat([torch.full_like(group[:, :1], i), group], dim=1) for i, group in enumerate(boxes)]
    return torch.cat(boxes)


def weights_by_rule(boxes: list[Tensor], options: RoIOptions) -> Tensor:
    """Level weights ``[K, L]`` float64 of boxes as the caller has them."""
    return weigh_levels(_join(boxes), options.strides, *options.rule)


def prepare_boxes(inputs: BoxInputs, options: RoIOptions) -> tuple[Tensor, Tensor]:
    """Rows and index of checked boxes, as the op ``prepare_boxes`` gives them (``_schemas.py``)."""
    rows = _join(inputs.boxes)
    images = rows[:, 0]
    most = torch.inf if inputs.images is None else inputs.images
    good = rows.isfinite().all(dim=1) & (images == images.floor()) & (images >= 0) & (images < most)
    good &= (rows[:, 1] <= rows[:, 3]) & (rows[:, 2] <= rows[:, 4])
    sides = torch.where(good[:, None], rows[:, 1:], 0.0)
    rows = torch.cat([torch.where(good, images, -1.0)[:, None], sides], dim=1)
    weights = inputs.level_weights
    if weights is None:
        weights = weigh_levels(rows, options.strides, *options.rule)
    weights = weights.to(torch.float64)
    weights = torch.where(good[:, None] & weights.isfinite() & (weights >= 0), weights, 0.0)
    if inputs.box_weights is not None:
        of_box = inputs.box_weights.to(torch.float64)
        weights = weights * torch.where(of_box.isfinite(), of_box, 0.0)[:, None]
    count = rows.shape[0]
    if inputs.mean:
        weights = weights * (1.0 / max(count, 1))
    groups = inputs.images or 0
    image = torch.where(good, rows[:, 0], groups)
    ordered, order = image.sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(groups + 1, dtype=torch.float64, device=rows.device))
    return torch.cat([rows, weights], dim=1), torch.cat([begins, order]).to(torch.int32)


def align_checked(maps: list[Tensor], rows: Tensor, options: RoIOptions) -> Tensor:
    """``multilevel_roi_align`` of prepared boxes."""
    compute = accumulation_dtype(maps)
    # Autocast would take the products to half precision.
    with torch.autocast(maps[0].device.type, enabled=False):
        total = maps[0].new_zeros((rows.shape[0], maps[0].shape[1], *options.output_size), dtype=compute)
        for level, (feature, stride) in enumerate(zip(maps, options.strides, strict=True)):
            weights = rows[:, 5 + level, None, None, None].to(compute)
            total = total + weights * _pool(feature, rows, level, stride, options, compute)
    return total.to(maps[0].dtype)


def distill_checked(
    apprentice: list[Tensor], expert: list[Tensor], rows: Tensor, options: RoIOptions, reduction: str
) -> Tensor:
    """``soft_roi_distill`` of prepared boxes."""
    compute = accumulation_dtype(apprentice + expert)
    losses = rows.new_zeros(rows.shape[0], dtype=compute)
    levels = zip(apprentice, expert, options.strides, options.expert_strides, strict=True)
    with torch.autocast(rows.device.type, enabled=False):
        for level, (own, other, stride, expert_stride) in enumerate(levels):
            difference = _pool(own, rows, level, stride, options, compute)
            difference = difference - _pool(other, rows, level, expert_stride, options, compute)
            losses = losses + rows[:, 5 + level].to(compute) * difference.square().mean(dim=(1, 2, 3))
    return losses if reduction == "none" else losses.sum()


def _prepare(inputs: BoxInputs, options: RoIOptions) -> Tensor:
    if inputs.boxes[0].device.type == "cpu":
        _inputs.refuse_values(inputs)
    return prepare_boxes(inputs, options)[0]


def distill(inputs: Distillation, options: RoIOptions, reduction: str) -> Tensor:
    """``soft_roi_distill`` on checked arguments."""
    return distill_checked(inputs.apprentice, inputs.expert, _prepare(inputs.boxes, options), options, reduction)


def align(maps: list[Tensor], boxes: BoxInputs, options: RoIOptions) -> Tensor:
    """``multilevel_roi_align`` on checked arguments."""
    return align_checked(maps, _prepare(boxes, options), options)


def weigh(inputs: BoxInputs, strides: tuple[float, ...], rule: LevelRule) -> Tensor:
    """``level_weights`` on checked arguments."""
    rows = _prepare(inputs, RoIOptions(strides, strides, (1, 1), 1, rule))
    return rows[:, 5:].to(torch.float64 if inputs.boxes[0].dtype == torch.float64 else torch.float32)


def soft_roi_distill(
    apprentice: Maps,
    expert: Maps,
    boxes: Boxes,
    *,
    level_weights: Tensor | None = None,
    box_weights: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """See :func:`rakd_ops.soft_roi_distill`."""
    checked = check_options(**options)
    inputs = _inputs.check_distillation(apprentice, expert, boxes, box_weights, level_weights, reduction, checked)
    return distill(inputs, checked, reduction)


def multilevel_roi_align(
    features: Maps, boxes: Boxes, *, assignment: str = "hard", level_weights: Tensor | None = None, **options: Any
) -> Tensor:
    """See :func:`rakd_ops.multilevel_roi_align`."""
    checked = check_options(assignment=assignment, **options)
    return align(*_inputs.check_alignment(features, boxes, level_weights, checked), checked)


def level_weights(boxes: Boxes, **options: Any) -> Tensor:
    """See :func:`rakd_ops.level_weights`."""
    checked = check_options(**options)
    return weigh(_inputs.check_boxes_alone(boxes), checked.strides, checked.rule)
