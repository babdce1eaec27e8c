"""The distiller: an expert that stays as it is, and a training loop that is not ours (torchvision's detectors)."""

import copy
import doctest
import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from rakd.distill.distiller import Distiller
from rakd.distill.hooks import tap
from rakd.distill.methods import make_method
from rakd_ops import soft_roi_distill

BOXES = [torch.tensor([[2.0, 3.0, 20.0, 14.0]]), torch.tensor([[0.0, 0.0, 32.0, 16.0]])]


class Network(nn.Module):
    """Two maps, with batch normalisation, whose buffers change in train mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.p2 = nn.Conv2d(3, channels, 4, stride=4)
        self.p3 = nn.Conv2d(3, channels, 8, stride=8)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = self.norm(images)
        return {"p2": self.p2(images), "p3": self.p3(images)}


class Detector(nn.Module):
    """A module whose forward gives no features, but which has a method that does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network(3)

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        return self.network(images)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> None:
        raise AssertionError("only extract_features shall run")


def make_distiller(expert: Any, channels: int = 3, **options: Any) -> Distiller:
    method = make_method("rakd", strides=(4, 8), expert_channels=3, apprentice_channels=channels)
    assert method is not None
    return Distiller(expert, method, **options)


def images() -> Tensor:
    return torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_training_leaves_the_expert_as_it_is() -> None:
    expert, apprentice = Network(3), Network(2)
    distiller = make_distiller(expert, channels=2)
    before, adapters = snapshot(expert), snapshot(distiller)
    optimizer = torch.optim.SGD([*apprentice.parameters(), *distiller.parameters()], lr=0.1, weight_decay=0.1)
    losses = []
    for _ in range(8):
        distiller.train()
        expert.train()  # by someone who holds it as well
        loss = distiller(images(), BOXES, apprentice(images()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert same(expert, before)
    assert not expert.training
    assert all(not p.requires_grad and p.grad is None for p in expert.parameters())
    assert not same(distiller, adapters)


def test_the_expert_is_no_part_of_the_module() -> None:
    distiller = make_distiller(Network(3), channels=2)
    names = ["_extra_state", "method.adapter.levels.0.weight", "method.adapter.levels.0.bias"]
    names += [name.replace(".0.", ".1.") for name in names[1:]]
    assert list(distiller.state_dict()) == names
    assert [name for name, _ in distiller.named_parameters()] == names[1:]
    assert not list(distiller.buffers())
    assert not list(make_distiller(Network(3)).parameters())


def test_the_expert_follows_to_device_and_dtype() -> None:
    expert = Network(3)
    distiller = make_distiller(expert, channels=2)
    assert distiller.double() is distiller
    assert {t.dtype for t in expert.state_dict().values()} == {torch.float64, torch.int64}
    distiller.to("meta")
    assert {t.device.type for t in [*expert.state_dict().values(), *distiller.parameters()]} == {"meta"}


@pytest.mark.parametrize("kind", ["module", "extract_features", "method", "function", "list", "ordered dict"])
def test_kinds_of_experts(kind: str) -> None:
    torch.manual_seed(0)
    detector = Detector()
    experts: dict[str, Any] = {
        "module": detector.network,
        "extract_features": detector,
        "method": detector.extract_features,
        "function": (detector, lambda images: detector.network(images)),
        "list": (detector, lambda images: list(detector.network(images).values())),
        "ordered dict": (detector, lambda images: OrderedDict(detector.network(images))),
    }
    distiller = make_distiller(experts[kind])
    assert distiller.expert is experts[kind]
    assert not any(p.requires_grad for p in detector.network.parameters())
    taught = distiller.expert_features(images())
    assert not any(m.requires_grad for m in (taught.values() if isinstance(taught, Mapping) else taught))
    apprentice = Network(3)
    features = apprentice(images())
    loss = distiller(images(), BOXES, features)
    expected = soft_roi_distill(features, detector.network(images()), BOXES, strides=(4, 8))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in detector.parameters())
    assert apprentice.p2.weight.grad is not None


@pytest.mark.parametrize("kind", ["module", "method", "partial", "extract_features", "function", "compiled"])
def test_named_modules_of_an_expert_that_is_run_its_own_way(kind: str) -> None:
    class Scaling(Network):
        def scaled(self, images: Tensor, by: float = 3.0) -> dict[str, Tensor]:
            return self(by * images)

        def forward(self, images: Any) -> dict[str, Tensor]:
            return super().forward(images["image"] if isinstance(images, dict) else images)

    class Holder:
        def __init__(self, network: Scaling) -> None:
            self.network, self.extract_features = network, network.scaled

    torch.manual_seed(0)
    network = Scaling(3)
    experts: dict[str, Any] = {
        "module": network,
        "method": network.scaled,
        "partial": functools.partial(network.scaled, by=3.0),
        "extract_features": Holder(network),
        "function": (network, lambda images: network({"image": 3 * images})),
        "compiled": (network, torch.compile(lambda images: network(3 * images), backend="eager")),
    }
    distiller = make_distiller(experts[kind], features=["p2", "p3"])
    with torch.no_grad():
        expected = network.eval()(images() * (1 if kind == "module" else 3))
    for _ in range(3):  # the first run is whole, later ones end with the last map
        found = distiller.expert_features(images())
        assert [torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True)] == [True, True]


def test_an_expert_is_run_by_one_function() -> None:
    network = Network(3)
    with pytest.raises(TypeError, match=r"features: expected names of modules beside \(module, function\)"):
        make_distiller((network, lambda images: network(images)), features=lambda net, images: net(images))


def test_cached_features_and_sequences_give_the_same() -> None:
    expert = Network(3)
    distiller = make_distiller(expert)
    features = Network(3)(images())
    cached = distiller.expert_features(images())
    assert isinstance(cached, dict)
    expected = distiller(images(), BOXES, features)
    assert torch.equal(distiller(None, BOXES, features, expert_features=cached), expected)
    assert torch.equal(distiller(None, BOXES, features, expert_features=list(cached.values())), expected)
    without = make_distiller(None)
    assert torch.equal(without(None, BOXES, list(features.values()), list(cached.values())), expected)


def test_weight() -> None:
    expert, features = Network(3), Network(3)(images())
    plain = make_distiller(expert)(images(), BOXES, features)
    torch.testing.assert_close(make_distiller(expert, weight=2.5)(images(), BOXES, features), 2.5 * plain)
    assert make_distiller(expert, weight=0)(images(), BOXES, features) == 0


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="method: expected a name or a module, got NoneType"):
        Distiller(Network(3), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"method: .* got a Network: .*; the apprentice is given by name, apprentice="):
        Distiller(Network(3), Network(3))
    with pytest.raises(TypeError, match="expert: expected a module, a method of one, an object with"):
        make_distiller(3)
    with pytest.raises(TypeError, match=r"weight: expected a number or .auto:SHARE., got list"):
        make_distiller(None, weight=[1])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight: expected a finite number of 0 or more"):
            make_distiller(None, weight=weight)
    features = Network(3)(images())
    with pytest.raises(ValueError, match="expert_features: expected the expert's maps"):
        make_distiller(None)(images(), BOXES, features)
    distiller = make_distiller(Network(3))
    with pytest.raises(ValueError, match="images: expected images for the expert, or expert_features"):
        distiller(None, BOXES, features)
    with pytest.raises(TypeError, match="the order of the arguments is images, boxes, apprentice_features"):
        distiller(images(), features, BOXES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected as many expert maps as the apprentice has, 2 .*, got 1"):
        distiller(None, BOXES, features, [features["p2"]])
    results = make_distiller((None, lambda images: [{"boxes": images[0]}]))  # a detector's results
    with pytest.raises(TypeError, match=r"expert's output: expected feature maps .*, got a list of 1 \(a dict"):
        results(images(), BOXES, features)
    with pytest.raises(
        ValueError, match="sigmas: RAKD takes no such option; it takes output_size, sampling_ratio, sigma"
    ):
        Distiller(None, sigmas=2)
    with pytest.raises(ValueError, match=r"method: expected one of 'pkd', .*, got 'kd'"):
        Distiller(None, "kd")
    with pytest.raises(ValueError, match="box_format: expected one of 'xyxy', 'xywh', 'cxcywh', got 'yolo'"):
        Distiller(None, box_format="yolo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="apprentice: expected the network whose apprentice_features are named"):
        Distiller(None, apprentice_features="p2")
    with pytest.raises(
        ValueError, match=r"adapters: expected equal channels .* got \(3, 3\) of the expert and \(2, 2\)"
    ):
        Distiller(None, adapters=False, strides=(4, 8), expert_channels=3, apprentice_channels=2)


def test_tap() -> None:
    layer = nn.Conv2d(3, 2, 1)
    network = nn.Sequential(layer, nn.ReLU())
    with tap(layer) as tapped:
        with pytest.raises(RuntimeError, match="did not run inside the with block"):
            _ = tapped.output
        network(torch.zeros(1, 3, 2, 2))
        network(images())
    last = tapped.output
    assert torch.equal(last, layer(images()))
    assert last.requires_grad
    network(torch.zeros(1, 3, 2, 2))
    assert tapped.output is last
    with tap(layer) as tapped:
        network(images())
        twin = copy.deepcopy(network)  # with a graph in the tap
        kept = tapped.output
        twin(images())
        assert tapped.output is kept
    with pytest.raises(KeyError), tap(layer):
        raise KeyError
    assert not layer._forward_hooks
    with pytest.raises(TypeError, match="module: expected a module, got function"), tap(lambda: None):  # type: ignore[arg-type]
        pass


def make_retinanet(backbone: str, seed: int) -> RetinaNet:
    torch.manual_seed(seed)
    body = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(body, num_classes=4, min_size=64, max_size=128)


def loader(steps: int) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Images half as large as the detector makes them, so that boxes left in their pixels would be wrong."""
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.rand(3, 32, 48, generator=generator), torch.rand(3, 32, 40, generator=generator)]
    boxes = [torch.tensor([[4.0, 5.0, 30.0, 28.0]]), torch.tensor([[1.0, 2.0, 12.0, 20.0], [8.0, 8.0, 39.0, 31.0]])]
    for _ in range(steps):
        yield pictures, [{"boxes": b.clone(), "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes]


def test_the_docstrings_training_loop_with_torchvision() -> None:
    expert, apprentice = make_retinanet("resnet34", 0), make_retinanet("resnet18", 1)
    before = snapshot(expert)
    calls: list[tuple[Any, ...]] = []
    runs: list[Any] = []
    apprentice.backbone.register_forward_hook(lambda *_: runs.append(1))

    class Recorded(Distiller):
        """Keeps what came and what was given."""

        def forward(self, images: Any, boxes: Any, *arguments: Any, **options: Any) -> Tensor:
            loss = super().forward(images, boxes, *arguments, **options)
            calls.append((images.shape, [rows.clone() for rows in boxes], loss.item()))
            return loss

    names: dict[str, Any] = {"Distiller": Recorded, "tap": tap}
    names |= {"torch": torch, "expert": expert, "apprentice": apprentice, "loader": loader(6)}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(Distiller) or "", names, "Distiller", None, None)
    assert len(example.examples) == 4
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=4)

    losses = [call[2] for call in calls]
    assert len(losses) == len(runs) == 6  # one pass of the backbone a step
    assert losses[-1] < 0.9 * losses[0]
    shape, boxes, _ = calls[0]
    assert shape == (2, 3, 64, 96)
    torch.testing.assert_close(boxes[0], 2 * torch.tensor([[4.0, 5.0, 30.0, 28.0]]))  # 32 rows became 64
    assert same(expert, before)


def test_images_are_normalised_once() -> None:
    expert, apprentice = make_retinanet("resnet18", 0), make_retinanet("resnet18", 1)
    options: dict[str, Any] = {"apprentice": apprentice, "apprentice_features": "backbone", "canonical_size": 24}
    pictures, targets = next(loader(1))
    seen, boxes = apprentice.transform(pictures, targets)
    rows = [target["boxes"] for target in boxes]

    distiller = Distiller(expert.backbone, **options)
    with pytest.raises(ValueError, match="transform would resize and normalise them a second time: run the"):
        distiller.check(seen.tensors, rows)
    apprentice(pictures, targets)
    found = distiller.check(seen.tensors, rows).levels[0].rms
    with torch.no_grad():
        first = next(iter(apprentice.backbone(seen.tensors).values()))
    assert found == pytest.approx(first.square().mean().sqrt().item(), rel=1e-5)

    whole = Distiller(expert, features="backbone", **options)
    apprentice(pictures, targets)
    with pytest.raises(ValueError, match=r"features: .* a second time: give the part behind it, such as expert.back"):
        whole(seen.tensors, rows)
    # Images of 0 to 1 are what such a detector takes, where nothing is resized.
    apprentice(pictures, targets)
    assert len(whole.check(torch.rand(seen.tensors.shape), rows).levels) == 5
