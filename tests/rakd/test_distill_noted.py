"""Maps that change after a hook noted them, or that it notes several times: errors, warnings, or maps as they were."""

import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_cases import BOXES, STAGES, Network, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rakd.distill import Distiller, tap

CHANGED = "was changed in place after it was noted"


class Neck(nn.Module):
    """Gives the stages' maps in a form that is asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stages = Network().stages
        self.outputs = nn.ModuleList(nn.Conv2d(c, c, 1) for c in (4, 6, 8))
        self.form = form

    def forward(self, x: Tensor) -> Any:
        maps = []
        for stage, output in zip(self.stages, self.outputs, strict=True):
            x = stage(x)
            maps.append(output(x))
        if self.form == "pairs":
            return [(m, torch.ones_like(m[:, 0], dtype=torch.bool)) for m in maps]
        if self.form == "object":
            return SimpleNamespace(feature_maps=tuple(maps))
        kind = OrderedDict if self.form == "OrderedDict" else dict
        return kind((str(i), m) for i, m in enumerate(maps))


class Detector(nn.Module):
    """A network whose part after the neck changes what it is given."""

    def __init__(self, form: str, change: Any) -> None:
        super().__init__()
        self.neck = Neck(form)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        maps = self.neck(x)
        self.change(maps)
        return maps


def replace_one(maps: Any) -> None:
    maps["0"] = 100 * maps["0"]


def change_all(maps: Any) -> None:
    values = maps.values() if isinstance(maps, dict) else getattr(maps, "feature_maps", maps)
    for value in values:
        (value[0] if isinstance(value, tuple) else value).mul_(100)


def make(network: nn.Module, **options: Any) -> Distiller:
    expert = Network(seed=1)
    return Distiller(expert, apprentice=network, features=STAGES, canonical_size=24, **options)


@pytest.mark.parametrize("form", ["dict", "OrderedDict"])
def test_what_is_put_into_a_dict_later_is_not_the_modules(form: str) -> None:
    network = Detector(form, replace_one)
    distiller = make(network, apprentice_features="neck")
    network(images())
    assert torch.equal(distiller(images(), BOXES), make(network)(images(), BOXES, network.neck(images())))


@pytest.mark.parametrize("form", ["pairs", "object", "dict", "OrderedDict"])
def test_maps_changed_in_place_are_refused_in_whatever_they_lie(form: str) -> None:
    network = Detector(form, change_all)
    distiller = make(network, apprentice_features="neck")
    network(images())
    with pytest.raises(RuntimeError, match=f"output:neck {CHANGED}"):
        distiller(images(), BOXES)
    with tap(network.neck) as tapped:
        network(images())
    with pytest.raises(RuntimeError, match=f"the tapped module's output {CHANGED}"):
        _ = tapped.output


@pytest.mark.parametrize("form", ["dict", "OrderedDict"])
@pytest.mark.parametrize("change", [change_all, replace_one])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_maps_as_they_were(form: str, change: Any, backend: str) -> None:
    network = Detector(form, change)
    expected = make(network)(images(), BOXES, network.neck(images()))
    other = copy.deepcopy(network)
    distiller = make(other, apprentice_features="neck")
    torch.compile(other, backend=backend, fullgraph=True)(images())
    loss = distiller(images(), BOXES)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = []
    for value, net in ((loss, other), (expected, network)):
        value.backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


class Twice(Network):
    """Sees each image a second time, as stereo networks and those of videos do."""

    def forward(self, x: Tensor) -> Any:
        first = super().forward(x)
        super().forward(x.flip(3))
        return first


@pytest.mark.parametrize("side", ["features", "apprentice_features"])
def test_a_module_that_runs_twice_is_told_once(side: str) -> None:
    networks = {"features": Network((4, 6, 8), seed=1), "apprentice_features": Network(seed=2)}
    networks[side].__class__ = Twice
    distiller = Distiller(
        networks["features"],
        apprentice=networks["apprentice_features"],
        features=STAGES,
        apprentice_features=STAGES,
        canonical_size=24,
    )
    networks["apprentice_features"](images())
    with pytest.warns(
        UserWarning, match=rf"^{side}: output:stages.0, .* ran more than once .* of the last run"
    ) as told:
        distiller(images(), BOXES)
    assert len(told) == 1
    networks["apprentice_features"](images())
    distiller(images(), BOXES)


def test_a_closed_distiller_says_so() -> None:
    network = Network(seed=2)
    distiller = make(network, apprentice_features=STAGES)
    distiller.close()
    network(images())
    with pytest.raises(RuntimeError, match=r"output:stages.0 did not run .* A closed distiller sees nothing"):
        distiller(images(), BOXES)


def test_names_that_come_twice() -> None:
    with pytest.raises(
        ValueError, match=r"apprentice_features: expected at least one .* and none twice, got .*stages.0"
    ):
        make(Network(), apprentice_features=["stages.0", "stages.0", "output:stages.1"])


class Shared(nn.Module):
    """A network whose head runs on each level; or, of one size, several times in a row."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3, 4, stride, stride=stride) for stride in strides)
        self.head = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(stage(x)) for stage in self.stages]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("side", ["features", "apprentice_features"])
def test_a_head_that_levels_share_is_told(side: str, compiled: bool) -> None:
    network: Any = Shared((4, 8, 16))
    network = torch.compile(network, backend="eager") if compiled else network
    other = {"features": "apprentice_features", "apprentice_features": "features"}[side]
    names = {side: "input:head", other: "stages.0"}
    distiller = Distiller(copy.deepcopy(network), apprentice=network, canonical_size=24, **names)
    network(images())
    with pytest.raises(RuntimeError, match=rf"^{side}: input:head ran more than once since"):
        distiller(images(), BOXES)


def test_a_module_that_repeats_gives_its_last_maps_on_both_sides() -> None:
    network = Shared((8, 8, 8))
    expert = copy.deepcopy(network)
    distiller = Distiller(
        expert, apprentice=network, features="head", apprentice_features="head", canonical_size=24, check=False
    )
    for _ in range(3):
        network(images())
        assert distiller(images(), BOXES) == 0
    last = Distiller(expert, features=lambda e, x: e(x)[2], canonical_size=24)
    with torch.no_grad():
        network.stages[2].weight.mul_(2)
    maps = network(images())
    assert torch.equal(distiller(images(), BOXES), last(images(), BOXES, maps[2]))
    # Sizes of other forwards do not matter, nor those of modules called by themselves.
    network(images(size=(64, 96)))
    network(images())
    assert distiller(images(), BOXES) > 0
    network.head(torch.zeros(1, 4, 2, 2))
    network.head(network.stages[2](images()))
    assert distiller(images(), BOXES) > 0


def test_what_gradient_checkpointing_runs_again_is_not_noted() -> None:
    class Checkpointed(Network):
        def features(self, x: Tensor) -> list[Tensor]:
            maps = []
            for stage in self.stages:
                x = checkpoint(lambda y, stage=stage: 2 * stage(y), x, use_reentrant=False)
                maps.append(x)
            return maps

    apprentice = Checkpointed()
    distiller = Distiller(
        Network((4, 8, 8), seed=1),
        apprentice=apprentice,
        features=STAGES,
        apprentice_features=STAGES,
        canonical_size=24,
    )
    apprentice(images())
    loss = distiller(images(), BOXES)
    loss.backward()
    assert distiller._hooks is not None and not distiller._hooks.values  # nor the graph behind it kept
    with pytest.raises(RuntimeError, match="did not run since the last step"):
        distiller(images(), BOXES)


def test_what_is_changed_in_place_afterwards_is_told() -> None:
    apprentice = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(inplace=True))
    distiller = Distiller(Network((4,)), features="stages.0", apprentice=apprentice, apprentice_features="0")
    apprentice(images())
    with pytest.raises(RuntimeError, match=r"output:0 was changed in place after it was noted"):
        distiller(images(), BOXES)
