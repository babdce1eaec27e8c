"""Distillation methods: modules that take an expert's and an apprentice's feature maps and give a loss.

All have one interface, ``forward(expert, apprentice, boxes) -> scalar``: two dicts of maps ``[B, C, H, W]``, fine to
coarse, and the boxes of each image. The loss carries no weight of its own. No gradient flows to the expert's maps.
`make_method` makes each by its name.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rakd.distill import MethodName
from rakd.distill.adapters import ChannelAdapters
from rakd.distill.maps import check_channels, check_pairs, widen
from rakd.distill.semckd import SemanticCalibration
from rakd.distributed import shared_mean_count
from rakd_ops import SoftRoIDistillLoss

Assignment = Literal["soft", "hard", "uniform"]
"""How a box's levels are weighted; see `rakd_ops.level_weights`."""


class RegionDistillation(nn.Module):
    """Region-aware distillation: features in boxes, compared level by level (RAKD, and its ablations).

    `rakd_ops.soft_roi_distill`, averaged over all boxes. Where `torch.distributed` runs several processes, over those
    of all processes, such that DistributedDataParallel gives the gradients of one process with the whole batch; every
    process must then call this equally often (see `rakd.distributed.shared_mean_count`).

    Args:
        assignment: "soft" (RAKD's SFA), "hard" (HFA) or "uniform" (L_RoI).
        strides: Pixels per cell of each of the apprentice's maps, increasing.
        expert_strides: See `rakd_ops.soft_roi_distill`, as all others not told here.
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
        super().__init__()
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
        self.adapter = adapter

    def forward(
        self, expert: Mapping[str, Tensor], apprentice: Mapping[str, Tensor], boxes: Sequence[Tensor]
    ) -> Tensor:
        """Compute the loss.

        Args:
            expert: Maps with the apprentice's names. Other sizes need ``expert_strides``.
            apprentice: Maps of the strides given to the constructor, fine to coarse.
            boxes: ``[K_b, 4]`` per image, (x1, y1, x2, y2) in pixels of the tensor the apprentice's network was given.

        Returns:
            A scalar, float64 for float64 maps, else float32; 0 where there is no box.

        Raises:
            ValueError, TypeError: Names, shapes, channels, dtypes or boxes are wrong.
        """
        teachers, learners = check_pairs(expert, apprentice)
        if not isinstance(boxes, Sequence):
            raise TypeError(f"boxes: expected a sequence of tensors, one per image, got {type(boxes).__name__}")
        if self.adapter is not None:
            learners = self.adapter(learners)
        count = sum(len(rows) for rows in boxes)
        # As weights rather than as a divisor of the loss: the op makes its gradient with the loss, and a loss that is
        # scaled afterwards costs another pass over the gradients of all maps.
        share = 1.0 / shared_mean_count(count, learners[0].device)
        loss: Tensor = self.loss(learners, teachers, boxes, share.expand(count))
        return loss


class PearsonDistillation(nn.Module):
    """Pearson correlation of whole maps, channel by channel (PKD).

    Each channel of each map is brought to zero mean and unit variance over batch and space; half the mean squared
    difference, summed over levels, then is ``(n - 1) / n · (1 - r)`` per channel of ``n`` values with correlation
    ``r``. Scale and offset of features do not matter. Apprentice maps of another size are resized bilinearly.
    Statistics are those of this process's batch, as in batch normalisation.

    Args:
        adapter: Brings the apprentice's maps to the expert's channels where these differ.

    Source:
        Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
        NeurIPS 2022, arXiv 2207.02039.
    """

    def __init__(self, *, adapter: ChannelAdapters | None = None) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(
        self, expert: Mapping[str, Tensor], apprentice: Mapping[str, Tensor], boxes: Sequence[Tensor]
    ) -> Tensor:
        """Compute the loss.

        Args:
            expert: Maps with the apprentice's names.
            apprentice: The apprentice's, fine to coarse.
            boxes: Not used; here so that all methods are called alike.

        Returns:
            A scalar, float64 for float64 maps, else float32.

        Raises:
            ValueError: Names or channels differ, or a map has but one value per channel.
            TypeError: These are no dicts of maps.
        """
        teachers, learners = check_pairs(expert, apprentice)
        if self.adapter is not None:
            learners = self.adapter(learners)
        losses = []
        for name, learner, teacher in zip(apprentice, learners, teachers, strict=True):
            if learner.shape[1] != teacher.shape[1]:
                raise ValueError(
                    f"apprentice[{name!r}]: expected {teacher.shape[1]} channels as in expert, got shape "
                    f"{list(learner.shape)}; channels are compared one to one, an adapter brings them to one number"
                )
            if teacher.shape[0] * teacher.shape[2] * teacher.shape[3] < 2:
                raise ValueError(
                    f"expert[{name!r}]: expected two or more values per channel, which have a correlation, got shape "
                    f"{list(teacher.shape)}"
                )
            resized = widen(learner)
            if learner.shape[2:] != teacher.shape[2:]:
                resized = F.interpolate(resized, size=teacher.shape[2:], mode="bilinear", align_corners=False)
            losses.append(0.5 * F.mse_loss(_standardise(resized), _standardise(widen(teacher))))
        return torch.stack(losses).sum()


def _standardise(feature: Tensor) -> Tensor:
    """Zero mean and unit unbiased standard deviation of each channel, over batch and space."""
    deviation, mean = torch.std_mean(feature, dim=(0, 2, 3), keepdim=True)
    return (feature - mean) / (deviation + 1e-6)


def make_method(
    name: MethodName,
    *,
    strides: Sequence[float],
    expert_channels: int | Sequence[int],
    apprentice_channels: int | Sequence[int],
    batch_size: int | None = None,
    seed: int = 0,
    expert_strides: Sequence[float] | None = None,
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 2,
    sigma: float = 1.0,
    canonical_size: float = 224.0,
    canonical_level: float = 4,
    backend: str = "auto",
) -> nn.Module | None:
    """Make a distillation method by its name, with adapters where channels differ.

    Args:
        name: "rakd", "hfa", "l_roi" (`RegionDistillation`), "pkd" (`PearsonDistillation`), "semckd"
            (`rakd.distill.semckd.SemanticCalibration`) or "none".
        strides: Pixels per cell of the apprentice's maps, fine to coarse.
        expert_channels: Channels of the expert's maps: per level, or one number for all.
        apprentice_channels: Of the apprentice's.
        batch_size: Images in every batch of a process; only "semckd" needs it.
        seed: Of the initial weights of adapters, projections and attention.
        expert_strides: Of the region methods, as all that follow: see `RegionDistillation`.
        output_size: Same.
        sampling_ratio: Same.
        sigma: Same.
        canonical_size: Same.
        canonical_level: Same.
        backend: Same.

    Returns:
        A module to be called as ``method(expert, apprentice, boxes)``; None for "none".

    Raises:
        ValueError: The name is not known, "semckd" has no batch size, or a setting is wrong.
        TypeError: A setting has the wrong type.
    """
    if name not in get_args(MethodName):
        raise ValueError(f"name: expected one of {', '.join(map(repr, get_args(MethodName)))}, got {name!r}")
    if name == "none":
        return None
    expert = _per_level("expert_channels", expert_channels, len(strides))
    apprentice = _per_level("apprentice_channels", apprentice_channels, len(strides))
    if name == "semckd":
        if batch_size is None:
            raise ValueError("batch_size: SemCKD needs the number of images in every batch, got None")
        return SemanticCalibration(expert, apprentice, batch_size, seed=seed)
    adapter = None if expert == apprentice else ChannelAdapters(apprentice, expert, seed=seed)
    if name == "pkd":
        return PearsonDistillation(adapter=adapter)
    assignments: dict[str, Assignment] = {"rakd": "soft", "hfa": "hard", "l_roi": "uniform"}
    return RegionDistillation(
        assignments[name],
        strides,
        expert_strides=expert_strides,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        sigma=sigma,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
        backend=backend,
        adapter=adapter,
    )


def _per_level(argument: str, channels: int | Sequence[int], levels: int) -> tuple[int, ...]:
    listed = check_channels(argument, (channels,) * levels if isinstance(channels, int) else channels)
    if len(listed) != levels:
        raise ValueError(f"{argument}: expected {levels} numbers, one per stride, got {len(listed)}")
    return listed
