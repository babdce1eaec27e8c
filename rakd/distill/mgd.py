"""MGD: the apprentice's masked maps must restore the expert's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.adapters import ChannelAdapters
from rakd.distill.base import Boxes, DistillationMethod, Maps, Setup, pair_maps, resize
from rakd.distill.maps import check_channels, check_maps
from rakd.nn import seeded_modules, widen


class MaskedGenerativeDistillation(DistillationMethod):
    """Masked generative distillation (MGD).

    A share of the cells of each of the apprentice's maps is set to zero; two 3×3 convolutions with a ReLU between them
    must restore the expert's map. The loss is the sum of squared differences over the batch size, summed over levels.

    Cells are drawn from ``seed`` and a counter that is part of the state, so that training does not touch the global
    random numbers and resumes to the same bits.

    Args:
        channels: Of the expert's maps, per level.
        masked: Share of the cells that are hidden.
        seed: Of the convolutions' weights and of the masks.
        adapter: Brings the apprentice's maps to the expert's channels.

    Raises:
        ValueError: The share is not between 0 and 1, or a number of channels is not positive.

    Source:
        Yang et al., Masked Generative Distillation, ECCV 2022, arXiv 2205.01529.
    """

    def __init__(
        self, channels: Sequence[int], *, masked: float = 0.65, seed: int = 0, adapter: ChannelAdapters | None = None
    ) -> None:
        super().__init__(adapter=adapter)
        if not 0 <= masked <= 1:
            raise ValueError(f"masked: expected a share from 0 to 1, got {masked}")
        self.masked = float(masked)
        self.seed = seed
        self.draws = 0
        with seeded_modules(seed + 1):
            self.generators = nn.ModuleList(
                nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
                for c in check_channels("channels", channels)
            )

    @classmethod
    def build(cls, setup: Setup, **options: Any) -> "MaskedGenerativeDistillation":
        """See `rakd.distill.base.DistillationMethod.build`."""
        return cls(setup.expert_channels, seed=setup.seed, adapter=setup.adapter(), **options)

    def get_extra_state(self) -> Tensor:
        """Keep the number of masks drawn; as a tensor, which all checkpoint formats hold."""
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up where `get_extra_state` left off."""
        self.draws = int(state)

    def masks(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Draw the next masks, ``[B, 1, H, W]`` per map: 0 hides a cell."""
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + self.draws) % 2**63)
        self.draws += 1
        drawn = [torch.rand((m.shape[0], 1, *m.shape[2:]), generator=generator, device="cpu") for m in maps]
        return [(d >= self.masked).to(m.device, m.dtype, non_blocking=True) for d, m in zip(drawn, maps, strict=True)]

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.forward`."""
        expert_maps, maps = pair_maps(expert, apprentice, self.adapter)
        resized = [resize(ours, theirs) for ours, theirs in zip(maps, expert_maps, strict=True)]
        losses = []
        for generator, ours, theirs, mask in zip(
            self.generators, resized, expert_maps, self.masks(resized), strict=True
        ):
            restored = generator((ours * mask).to(next(generator.parameters()).dtype))
            losses.append((widen(restored) - widen(theirs)).square().sum() / theirs.shape[0])
        return torch.stack(losses).sum()

    def energy(self, expert: Maps, boxes: Boxes, scores: Sequence[Tensor] | None = None) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.energy`."""
        with torch.no_grad():
            maps = check_maps("expert", expert)
            return torch.stack([widen(m).square().sum() / m.shape[0] for m in maps]).sum()
