"""PKD: Pearson correlation of whole feature maps, channel by channel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rakd.distill.base import Boxes, DistillationMethod, Maps, pair_maps, resize
from rakd.nn import widen


class PearsonDistillation(DistillationMethod):
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

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.forward`."""
        expert_maps, maps = pair_maps(expert, apprentice, self.adapter)
        losses = []
        for name, ours, theirs in zip(apprentice, maps, expert_maps, strict=True):
            if theirs.shape[0] * theirs.shape[2] * theirs.shape[3] < 2:
                raise ValueError(
                    f"expert[{name!r}]: expected two or more values per channel, which have a correlation, got shape "
                    f"{list(theirs.shape)}"
                )
            losses.append(0.5 * F.mse_loss(_standardise(resize(ours, theirs)), _standardise(widen(theirs))))
        return torch.stack(losses).sum()


def _standardise(feature: Tensor) -> Tensor:
    """Zero mean and unit unbiased standard deviation of each channel, over batch and space."""
    deviation, mean = torch.std_mean(feature, dim=(0, 2, 3), keepdim=True)
    return (feature - mean) / (deviation + 1e-6)
