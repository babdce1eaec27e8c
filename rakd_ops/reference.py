"""The ops in plain PyTorch: the executable specification that every backend is tested against.

Clarity before speed. RoIAlign on an axis-aligned box is separable: one channel of the pooled output is
``Ry F Rxᵀ``, where ``Ry`` and ``Rx`` hold the bilinear sampling weights along each axis. Gradients are autograd's.
Positions and sampling weights are computed in float64 whatever the maps' dtype; half types are pooled in float32.

The public functions here are those of ``rakd_ops`` without ``backend``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rakd_ops import _inputs
from rakd_ops._inputs import Boxes, Distillation, Maps, Settings
from rakd_ops.levels import weigh_levels

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
    scale = 1.0 / stride
    start = low * scale - 0.5
    bin_size = (high * scale - 0.5 - start) / bins
    samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().clamp(min=0)
    most = sampling_ratio if sampling_ratio > 0 else int(samples.max()) if samples.numel() else 0

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
    matrix.scatter_add_(2, low_cell.long(), share * (1.0 - high_weight))
    matrix.scatter_add_(2, high_cell.long(), share * high_weight)
    return matrix


def _pool(feature: Tensor, boxes: Tensor, stride: float, settings: Settings) -> Tensor:
    """RoIAlign of one level: ``[K, C, Py, Px]`` in the feature's dtype."""
    bins_y, bins_x = settings.output_size
    ratio = settings.sampling_ratio
    rows = axis_matrix(boxes[:, 2], boxes[:, 4], stride, feature.shape[2], bins_y, ratio).to(feature.dtype)
    columns = axis_matrix(boxes[:, 1], boxes[:, 3], stride, feature.shape[3], bins_x, ratio).to(feature.dtype)
    pooled = []
    order = []
    for image in range(feature.shape[0]):
        selected = (boxes[:, 0] == image).nonzero()[:, 0]
        across = torch.einsum("cyx,kqx->kcyq", feature[image], columns[selected])
        pooled.append(torch.einsum("kpy,kcyq->kcpq", rows[selected], across))
        order.append(selected)
    if not pooled:
        # No images, no boxes; still a function of the feature.
        return feature.new_zeros((0, feature.shape[1], bins_y, bins_x)) + feature.sum()
    return torch.cat(pooled)[torch.cat(order).argsort()]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def weigh_boxes(boxes: Tensor, settings: Settings) -> Tensor:
    """Level weights ``[K, L]`` float64 of checked boxes."""
    return weigh_levels(
        boxes,
        settings.strides,
        settings.assignment,
        settings.sigma,
        settings.canonical_size,
        settings.canonical_level,
    )


def align_checked(maps: list[Tensor], boxes: Tensor, settings: Settings) -> Tensor:
    """``multilevel_roi_align`` on checked arguments."""
    dtype = maps[0].dtype
    compute = _accumulation_dtype(dtype)
    weights = weigh_boxes(boxes, settings).to(compute)
    # Autocast would take the products to half precision.
    with torch.autocast(maps[0].device.type, enabled=False):
        total = maps[0].new_zeros((boxes.shape[0], maps[0].shape[1], *settings.output_size), dtype=compute)
        for level, (feature, stride) in enumerate(zip(maps, settings.strides, strict=True)):
            pooled = _pool(feature.to(compute), boxes, stride, settings)
            total = total + weights[:, level, None, None, None] * pooled
    return total.to(dtype)


def distill_checked(inputs: Distillation, settings: Settings, reduction: str) -> Tensor:
    """``soft_roi_distill`` on checked arguments."""
    compute = _accumulation_dtype(inputs.apprentice[0].dtype)
    weights = weigh_boxes(inputs.boxes, settings).to(compute)
    losses = inputs.boxes.new_zeros(inputs.boxes.shape[0], dtype=compute)
    levels = zip(inputs.apprentice, inputs.expert, settings.strides, inputs.expert_strides, strict=True)
    with torch.autocast(inputs.boxes.device.type, enabled=False):
        for level, (apprentice, expert, stride, expert_stride) in enumerate(levels):
            difference = _pool(apprentice.to(compute), inputs.boxes, stride, settings)
            difference = difference - _pool(expert.to(compute), inputs.boxes, expert_stride, settings)
            losses = losses + weights[:, level] * difference.square().mean(dim=(1, 2, 3))
        losses = losses * inputs.coefficients.to(compute)
        return losses if reduction == "none" else losses.sum()


def soft_roi_distill(
    apprentice: Maps,
    expert: Maps,
    boxes: Boxes,
    *,
    strides: Sequence[float] = (4, 8, 16, 32),
    expert_strides: Sequence[float] | None = None,
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 2,
    assignment: str = "soft",
    sigma: float = 1.0,
    canonical_size: float = 224.0,
    canonical_level: float = 4,
    box_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """See :func:`rakd_ops.soft_roi_distill`."""
    settings = _inputs.check_settings(
        strides, output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level
    )
    inputs = _inputs.check_distillation(apprentice, expert, boxes, box_weights, reduction, settings, expert_strides)
    return distill_checked(inputs, settings, reduction)


def multilevel_roi_align(
    features: Maps,
    boxes: Boxes,
    *,
    strides: Sequence[float] = (4, 8, 16, 32),
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 2,
    assignment: str = "hard",
    sigma: float = 1.0,
    canonical_size: float = 224.0,
    canonical_level: float = 4,
) -> Tensor:
    """See :func:`rakd_ops.multilevel_roi_align`."""
    settings = _inputs.check_settings(
        strides, output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level
    )
    maps, rows = _inputs.check_alignment(features, boxes, settings)
    return align_checked(maps, rows, settings)


def level_weights(
    boxes: Boxes,
    *,
    strides: Sequence[float] = (4, 8, 16, 32),
    assignment: str = "soft",
    sigma: float = 1.0,
    canonical_size: float = 224.0,
    canonical_level: float = 4,
) -> Tensor:
    """See :func:`rakd_ops.level_weights`."""
    settings = _inputs.check_settings(strides, 1, 1, assignment, sigma, canonical_size, canonical_level)
    return weigh_boxes(_inputs.list_boxes_alone(boxes), settings).to(_weights_dtype(boxes))


def _weights_dtype(boxes: Any) -> torch.dtype:
    first = boxes if isinstance(boxes, Tensor) else boxes[0]
    return torch.float64 if first.dtype == torch.float64 else torch.float32
