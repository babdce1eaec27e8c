"""Drawing of anchors and proposals: a fixed number an image, on the device, from the image's own seed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rakd.nn import send

IGNORED = -1
"""Label of an anchor or proposal that no loss looks at; 0 is background, more is an object."""

# SplitMix64 (Steele et al., Fast splittable pseudorandom number generators, OOPSLA 2014), as signed numbers.
_GOLDEN, _MIX_1, _MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Draw(NamedTuple):
    """Rows drawn of each image: positives first, then negatives, then rows that only fill up.

    Attributes:
        rows: ``[B, S]`` int64, places among the candidates.
        positive: ``[B, S]`` bool, drawn as an object.
        drawn: ``[B, S]`` bool, drawn at all.
    """

    rows: Tensor
    positive: Tensor
    drawn: Tensor


def random_keys(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Random numbers that depend on the seed and the place only: neither on the device nor on the batch.

    Args:
        seeds: One an image, each in 0 .. 2⁶³ - 1.
        count: Numbers an image.
        device: Where they are wanted; nothing waits for it.

    Returns:
        ``[B, count]`` int64 >= 0.
    """
    start = send(torch.tensor(seeds, dtype=torch.int64), device)
    # int64 wraps around, as the algorithm wants it; `&` takes off the sign that `>>` shifts in.
    z = start[:, None] + torch.arange(1, count + 1, device=device) * _GOLDEN
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return (z ^ ((z >> 31) & (2**33 - 1))) & (2**63 - 1)


@torch.no_grad()
def draw(labels: Tensor, seeds: Sequence[int], count: int, positive_share: float) -> Draw:
    """Draw positives and negatives of each image, in numbers that do not depend on values.

    Args:
        labels: ``[B, N]``: 1 or more positive, 0 negative, ``IGNORED`` neither.
        seeds: One an image. A draw depends on its own image's only.
        count: Candidates to draw an image.
        positive_share: Most of them that may be positive, 0..1. Negatives fill the rest.

    Returns:
        ``S = min(count, N)`` rows an image.
    """
    candidates = labels.shape[1]
    keys = random_keys(seeds, candidates, labels.device)
    most = min(int(count * positive_share), candidates)
    best, rows = torch.where(labels > 0, keys, -1).topk(most, dim=1)
    # A chosen positive comes before all negatives, and no other positive is drawn.
    ranks = torch.where(labels == 0, keys >> 1, -1)
    ranks = ranks.scatter(1, rows, torch.where(best >= 0, 2**62 + (best >> 1), ranks.gather(1, rows)))
    rank, rows = ranks.topk(min(count, candidates), dim=1)
    return Draw(rows, rank >= 2**62, rank >= 0)
