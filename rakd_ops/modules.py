"""The distillation loss as a module, for trainers that collect losses as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from rakd_ops._backends import BACKENDS
from rakd_ops._inputs import Boxes, Maps
from rakd_ops._options import DEFAULTS, REDUCTIONS, Keywords, check_choice, check_options
from rakd_ops.functional import distill

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SoftRoIDistillLoss(nn.Module):
    """:func:`rakd_ops.soft_roi_distill` with its options fixed in the constructor.

    It has no parameters and no state. Options are checked at construction; they are attributes, and one that is
    assigned anew (an annealed ``sigma``) is checked at the next call.

    Args:
        reduction: See :func:`rakd_ops.soft_roi_distill`.
        backend: Same.
        options: ``strides``, ``expert_strides``, ``output_size``, ``sampling_ratio``, ``assignment``, ``sigma``,
            ``canonical_size`` and ``canonical_level``: same.
    """

    def __init__(self, *, reduction: str = "mean", backend: str = "auto", **options: Unpack[Keywords]) -> None:
        super().__init__()
        check_options(**options)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.backend = check_choice("backend", backend, ("auto", *BACKENDS))
        for name, value in (DEFAULTS | options).items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    def forward(
        self,
        apprentice: Maps,
        expert: Maps,
        boxes: Boxes,
        box_weights: Tensor | None = None,
        level_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; see :func:`rakd_ops.soft_roi_distill` for the arguments."""
        return distill(
            apprentice,
            expert,
            boxes,
            check_options(**{name: getattr(self, name) for name in DEFAULTS}),
            level_weights=level_weights,
            box_weights=box_weights,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*DEFAULTS, "reduction", "backend"))
