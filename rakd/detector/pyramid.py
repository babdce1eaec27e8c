"""Feature pyramids: a backbone with a feature pyramid network on top."""

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, FeaturePyramidNetwork

from rakd.detector.backbones import IMAGENET, RESNET_STAGES, STRIDES, Backbone
from rakd.detector.configs import Weights
from rakd.nn import seeded_modules, widen

__all__ = ["STRIDES", "DeformableConv", "Pyramid"]

_MOMENTUM = 0.1  # of batch normalisation, torch's default


class Pyramid(nn.Module):
    """A backbone with a feature pyramid.

    Args:
        name: Name of the backbone in torchvision or timm, see `rakd.detector.backbones.Backbone`.
        weights: "pretrained" takes ImageNet weights for the backbone where they can be loaded, and random ones where
            not; `init_source` tells which. The pyramid network itself always starts random.
        seed: Seed of the random weights.
        channels: Channels of every map.
        deformable: Make the second convolution (3x3) of each block of a ResNet's stages 3 to 5 deformable (modulated,
            as in DCNv2, arXiv 1811.11168). They start as the plain convolutions they replace.
        frozen_norm: Keep batch normalisation as it was loaded, as is usual for ImageNet weights and small batches.
            Without effect on random weights, which have no statistics to keep.

    Attributes:
        channels: Channels of every map.
        init_source: Weights that the backbone started from, for people: "ImageNet weights", or "random weights" and
            why.

    Raises:
        ValueError: There is no such network, or it has no maps of strides 4 to 32.
    """

    def __init__(
        self,
        name: str,
        weights: Weights,
        seed: int,
        *,
        channels: int = 256,
        deformable: bool = False,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        with seeded_modules(seed):
            self.body = Backbone(name, weights == "pretrained")
            if deformable:
                _make_deformable(self.body.body, name)
            self.fpn = self._make_neck(self.body.widths, channels)
        self.init_source = self.body.init_source
        loaded = self.init_source == IMAGENET
        self._keeps_norm = frozen_norm
        self._frozen_norm = frozen_norm and loaded
        if not loaded:
            # Some networks average over a hundred steps and more, which lags behind weights that start anywhere.
            for norm in _norms(self.body):
                norm.momentum = _MOMENTUM
        self.train()

    def _make_neck(self, widths: list[int], channels: int) -> nn.Module:
        """Make what turns the backbone's maps of these widths into those of `extract_features`."""
        neck: nn.Module = FeaturePyramidNetwork(widths, channels)
        return neck

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the maps p2 .. p5.

        Args:
            images: ``[B, 3, H, W]`` in 0..1, RGB; H and W multiples of 32.

        Returns:
            ``[B, channels, H / stride, W / stride]`` for each of `rakd.detector.backbones.STRIDES`, fine to coarse.
        """
        return dict(self.fpn(self.body(images)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Same as `extract_features`."""
        return self.extract_features(images)

    def train(self, mode: bool = True) -> "Pyramid":
        """Switch to training or evaluation; frozen normalisation stays as it is."""
        super().train(mode)
        if self._frozen_norm:
            for norm in _norms(self.body):
                norm.eval().requires_grad_(False)
        return self

    def take_over_start(self, init_source: str) -> None:
        """Take over what a trained pyramid started from, once its weights have been loaded here.

        Args:
            init_source: Its `init_source`.
        """
        self.init_source = init_source
        self._frozen_norm = self._keeps_norm and init_source == IMAGENET
        self.train(self.training)


class DeformableConv(nn.Module):
    """A modulated deformable convolution that starts as a given plain one (DCNv2, arXiv 1811.11168).

    Args:
        conv: The 3x3 convolution to replace; its weight is taken over.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        size, stride, padding, dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        if isinstance(padding, str):
            raise ValueError(f"conv must have its padding as numbers, got {padding!r}")
        taps = size[0] * size[1]
        self.taps = taps
        self.offsets = nn.Conv2d(conv.in_channels, 3 * taps, 3, stride[0], dilation[0], dilation[0])
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]
        self.conv = DeformConv2d(
            conv.in_channels, conv.out_channels, size[0], stride[0], padding[0], dilation[0], conv.groups, bias=False
        )
        self.conv.weight.data.copy_(conv.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[B, C, H, W]`` at learned places."""
        offsets = self.offsets(x)
        # Twice the sigmoid: a mask of 1 at the start, so that the plain convolution is reproduced.
        mask = 2 * offsets[:, 2 * self.taps :].sigmoid()
        # torchvision's operator knows no half types on the CPU, and no mixed ones without a rule for autocast.
        with torch.autocast(x.device.type, enabled=False):
            moved: Tensor = self.conv(widen(x), widen(offsets[:, : 2 * self.taps]), widen(mask))
        return moved


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]


def _make_deformable(backbone: nn.Module, name: str) -> None:
    for stage in RESNET_STAGES[1:]:
        blocks = getattr(backbone, stage, None)
        if blocks is None:
            raise ValueError(f"deformable needs a ResNet, got {name!r}")
        for block in blocks:
            block.conv2 = DeformableConv(block.conv2)
