"""Fused multi-level RoIAlign and Gaussian soft-weighted feature distillation for PyTorch.

``from rakd_ops import soft_roi_distill`` is all a trainer needs; :mod:`rakd_ops.reference` states in plain PyTorch what
it computes, and ``python -m rakd_ops`` lists the backends.
"""

from rakd_ops import reference
from rakd_ops._backends import available_backends
from rakd_ops.functional import level_weights, multilevel_roi_align, release_memory, soft_roi_distill
from rakd_ops.modules import SoftRoIDistillLoss

__version__ = "0.1.0"

__all__ = [
    "SoftRoIDistillLoss",
    "available_backends",
    "level_weights",
    "multilevel_roi_align",
    "reference",
    "release_memory",
    "soft_roi_distill",
]
