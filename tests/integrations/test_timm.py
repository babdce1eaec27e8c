"""timm's backbones as experts and apprentices: strides, channels and layout are read, levels found by stride."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from rakd.integrations.timm import distill  # noqa: E402
from rakd_ops import soft_roi_distill  # noqa: E402

BOXES = [torch.tensor([[5.0, 8, 50, 60]]), torch.tensor([[0.0, 0, 90, 40], [60, 10, 80, 60]])]


def make(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, pretrained=False, features_only=True, **kwargs)


def test_a_name_is_enough_for_the_expert() -> None:
    apprentice = make("resnet10t", out_indices=(1, 2, 3, 4))
    distiller = distill("resnet18", apprentice, weight=1.0, pretrained=False)
    assert distiller.strides == (4, 8, 16, 32)
    images = torch.rand(2, 3, 96, 128)
    loss = distiller(images, BOXES, apprentice(images))
    with torch.no_grad():
        theirs = distiller.expert.eval()(images)[1:]  # its first map has stride 2
    torch.testing.assert_close(loss, soft_roi_distill(apprentice(images), theirs, BOXES), rtol=1e-3, atol=1e-5)
    assert not list(distiller.parameters())
    assert all(not p.requires_grad for p in distiller.expert.parameters())


def test_channels_last_of_a_swin_and_adapters_at_once() -> None:
    apprentice = make("resnet10t", out_indices=(1, 2, 3, 4))
    expert = make("swin_tiny_patch4_window7_224", img_size=96)
    assert expert(torch.rand(1, 3, 96, 96))[0].shape == (1, 24, 24, 96)
    distiller = distill(expert, apprentice, weight=1.0)
    adapters = list(distiller.parameters())
    assert [tuple(p.shape[:2]) for p in adapters if p.dim() == 4] == [(96, 64), (192, 128), (384, 256), (768, 512)]
    images = torch.rand(2, 3, 96, 96)
    distiller(images, [rows.clamp(max=96) for rows in BOXES], apprentice(images)).backward()
    assert all(p.grad is not None for p in adapters)
    report = distiller.check(images, [rows.clamp(max=96) for rows in BOXES], apprentice(images))
    assert [level.expert_channels for level in report.levels] == [96, 192, 384, 768]


def test_of_several_levels_with_one_stride_the_deepest_teaches() -> None:
    expert = make("vit_tiny_patch16_224", img_size=64)
    apprentice = make("resnet10t", out_indices=(3,))
    images = torch.rand(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="expert: its images had mean and standard deviation"):
        distiller = distill(expert, apprentice, weight=1.0)
    (found,) = distiller.expert_features(images).values()
    with torch.no_grad():
        maps = expert.eval()(images)
    assert [m.shape for m in maps] == [maps[0].shape] * 3 and torch.equal(found, maps[-1])


def test_an_expert_of_other_normalisation_is_told(recwarn: pytest.WarningsRecorder) -> None:
    apprentice = make("resnet10t", out_indices=(1, 2, 3, 4))
    distill(make("resnet18"), apprentice)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"\(\(0.5, 0.5, 0.5\), .*, the apprentice's have \(\(0.485, .*expert_images="):
        distiller = distill(make("tf_efficientnet_lite0"), apprentice)
    assert distiller.strides == (4, 8, 16, 32) and len(list(distiller.parameters())) == 8


def test_a_swin_may_learn() -> None:
    apprentice = make("swin_tiny_patch4_window7_224", img_size=96)
    distiller = distill(make("resnet18"), apprentice, apprentice_features="", weight=1.0, normalize=True)
    images = torch.rand(2, 3, 96, 96)
    apprentice(images)
    assert float(distiller(images, [rows.clamp(max=96) for rows in BOXES]).detach()) > 0


def test_a_backbone_inside_a_network_and_an_expert_of_another_kind() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make("resnet10t", out_indices=(2, 3))

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(nn.Conv2d(3, 8, s, stride=s) for s in (8, 16))

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [stage(images) for stage in self.stages]

    network = Detector()
    distiller = distill(Expert(), network, weight=1.0)
    assert distiller.strides == (8, 16)
    images = torch.rand(2, 3, 96, 128)
    assert float(distiller(images, BOXES, network.body(images)).detach()) > 0


class Necked(nn.Module):
    """A backbone with a neck of other channels."""

    def __init__(self, channels: int, levels: tuple[int, ...] = (2, 3), **options: Any) -> None:
        super().__init__()
        self.body = make("resnet10t", out_indices=levels, **options)
        self.neck = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in self.body.feature_info.channels()[-2:])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = list(self.body(images))[-2:]
        return [layer(m) for layer, m in zip(self.neck, maps, strict=True)]


@pytest.mark.parametrize("levels", [(2, 3), (0, 1, 2, 3)])
def test_an_expert_around_a_backbone_gives_its_own_maps(levels: tuple[int, ...]) -> None:
    apprentice = make("resnet10t", seed=1, out_indices=(2, 3))
    images = torch.rand(2, 3, 96, 128)
    distiller = distill(Necked(32, levels), apprentice, weight=1.0)
    assert [m.shape[1] for m in distiller.expert_features(images).values()] == [32, 32]
    assert float(distiller(images, BOXES, apprentice(images)).detach()) > 0


@pytest.mark.parametrize("named", [True, False])
def test_an_apprentice_around_a_backbone_may_bring_its_necks_maps(named: bool) -> None:
    apprentice = Necked(24)
    options: dict[str, Any] = {"apprentice_features": ["neck.0", "neck.1"]} if named else {}
    distiller = distill(make("resnet10t", seed=1, out_indices=(2, 3)), apprentice, weight=1.0, **options)
    images = torch.rand(2, 3, 96, 128)
    maps = apprentice(images)
    loss = distiller(images, BOXES) if named else distiller(images, BOXES, maps)
    assert float(loss.detach()) > 0
    assert [tuple(p.shape[:2]) for p in distiller.parameters() if p.dim() == 4] == [(128, 24), (256, 24)]


def test_backbones_that_give_dicts() -> None:
    expert = make("resnet10t", seed=1, out_indices=(2, 3), feature_cls="dict")
    apprentice = make("resnet10t", out_indices=(2, 3))
    images = torch.rand(2, 3, 96, 128)
    assert float(distill(expert, apprentice, weight=1.0)(images, BOXES, apprentice(images)).detach()) > 0


def test_the_layout_of_a_neck_behind_a_swin_is_asked_for() -> None:
    swin = make("swin_tiny_patch4_window7_224", img_size=96, out_indices=(0, 1))
    neck = [nn.Conv2d(channels, 8, 1) for channels in (96, 192)]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.swin, self.neck = swin, nn.ModuleList(neck)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            maps = self.swin(images)
            return [layer(m.permute(0, 3, 1, 2)) for layer, m in zip(self.neck, maps, strict=True)]

    apprentice, expert = Network(), make("resnet10t", out_indices=(1, 2))
    with pytest.raises(ValueError, match="layout: expected 'NCHW' or 'NHWC' for the maps of a network around"):
        distill(expert, apprentice, weight=1.0)
    images, boxes = torch.rand(2, 3, 96, 96), [rows.clamp(max=96) for rows in BOXES]
    loss = distill(expert, apprentice, weight=1.0, layout="NCHW")(images, boxes, apprentice(images))
    assert float(loss.detach()) > 0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected levels of strides \(2.0, 4.0, .*out_indices=\(1, 2, 3, 4\)"):
        distill(make("swin_tiny_patch4_window7_224", img_size=96), make("resnet10t"))
    with pytest.raises(TypeError, match=r"expected a timm backbone on one side at least, .* got Linear and Linear"):
        distill(nn.Linear(1, 1), nn.Linear(1, 1))
    whole = timm.create_model("resnet10t", pretrained=False)
    with pytest.raises(TypeError, match="features_only=True"):
        distill(whole, nn.Linear(1, 1))
