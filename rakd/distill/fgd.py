"""FGD's attention part: foreground and background apart, cells and channels weighted by the expert's attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rakd.distill.adapters import ChannelAdapters
from rakd.distill.base import Boxes, DistillationMethod, Maps, Setup, pair_maps, resize
from rakd.distill.masks import area_masks, read_boxes
from rakd.nn import widen


class FocalAttentionDistillation(DistillationMethod):
    """The focal part of focal and global distillation (FGD), without its global context block.

    With spatial attention ``S = H W softmax(mean_c |F| / T)`` and channel attention ``C = C softmax(mean_x |F| / T)``
    of the expert, a cell's weight ``M`` of 1/area of the smallest box over it (foreground), or 1 over the number of
    cells outside all boxes (background), the loss of a level is, over the batch size,

    ``foreground Σ M S C d² + background Σ M_bg S C d² + attention (Σ |S - S_apprentice| + Σ |C - C_apprentice|)``

    and levels are summed.

    Args:
        expert_strides: Pixels of the apprentice's images per cell of the expert's maps.
        temperature: T.
        foreground: Weight. The defaults are those of one-stage detectors; Faster R-CNN: 5e-5, 2.5e-5, 5e-5.
        background: Weight.
        attention: Weight.
        adapter: Brings the apprentice's maps to the expert's channels.

    Raises:
        ValueError: The temperature is not positive.

    Source:
        Yang et al., Focal and Global Knowledge Distillation for Detectors, CVPR 2022, arXiv 2111.11837, eq. 2 to 9.
    """

    def __init__(
        self,
        expert_strides: Sequence[float],
        *,
        temperature: float = 0.5,
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 1e-3,
        adapter: ChannelAdapters | None = None,
    ) -> None:
        super().__init__(adapter=adapter)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.expert_strides: tuple[float, ...] = tuple(float(stride) for stride in expert_strides)
        self.temperature = float(temperature)
        self.foreground = float(foreground)
        self.background = float(background)
        self.attention = float(attention)

    @classmethod
    def build(cls, setup: Setup, **options: Any) -> "FocalAttentionDistillation":
        """See `rakd.distill.base.DistillationMethod.build`."""
        return cls(setup.expert_strides, adapter=setup.adapter(), **options)

    def attentions(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Compute spatial ``[B, H, W]`` and channel ``[B, C]`` attention of a map."""
        size = feature.abs()
        images, channels, height, width = feature.shape
        spatial = torch.softmax((size.mean(dim=1) / self.temperature).flatten(1), dim=1) * (height * width)
        channel = torch.softmax(size.mean(dim=(2, 3)) / self.temperature, dim=1) * channels
        return spatial.view(images, height, width), channel

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.forward`."""
        expert_maps, maps = pair_maps(expert, apprentice, self.adapter)
        rows = read_boxes(boxes, len(expert_maps[0]), expert_maps[0].device)
        losses = []
        for ours, theirs, stride in zip(maps, expert_maps, self.expert_strides, strict=True):
            ours, theirs = resize(ours, theirs), widen(theirs)
            spatial, channel = self.attentions(theirs)
            our_spatial, our_channel = self.attentions(ours)
            inside = area_masks(rows, stride, (theirs.shape[2], theirs.shape[3]), len(theirs)).to(theirs)
            outside = (inside == 0).to(theirs)
            outside = outside / outside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
            weights = spatial * (self.foreground * inside + self.background * outside)
            squares = ((ours - theirs).square() * channel[:, :, None, None]).sum(dim=1)
            moved = (our_spatial - spatial).abs().sum() + (our_channel - channel).abs().sum()
            losses.append(((weights * squares).sum() + self.attention * moved) / len(theirs))
        return torch.stack(losses).sum()
