"""The distillation loss as a module, for trainers that collect losses as modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rakd_ops._backends import BACKENDS
from rakd_ops._inputs import Boxes, Maps
from rakd_ops._options import REDUCTIONS, check_choice, check_options
from rakd_ops.functional import distill


class SoftRoIDistillLoss(nn.Module):
    """:func:`rakd_ops.soft_roi_distill` with its options fixed in the constructor.

    It has no parameters and no state. Options are checked at construction, and again when one is assigned anew
    (an annealed ``sigma``).

    Args:
        strides: See :func:`rakd_ops.soft_roi_distill`, as all others.
        expert_strides: Same.
        output_size: Same.
        sampling_ratio: Same.
        assignment: Same.
        sigma: Same.
        canonical_size: Same.
        canonical_level: Same.
        reduction: Same.
        backend: Same.
    """

    _OPTIONS = (
        "strides",
        "expert_strides",
        "output_size",
        "sampling_ratio",
        "assignment",
        "sigma",
        "canonical_size",
        "canonical_level",
    )

    def __init__(
        self,
        *,
        strides: Sequence[float] = (4, 8, 16, 32),
        expert_strides: Sequence[float] | None = None,
        output_size: int | tuple[int, int] = 7,
        sampling_ratio: int = 2,
        assignment: str = "soft",
        sigma: float = 1.0,
        canonical_size: float = 224.0,
        canonical_level: float = 4,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(
            strides, expert_strides, output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level
        )
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.strides = tuple(strides)
        self.expert_strides = None if expert_strides is None else tuple(expert_strides)
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.assignment = assignment
        self.sigma = sigma
        self.canonical_size = canonical_size
        self.canonical_level = canonical_level
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        apprentice: Maps,
        expert: Maps,
        boxes: Boxes,
        box_weights: Tensor | None = None,
        level_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; see :func:`rakd_ops.soft_roi_distill` for the arguments."""
        options = check_options(*(getattr(self, name) for name in self._OPTIONS))
        return distill(
            apprentice,
            expert,
            boxes,
            options,
            level_weights=level_weights,
            box_weights=box_weights,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        names = ("strides", "output_size", "sampling_ratio", "assignment", "sigma", "reduction", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
