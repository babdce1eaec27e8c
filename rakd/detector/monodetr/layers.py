"""Parts of the transformer's layers: residuals, feed-forward networks, perceptrons, positions in maps."""

import math

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Adds what a layer gave, and normalises.

    Args:
        channels: Of the tokens.
        dropout: Share of what is added that training drops.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, added: Tensor) -> Tensor:
        """Give ``[B, N, C]`` of the two."""
        result: Tensor = self.norm(tokens + self.dropout(added))
        return result


class FeedForward(nn.Module):
    """Two layers on each token, with a residual.

    Args:
        channels: Of the tokens.
        hidden: Of the layer between.
        dropout: Share that training drops.
    """

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, channels)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        self.residual = Residual(channels, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give ``[B, N, C]`` of tokens ``[B, N, C]``."""
        result: Tensor = self.residual(tokens, self.layers(tokens))
        return result


def perceptron(channels: int, out: int, layers: int) -> nn.Sequential:
    """Layers of ``channels`` with ReLU between them; the last one gives ``out``."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(channels, out))


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of a map's rows, then of its columns (DETR, arXiv 2005.12872), ``[1, height * width, C]``."""
    half = channels // 2
    places = torch.arange(half, device=device)
    periods = 10_000 ** (2 * (places // 2).to(torch.float32) / half)
    axes = []
    for count in (height, width):
        angles = torch.arange(1, count + 1, device=device, dtype=torch.float32) * (2 * math.pi / count)
        phases = angles[:, None] / periods
        axes.append(torch.where(places % 2 == 0, phases.sin(), phases.cos()))
    rows = axes[0][:, None].expand(height, width, half)
    columns = axes[1][None].expand(height, width, half)
    return torch.cat([rows, columns], dim=2).view(1, height * width, channels)
