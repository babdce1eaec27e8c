"""Channel adapters: 1×1 convolutions that bring an apprentice's maps to the expert's numbers of channels."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from rakd.distill.maps import check_channels
from rakd.nn import seeded_modules


class ChannelAdapters(nn.Module):
    """One 1×1 convolution with bias per level whose channels differ; other levels pass unchanged.

    RoIAlign and bilinear resizing are linear and their weights sum to 1 inside the map, so that adapting before them
    does the same there as adapting after, at once for all boxes.

    Args:
        apprentice_channels: Channels of the apprentice's maps, fine to coarse.
        expert_channels: Of the expert's, as many.
        seed: Of the initial weights.

    Raises:
        ValueError: Numbers of levels differ, or a number of channels is not positive.
        TypeError: These are no sequences of integers.
    """

    def __init__(self, apprentice_channels: Sequence[int], expert_channels: Sequence[int], *, seed: int = 0) -> None:
        super().__init__()
        self.apprentice_channels = check_channels("apprentice_channels", apprentice_channels)
        self.expert_channels = check_channels("expert_channels", expert_channels)
        if len(self.apprentice_channels) != len(self.expert_channels):
            raise ValueError(
                f"apprentice_channels: expected {len(self.expert_channels)} levels as in expert_channels, got "
                f"{len(self.apprentice_channels)}"
            )
        pairs = zip(self.apprentice_channels, self.expert_channels, strict=True)
        with seeded_modules(seed):
            self.levels = nn.ModuleList(nn.Identity() if a == e else nn.Conv2d(a, e, kernel_size=1) for a, e in pairs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Adapt the apprentice's maps.

        Args:
            maps: ``[B, C_apprentice, H, W]`` per level, fine to coarse.

        Returns:
            ``[B, C_expert, H, W]`` per level.

        Raises:
            ValueError: The number of maps or a map's channels are not those of the constructor.
        """
        if len(maps) != len(self.levels):
            raise ValueError(f"apprentice: expected {len(self.levels)} maps, one per adapter, got {len(maps)}")
        for i, (feature, channels) in enumerate(zip(maps, self.apprentice_channels, strict=True)):
            if feature.shape[1] != channels:
                raise ValueError(
                    f"apprentice: expected {channels} channels in map {i}, as its adapter takes, got shape "
                    f"{list(feature.shape)}"
                )
        return [_adapt(adapter, feature) for adapter, feature in zip(self.levels, maps, strict=True)]


def _adapt(adapter: nn.Module, feature: Tensor) -> Tensor:
    """Apply an adapter in the map's dtype, which differs from the weights' where autocast covered the model alone."""
    if not isinstance(adapter, nn.Conv2d):
        return feature
    dtype = feature.dtype
    assert adapter.bias is not None
    return F.conv2d(feature, adapter.weight.to(dtype), adapter.bias.to(dtype))
