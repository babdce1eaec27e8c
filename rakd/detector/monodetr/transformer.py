"""The transformer: an encoder of the four maps, and a decoder of queries that sees distances first, then the maps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rakd.detector.monodetr.attention import Attention, DeformableAttention, Shapes
from rakd.detector.monodetr.configs import TransformerConfig
from rakd.detector.monodetr.heads import Heads, Predictions
from rakd.detector.monodetr.layers import FeedForward, Residual
from rakd.nn import widen


class EncoderLayer(nn.Module):
    """Deformable attention among all cells of all maps.

    Args:
        channels: Of the tokens.
        levels: Maps.
        config: The rest.
    """

    def __init__(self, channels: int, levels: int, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, config.heads, levels, config.points)
        self.attended = Residual(channels, config.dropout)
        self.feed_forward = FeedForward(channels, config.hidden, config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor, references: Tensor, shapes: Shapes) -> Tensor:
        """Give tokens ``[B, S, C]``."""
        found = self.attention(tokens + positions, references, tokens, shapes)
        result: Tensor = self.feed_forward(self.attended(tokens, found))
        return result


class Encoder(nn.Module):
    """Turns the four maps into the memory that queries read.

    Args:
        channels: Of the maps.
        levels: Maps.
        config: The rest.
    """

    def __init__(self, channels: int, levels: int, config: TransformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(channels, levels, config) for _ in range(config.encoder_layers))
        self.levels = nn.Parameter(torch.randn(levels, channels))

    def forward(self, maps: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
        """Encode.

        Args:
            maps: ``[B, C, h, w]`` each, fine to coarse.
            positions: ``[1, h * w, C]`` each.

        Returns:
            ``[B, S, C]``, the maps flattened, one after the other.
        """
        shapes = [(int(m.shape[2]), int(m.shape[3])) for m in maps]
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        placed = torch.cat([p + level for p, level in zip(positions, self.levels, strict=True)], dim=1)
        references = torch.cat([_cell_centers(h, w, tokens.device, placed.dtype) for h, w in shapes])[None]
        for layer in self.layers:
            tokens = layer(tokens, placed, references, shapes)
        return tokens


class DecoderLayer(nn.Module):
    """Queries look at distances, at each other, and at the maps.

    Args:
        channels: Of the queries.
        levels: Maps.
        config: The rest.
    """

    def __init__(self, channels: int, levels: int, config: TransformerConfig) -> None:
        super().__init__()
        self.depth = Attention(channels, config.heads, config.dropout)
        self.seen_depth = Residual(channels, config.dropout)
        self.own = nn.ModuleDict({name: nn.Linear(channels, channels) for name in ("q", "q_place", "k", "k_place")})
        for layer in self.own.values():
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        self.attention = Attention(channels, config.heads, config.dropout)
        self.attended = Residual(channels, config.dropout)
        self.maps = DeformableAttention(channels, config.heads, levels, config.points)
        self.seen_maps = Residual(channels, config.dropout)
        self.feed_forward = FeedForward(channels, config.hidden, config.dropout)

    def forward(
        self,
        queries: Tensor,
        places: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        depth: Tensor,
        groups: int,
    ) -> Tensor:
        """Give queries ``[B, N, C]``; those of different groups do not see each other."""
        queries = self.seen_depth(queries, self.depth(queries, depth, depth))
        keys = self.own["k"](queries) + self.own["k_place"](places)
        asked = self.own["q"](queries) + self.own["q_place"](places)
        batch = len(queries)
        apart = [x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (asked, keys, queries)]
        mixed = self.attention(*apart).unflatten(0, (batch, groups)).flatten(1, 2)
        queries = self.attended(queries, mixed)
        queries = self.seen_maps(queries, self.maps(queries + places, references, memory, shapes))
        result: Tensor = self.feed_forward(queries)
        return result


class Decoder(nn.Module):
    """Queries, which become objects layer by layer.

    Args:
        channels: Of the queries.
        levels: Maps.
        config: The rest.
    """

    def __init__(self, channels: int, levels: int, config: TransformerConfig) -> None:
        super().__init__()
        self.groups, self.count = config.groups, config.queries
        self.places = nn.Embedding(config.groups * config.queries, channels)
        self.contents = nn.Embedding(config.groups * config.queries, channels)
        self.reference = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference.weight)
        nn.init.zeros_(self.reference.bias)
        self.layers = nn.ModuleList(DecoderLayer(channels, levels, config) for _ in range(config.decoder_layers))
        self.heads = nn.ModuleList(Heads(channels, first=i == 0) for i in range(config.decoder_layers))

    def forward(self, memory: Tensor, shapes: Shapes, depth: Tensor) -> list[Predictions]:
        """Decode.

        Args:
            memory: ``[B, S, C]``, see `Encoder`.
            shapes: Of the maps.
            depth: ``[B, h * w, C]`` tokens of the depth branch.

        Returns:
            Predictions of each layer; of all groups in training, of the first one otherwise.
        """
        groups = self.groups if self.training else 1
        chosen = torch.arange(groups * self.count, device=memory.device)
        places, queries = (table(chosen).expand(len(memory), -1, -1) for table in (self.places, self.contents))
        references = widen(self.reference(places)).sigmoid()
        predictions = []
        for layer, heads in zip(self.layers, self.heads, strict=True):
            queries = layer(queries, places, references, memory, shapes, depth, groups)
            found = heads(queries, references)
            # Refined step by step: no layer's loss moves the boxes of the layers before.
            references = found.boxes.detach()
            predictions.append(found)
        return predictions


def _cell_centers(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Centres (x, y) of a map's cells as shares of its width and height, ``[height * width, 2]``."""
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2).view(-1, 2)
