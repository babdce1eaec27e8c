"""The maps that MonoDETR works on: a backbone's maps of strides 8, 16 and 32 at one width, and one of stride 64."""

from torch import Tensor, nn

from rakd.detector.backbones import IMAGENET
from rakd.detector.base_config import Weights
from rakd.detector.pyramid import Pyramid

STRIDES = (8, 16, 32, 64)
"""Pixels per cell of the maps p3 .. p6."""

_STEM = ("conv1", "bn1", "layer1")  # of torchvision's and timm's ResNets


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation; 32 groups at 256 channels."""
    return nn.GroupNorm(channels // 8, channels)


class Projections(nn.Module):
    """1x1 convolutions of the three coarser maps, and a 3x3 one with stride 2 of the coarsest, each normalised.

    Args:
        widths: Channels of the backbone's maps p2 .. p5.
        channels: Of every result.
    """

    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, channels, 1) for width in widths[1:]]
        convolutions.append(nn.Conv2d(widths[-1], channels, 3, 2, 1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        self.layers = nn.ModuleList(nn.Sequential(convolution, norm(channels)) for convolution in convolutions)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn the backbone's maps p2 .. p5 into p3 .. p6."""
        sources = (maps["p3"], maps["p4"], maps["p5"], maps["p5"])
        return {f"p{i}": layer(x) for i, (layer, x) in enumerate(zip(self.layers, sources, strict=True), start=3)}


class ProjectedPyramid(Pyramid):
    """A backbone with `Projections` in place of a feature pyramid network.

    Args:
        name: See `rakd.detector.pyramid.Pyramid`.
        weights: Same.
        seed: Same.
        channels: Same.
        frozen_norm: Same.
        frozen_stem: Keep a ResNet's first convolution and first stage as they were loaded; without effect on random
            weights and other networks.
    """

    def __init__(
        self, name: str, weights: Weights, seed: int, *, channels: int, frozen_norm: bool, frozen_stem: bool
    ) -> None:
        self._keeps_stem = frozen_stem
        super().__init__(name, weights, seed, channels=channels, frozen_norm=frozen_norm)

    def _make_neck(self, widths: list[int], channels: int) -> nn.Module:
        return Projections(widths, channels)

    def train(self, mode: bool = True) -> "ProjectedPyramid":
        """See `rakd.detector.pyramid.Pyramid.train`; a frozen stem wants no gradient."""
        super().train(mode)
        body = self.body.body
        if self._keeps_stem and self.init_source == IMAGENET and all(hasattr(body, name) for name in _STEM):
            for name in _STEM:
                body.get_submodule(name).eval().requires_grad_(False)
        return self
