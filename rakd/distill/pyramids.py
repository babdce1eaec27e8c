"""Feature pyramids: a torchvision ResNet with a feature pyramid network, as expert and as apprentice."""

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.functional import normalize

from rakd.distill import Weights

STRIDES = (4, 8, 16, 32)
"""Pixels per cell of the maps p2 .. p5."""

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which torchvision's weights expect
_PATIENCE = 10.0  # seconds to wait for a server that does not answer


class Pyramid(nn.Module):
    """A ResNet with a feature pyramid of 256 channels.

    Args:
        name: torchvision's name of the backbone, such as "resnet18".
        weights: "pretrained" takes torchvision's ImageNet weights for the backbone where they can be loaded,
            and random ones where not; `loaded` tells which. The pyramid network itself always starts random.
        seed: Seed of the random weights.

    Attributes:
        loaded: What the backbone started from, for people: "ImageNet weights", or "random weights" and why.
    """

    def __init__(self, name: str, weights: Weights, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = resnet_fpn_backbone(
                backbone_name=name, weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
            )
        self.loaded = "random weights"
        if weights == "pretrained":
            self.loaded = self._load_pretrained(name)

    def _load_pretrained(self, name: str) -> str:
        try:
            with _patience():
                state = get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            return f"random weights (ImageNet's cannot be loaded: {error})"
        self.network.body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        return "ImageNet weights"

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the maps p2 .. p5.

        Args:
            images: ``[B, 3, H, W]`` in 0..1, RGB.

        Returns:
            ``[B, 256, H / stride, W / stride]`` for each of `STRIDES`, fine to coarse.
        """
        maps = self.network(normalize(images, _MEAN, _STD))
        return {f"p{level}": maps[str(level - 2)] for level in range(2, 6)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Same as `extract_features`."""
        return self.extract_features(images)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set batch normalisation to the statistics of these images, so that random weights give sane scales.

        Args:
            batches: Images as for `extract_features`.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        was_training = self.training
        self.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over what follows
        for images in batches:
            self(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.train(was_training)


@contextmanager
def _patience() -> Iterator[None]:
    """Limit how long a download may wait for a server; offline machines otherwise wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
