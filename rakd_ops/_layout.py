"""Memory layouts of maps and of their gradients, for all backends written in Python.

``csrc/arguments.h`` states the same rule for the compiled libraries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(feature: Tensor) -> bool:
    """Whether a map's gradient takes the channels-last layout."""
    return feature.stride(1) == 1 and feature.size(1) > 1 and not feature.is_contiguous()


def is_dense(feature: Tensor) -> bool:
    """Whether a map's elements fill its memory without gaps."""
    return feature.is_contiguous() or feature.is_contiguous(memory_format=torch.channels_last)


def empty_gradient(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Return an uninitialised map of ``like``'s dtype and device."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def accumulation_dtype(maps: Sequence[Tensor]) -> torch.dtype:
    """Return what a call's sums are made in: float64 if any map is float64, else float32."""
    return torch.float64 if any(feature.dtype == torch.float64 for feature in maps) else torch.float32
