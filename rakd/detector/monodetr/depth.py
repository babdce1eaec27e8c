"""The depth branch: a map of distances, as probabilities of bins, and tokens that carry them to the decoder.

Bins are those of linear increasing discretisation (LID, arXiv 2005.13423): bin i begins at
``nearest + s i (i + 1) / 2`` with ``s = 2 (farthest - nearest) / (bins (bins + 1))``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rakd.detector.monodetr.attention import Attention
from rakd.detector.monodetr.configs import DepthConfig
from rakd.detector.monodetr.layers import FeedForward, Residual
from rakd.detector.monodetr.projections import norm
from rakd.nn import widen


def bin_step(config: DepthConfig) -> float:
    """Metres that a bin is wider than the one before."""
    return 2 * (config.farthest - config.nearest) / (config.bins * (config.bins + 1))


def bin_values(config: DepthConfig) -> Tensor:
    """Distance ``[bins + 1]`` that each bin stands for, metres; the last one is the background's."""
    step, places = bin_step(config), torch.arange(config.bins) + 0.5
    values = places.square() * (step / 2) - step / 8 + config.nearest
    return torch.cat([values, torch.tensor([config.farthest])])


def bin_indices(depth: Tensor, config: DepthConfig) -> Tensor:
    """The bin of each distance, int64; the number of bins, that of the background, outside of nearest to farthest."""
    known = (depth >= config.nearest) & (depth <= config.farthest)
    inner = torch.where(known, depth, config.nearest) - config.nearest
    places = (-0.5 + 0.5 * (1 + 8 * inner / bin_step(config)).sqrt()).long().clamp(max=config.bins - 1)
    return torch.where(known, places, config.bins)


class DepthPredictor(nn.Module):
    """Predicts the map of distances at stride 16, and makes the tokens that the decoder attends to.

    Args:
        channels: Of the maps and tokens.
        heads: Of the depth encoder's attention.
        hidden: Width of its feed-forward network.
        dropout: Share that training drops.
        config: The bins.
    """

    values: Tensor

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float, config: DepthConfig) -> None:
        super().__init__()
        self.farthest = config.farthest
        self.fine = nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1), norm(channels))
        self.middle = nn.Sequential(nn.Conv2d(channels, channels, 1), norm(channels))
        self.coarse = nn.Sequential(nn.Conv2d(channels, channels, 1), norm(channels))
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(channels, channels, 3, 1, 1), norm(channels), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.bins = nn.Conv2d(channels, config.bins + 1, 1)
        self.attention, self.attended = Attention(channels, heads, dropout), Residual(channels, dropout)
        self.feed_forward = FeedForward(channels, hidden, dropout)
        self.positions = nn.Embedding(int(config.farthest) + 1, channels)
        self.register_buffer("values", bin_values(config), persistent=False)

    def mix(self, features: dict[str, Tensor]) -> Tensor:
        """Make the branch's map ``[B, C, h, w]`` of stride 16 from the maps p3 .. p5."""
        coarse = F.interpolate(features["p5"], size=features["p4"].shape[2:], mode="bilinear", align_corners=False)
        mixed = (self.fine(features["p3"]) + self.middle(features["p4"]) + self.coarse(coarse)) / 3
        result: Tensor = self.trunk(mixed)
        return result

    def forward(self, mixed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict.

        Args:
            mixed: Result of `mix`.
            positions: ``[1, h * w, C]`` of p4's cells.

        Returns:
            Logits of the bins ``[B, bins + 1, h, w]`` and expected distances ``[B, h, w]``, metres, both float32, and
            the tokens ``[B, h * w, C]``.
        """
        logits = widen(self.bins(mixed))
        expected = (logits.softmax(dim=1) * self.values[:, None, None]).sum(dim=1)
        tokens = mixed.flatten(2).transpose(1, 2)
        placed = tokens + positions
        tokens = self.feed_forward(self.attended(tokens, self.attention(placed, placed, tokens)))
        return logits, expected, tokens + self._at(expected).flatten(1, 2).to(tokens.dtype)

    def _at(self, distance: Tensor) -> Tensor:
        """The learned positions at distances ``[B, h, w]``, between those of the whole metres; ``[B, h, w, C]``."""
        distance = distance.clamp(0.0, self.farthest)
        lower = distance.floor()
        share = (distance - lower)[..., None]
        first = lower.long()
        second = (first + 1).clamp(max=self.positions.num_embeddings - 1)
        between: Tensor = self.positions(first) * (1 - share) + self.positions(second) * share
        return between
