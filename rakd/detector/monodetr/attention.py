"""Attention: multi-head (arXiv 1706.03762), and deformable over several maps (Deformable DETR, arXiv 2010.04159)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rakd.detector.boxes import image_extents
from rakd.nn import widen

Shapes = Sequence[tuple[int, int]]
"""(height, width) of each map, fine to coarse."""


class Attention(nn.Module):
    """Multi-head attention, batch first, on `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        channels: Of queries, keys, values and the result.
        heads: Heads; they share the channels out.
        dropout: Share of the attention weights that training drops.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from ``query`` ``[B, N, C]`` to ``key`` and ``value`` ``[B, S, C]``; gives ``[B, N, C]``."""
        parts = zip((self.query, self.key, self.value), (query, key, value), strict=True)
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, x in parts)
        dropped = self.dropout if self.training else 0.0
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=dropped).transpose(1, 2).flatten(2))
        return mixed


class DeformableAttention(nn.Module):
    """Attention to a few learned places of each map around a reference.

    Args:
        channels: Of queries, memory and the result.
        heads: Heads; they share the channels out.
        levels: Maps.
        points: Places of each head in each map.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.shape = heads, levels, points
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.weights = nn.Linear(channels, heads * levels * points)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Each head starts in a direction of its own, its points at distances 1, 2, ... on the side of a square.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        ring = torch.stack([angles.cos(), angles.sin()], dim=1)
        ring = ring / ring.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, points + 1, dtype=torch.float32)
        start = (ring[:, None, None] * steps[:, None]).expand(heads, levels, points, 2)
        self.offsets.bias.data.copy_(start.reshape(-1))

    def forward(self, query: Tensor, references: Tensor, memory: Tensor, shapes: Shapes) -> Tensor:
        """Attend.

        Args:
            query: ``[B, N, C]``.
            references: ``[B or 1, N, 2]`` points (x, y), or ``[B or 1, N, 6]`` points with the distances to the left,
                right, top and bottom side of a box; all as shares of the image's width and height, float32. Offsets are
                in cells around points, and in half sides of the box for boxes.
            memory: ``[B, S, C]``, all maps flattened, one after the other.
            shapes: Of the maps.

        Returns:
            ``[B, N, C]``.
        """
        batch, count = query.shape[:2]
        heads, levels, points = self.shape
        values = self.value(memory).unflatten(2, (heads, -1))
        weights = self.weights(query).view(batch, count, heads, levels * points).softmax(dim=-1)
        # In float32 under autocast, too: a bfloat16 has 8 bits, and a map may be 160 cells wide.
        offsets = widen(self.offsets(query)).view(batch, count, heads, levels, points, 2)
        center = references[:, :, None, None, None, :2]
        if references.shape[2] == 2:
            cells = image_extents([(width, height) for height, width in shapes], offsets.device)
            places = center + offsets / cells[:, None]
        else:
            sides = torch.stack([references[..., 2] + references[..., 3], references[..., 4] + references[..., 5]], -1)
            places = center + offsets / points * sides[:, :, None, None, None] * 0.5
        weights = weights.view(batch, count, heads, levels, points)
        attended: Tensor = self.out(sample_maps(values, shapes, places, weights).to(query.dtype))
        return attended


def sample_maps(values: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of several maps; outside of a map there are zeros.

    Args:
        values: ``[B, S, heads, D]``, all maps flattened, one after the other.
        shapes: Of the L maps.
        places: ``[B, N, heads, L, P, 2]`` (x, y) as shares of width and height.
        weights: ``[B, N, heads, L, P]``.

    Returns:
        ``[B, N, heads * D]``, in the dtype of ``places``.
    """
    batch, _, heads, depth = values.shape
    count = places.shape[1]
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # [B * heads, N, L, P, 2]
    shares = weights.transpose(1, 2).flatten(0, 1).to(places.dtype)
    maps = values.to(places.dtype).permute(0, 2, 3, 1).flatten(0, 1)
    levels = maps.split_with_sizes([h * w for h, w in shapes], dim=2)
    sampled = [
        F.grid_sample(own.view(*own.shape[:2], *shape), grid[:, :, level], padding_mode="zeros", align_corners=False)
        for level, (own, shape) in enumerate(zip(levels, shapes, strict=True))
    ]
    total = sum((sample * shares[:, None, :, level]).sum(dim=3) for level, sample in enumerate(sampled))
    assert isinstance(total, Tensor)
    return total.view(batch, heads * depth, count).transpose(1, 2)
