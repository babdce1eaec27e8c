"""SemCKD: each of the apprentice's levels learns from all of the expert's, weighted by attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rakd.distill.base import Boxes, DistillationMethod, Maps, Setup
from rakd.distill.maps import check_both, check_channels
from rakd.nn import seeded_modules, widen


class SemanticCalibration(DistillationMethod):
    """Cross-layer distillation with semantic calibration (SemCKD).

    For each map ``F``, a row per image, the similarity matrix ``F Fᵀ`` of the batch goes through an MLP to a query
    (apprentice) or key (expert) of unit length per image. ``softmax(query · key)`` over the expert's levels weighs the
    pairs. For each pair the larger map is average-pooled to the smaller one's size, the apprentice's is projected to
    the expert's channels (1×1, 3×3, 1×1 convolutions with batch normalisation and ReLU between them), and
    ``loss = Σ_pairs weight · mse / (B · apprentice levels)``.

    The MLP's input is as wide as the batch: the batch size is fixed, and 2 or more, since an image alone has nothing
    to be similar to. Under DistributedDataParallel it is that of each process.

    The attention is computed in float32 under autocast; products over whole maps exceed float16's range.

    Args:
        expert_channels: Channels of the expert's maps, in the order of its dict.
        apprentice_channels: Of the apprentice's. The numbers of levels may differ.
        batch_size: Images in every batch.
        embedding: Numbers in a query or key. 16 is the original's at its batch of 64; its rule, a quarter of the batch,
            leaves one at a detector's batch, and a unit vector of one number carries no gradient.
        seed: Of the initial weights.

    Raises:
        ValueError: A number of channels, the batch size or the embedding is too small.
        TypeError: One of these is no integer.

    Source:
        Chen et al., Cross-Layer Distillation with Semantic Calibration, AAAI 2021, doi 10.1609/aaai.v35i8.16865.
    """

    def __init__(
        self,
        expert_channels: Sequence[int],
        apprentice_channels: Sequence[int],
        batch_size: int,
        *,
        embedding: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.expert_channels = check_channels("expert_channels", expert_channels)
        self.apprentice_channels = check_channels("apprentice_channels", apprentice_channels)
        for name, value in (("batch_size", batch_size), ("embedding", embedding)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
        if batch_size < 2:
            raise ValueError(
                f"batch_size: SemCKD compares a batch's images with each other; expected 2 or more, got {batch_size}"
            )
        if embedding < 2:
            raise ValueError(f"embedding: expected 2 or more, got {embedding}")
        self.batch_size = batch_size
        with seeded_modules(seed):
            self.queries = nn.ModuleList(_Embedding(batch_size, embedding) for _ in self.apprentice_channels)
            self.keys = nn.ModuleList(_Embedding(batch_size, embedding) for _ in self.expert_channels)
            self.projections = nn.ModuleList(
                nn.ModuleList(_projection(a, e) for e in self.expert_channels) for a in self.apprentice_channels
            )

    @classmethod
    def build(cls, setup: Setup, **options: Any) -> "SemanticCalibration":
        """See `rakd.distill.base.DistillationMethod.build`."""
        if setup.batch_size is None:
            raise ValueError("batch_size: SemCKD needs the number of images in every batch, got None")
        return cls(setup.expert_channels, setup.apprentice_channels, setup.batch_size, seed=setup.seed, **options)

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.forward`."""
        experts, apprentices = check_both(expert, apprentice)
        self._check("expert", experts, self.expert_channels)
        self._check("apprentice", apprentices, self.apprentice_channels)
        weights = self.attention(experts, apprentices)
        total = weights.new_zeros(())
        for i, ours in enumerate(apprentices):
            for j, theirs in enumerate(experts):
                size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
                pooled = _pool(ours, size).to(self.queries[i].hidden.weight.dtype)  # type: ignore[union-attr, arg-type]
                projected = self.projections[i][j](pooled)  # type: ignore[index]
                difference = widen(projected) - widen(_pool(theirs, size))
                total = total + (weights[:, i, j] * difference.square().mean(dim=(1, 2, 3))).sum()
        return total / (self.batch_size * len(apprentices))

    def attention(self, expert: Sequence[Tensor], apprentice: Sequence[Tensor]) -> Tensor:
        """Weigh the pairs of levels.

        Args:
            expert: Maps ``[batch_size, C, H, W]``.
            apprentice: The apprentice's.

        Returns:
            ``[batch_size, apprentice levels, expert levels]``; sums to 1 over the expert's levels.
        """
        with torch.autocast(apprentice[0].device.type, enabled=False):
            queries = torch.stack([mlp(m) for mlp, m in zip(self.queries, apprentice, strict=True)], dim=1)
            keys = torch.stack([mlp(m) for mlp, m in zip(self.keys, expert, strict=True)], dim=1)
            return torch.softmax(queries @ keys.mT, dim=2)

    def _check(self, argument: str, maps: list[Tensor], channels: tuple[int, ...]) -> None:
        if len(maps) != len(channels):
            raise ValueError(f"{argument}: expected {len(channels)} maps as in {argument}_channels, got {len(maps)}")
        for i, (feature, count) in enumerate(zip(maps, channels, strict=True)):
            if feature.shape[1] != count:
                raise ValueError(
                    f"{argument}: expected {count} channels in map {i}, as in {argument}_channels, got shape "
                    f"{list(feature.shape)}"
                )
        if maps[0].shape[0] != self.batch_size:
            raise ValueError(
                f"{argument}: expected batches of {self.batch_size} images, the number SemCKD was made for, got "
                f"{maps[0].shape[0]}; let the data loader drop an incomplete last batch (drop_last=True)"
            )


class _Embedding(nn.Module):
    """A map to one unit vector per image, from its similarity to the other images of the batch."""

    def __init__(self, batch_size: int, embedding: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(batch_size, 2 * embedding)
        self.out = nn.Linear(2 * embedding, embedding)

    def forward(self, feature: Tensor) -> Tensor:
        rows = feature.flatten(1).to(self.hidden.weight.dtype)
        return F.normalize(self.out(F.relu(self.hidden(rows @ rows.T))), dim=1)


def _projection(channels: int, out: int) -> nn.Sequential:
    middle = 2 * out
    return nn.Sequential(
        nn.Conv2d(channels, middle, kernel_size=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, middle, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, out, kernel_size=1, bias=False),
    )


def _pool(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool a map to a size no larger than its own."""
    height, width = feature.shape[2:]
    if (height, width) == size:
        return feature
    if height % size[0] == 0 and width % size[1] == 0:
        # The same as below, but on CUDA only this one has a deterministic gradient.
        return F.avg_pool2d(feature, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(feature, size)
