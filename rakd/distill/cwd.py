"""CWD: the spatial distribution of each channel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rakd.distill.adapters import ChannelAdapters
from rakd.distill.base import Boxes, DistillationMethod, Maps, pair_maps, resize
from rakd.nn import widen


class ChannelWiseDistillation(DistillationMethod):
    """Channel-wise knowledge distillation (CWD).

    Each channel's map becomes a distribution over its cells, ``softmax(x / T)``; the loss of a level is
    ``T² Σ KL(expert ‖ apprentice) / (B · C)``, and levels are summed. A constant added to a channel does not matter.

    Args:
        temperature: T.
        adapter: Brings the apprentice's maps to the expert's channels.

    Raises:
        ValueError: The temperature is not positive.

    Source:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv 2011.13256.
    """

    def __init__(self, *, temperature: float = 1.0, adapter: ChannelAdapters | None = None) -> None:
        super().__init__(adapter=adapter)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.temperature = float(temperature)

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.forward`."""
        expert_maps, maps = pair_maps(expert, apprentice, self.adapter)
        losses = []
        for ours, theirs in zip(maps, expert_maps, strict=True):
            ours_log = F.log_softmax(resize(ours, theirs).flatten(2) / self.temperature, dim=2)
            theirs_log = F.log_softmax(widen(theirs).flatten(2) / self.temperature, dim=2)
            divergence = F.kl_div(ours_log, theirs_log, reduction="sum", log_target=True)
            losses.append(self.temperature**2 * divergence / (theirs.shape[0] * theirs.shape[1]))
        return torch.stack(losses).sum()
