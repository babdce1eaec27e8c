"""RAKD and its ablations: features in boxes, compared level by level."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rakd.distill.adapters import ChannelAdapters
from rakd.distill.base import Boxes, DistillationMethod, Maps, Setup, pair_maps
from rakd.distill.maps import check_maps
from rakd.distill.masks import indexed_boxes
from rakd.distributed import shared_mean_count
from rakd_ops import SoftRoIDistillLoss, level_weights, soft_roi_distill

Assignment = Literal["soft", "hard", "uniform"]
"""Rule that weights a box's levels; see `rakd_ops.level_weights`."""


class RegionDistillation(DistillationMethod):
    """Region-aware distillation: features in boxes, compared level by level (RAKD, and its ablations).

    `rakd_ops.soft_roi_distill`, averaged over all boxes. Where `torch.distributed` runs several processes, in training
    over those of all processes, such that DistributedDataParallel gives the gradients of one process with the whole
    batch; every process must then call this equally often (see `rakd.distributed.shared_mean_count`).

    Args:
        assignment: "soft" (RAKD's SFA), "hard" (HFA) or "uniform" (L_RoI).
        strides: Pixels per cell of each of the apprentice's maps, increasing.
        expert_strides: See `rakd_ops.soft_roi_distill`, as for all arguments not listed here.
        output_size: Same.
        sampling_ratio: Same.
        sigma: Same.
        canonical_size: Same.
        canonical_level: Same.
        backend: Same.
        adapter: Brings the apprentice's maps to the expert's channels where these differ.

    Raises:
        ValueError, TypeError: As `rakd_ops.soft_roi_distill`; or the adapter has another number of levels.
    """

    def __init__(
        self,
        assignment: Assignment = "soft",
        strides: Sequence[float] = (4, 8, 16, 32),
        *,
        expert_strides: Sequence[float] | None = None,
        output_size: int | tuple[int, int] = 7,
        sampling_ratio: int = 2,
        sigma: float = 1.0,
        canonical_size: float = 224.0,
        canonical_level: float = 4,
        backend: str = "auto",
        adapter: ChannelAdapters | None = None,
    ) -> None:
        super().__init__(adapter=adapter)
        self.loss = SoftRoIDistillLoss(
            strides=strides,
            expert_strides=expert_strides,
            output_size=output_size,
            sampling_ratio=sampling_ratio,
            assignment=assignment,
            sigma=sigma,
            canonical_size=canonical_size,
            canonical_level=canonical_level,
            reduction="sum",
            backend=backend,
        )
        if adapter is not None and len(adapter.levels) != len(strides):
            raise ValueError(f"adapter: expected {len(strides)} levels as in strides, got {len(adapter.levels)}")

    @property
    def expert_strides(self) -> tuple[float, ...]:
        """See `rakd.distill.base.DistillationMethod.expert_strides`."""
        own: Any = self.loss
        return tuple(map(float, own.expert_strides or own.strides))

    @expert_strides.setter
    def expert_strides(self, strides: tuple[float, ...]) -> None:
        own: Any = self.loss
        own.expert_strides = strides

    @classmethod
    def build(cls, setup: Setup, **options: Any) -> "RegionDistillation":
        """See `rakd.distill.base.DistillationMethod.build`."""
        return cls(
            strides=setup.strides,
            expert_strides=setup.expert_strides,
            adapter=setup.adapter(),
            **options,
        )

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes, scale: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            expert: Maps with the apprentice's names. Other sizes need ``expert_strides``.
            apprentice: Maps of the strides given to the constructor, fine to coarse.
            boxes: ``[K, 5]``, or ``[K_b, 4]`` per image, (x1, y1, x2, y2) in pixels of the tensor the apprentice's
                network was given.
            scale: Factor of the loss, a scalar tensor without gradient.

        Returns:
            A scalar, float64 for float64 maps, else float32; 0 where there is no box.

        Raises:
            ValueError, TypeError: Names, shapes, channels, dtypes or boxes are wrong.
        """
        expert_maps, maps = pair_maps(expert, apprentice, self.adapter)
        if not isinstance(boxes, (Tensor, Sequence)):
            raise TypeError(
                f"boxes: expected [K, 5] or a sequence of tensors, one per image, got {type(boxes).__name__}"
            )
        share = self._share(boxes, maps[0].device)
        if scale is not None:
            share = share * scale.to(share)
        loss: Tensor = self.loss(maps, expert_maps, boxes, share)
        return loss

    def energy(self, expert: Maps, boxes: Boxes, scores: Sequence[Tensor] | None = None) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.energy`."""
        maps = [feature.detach() for feature in check_maps("expert", expert)]
        own: Any = self.loss
        strides = own.expert_strides or own.strides
        # Zeros need no size: one cell per level that covers the image, with strides that increase as the op expects.
        extent = max(n * stride for m, stride in zip(maps, strides, strict=True) for n in m.shape[2:])
        zeros = [feature.new_zeros((*feature.shape[:2], 1, 1)) for feature in maps]
        with torch.no_grad():
            weights = level_weights(
                indexed_boxes(boxes, maps[0].device).double(),
                strides=own.strides,
                assignment=own.assignment,
                sigma=own.sigma,
                canonical_size=own.canonical_size,
                canonical_level=own.canonical_level,
            )
            loss: Tensor = soft_roi_distill(
                zeros,
                maps,
                boxes,
                strides=[extent * (1 + i) for i in range(len(maps))],
                expert_strides=strides,
                output_size=own.output_size,
                sampling_ratio=own.sampling_ratio,
                level_weights=weights,
                box_weights=self._share(boxes, maps[0].device),
                reduction="sum",
                backend=own.backend,
            )
        return loss

    def _share(self, boxes: Boxes, device: torch.device) -> Tensor:
        """One over the number of boxes, in training its mean over all processes, ``[K]``.

        As weights rather than as a divisor of the loss: the op makes its gradient with the loss, and a loss that is
        scaled afterwards costs another pass over the gradients of all maps.
        """
        count = len(boxes) if isinstance(boxes, Tensor) else sum(len(rows) for rows in boxes)
        if self.training:
            return (1.0 / shared_mean_count(count, device)).expand(count)
        return torch.full((), 1.0 / max(count, 1), dtype=torch.float64, device=device).expand(count)
