"""Networks as they come: the forms of their maps, and what may be an expert."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_cases import BOXES, STAGES, Network, images, same_state, snapshot
from torch import Tensor, nn

from rakd.distill import Distiller
from rakd.distill.expert import find_modules
from rakd.distill.outputs import find_maps, pair_names

A, B = torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 2, 2)
MASK = torch.zeros(1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "output",
    [
        [A, B],
        (A, B),
        {"x": A, "y": B},
        [(A, MASK), (B, MASK)],
        ((A, MASK), (B, MASK)),
        ([(A, MASK), (B, MASK)], [A, A]),  # a DETR backbone: maps with masks, and position embeddings
        SimpleNamespace(feature_maps=(A, B)),
        {"feature_maps": (A, B)},
        {"last_hidden_state": [A, B]},
        {"last_hidden_state": [A, B], "attentions": None},
        [SimpleNamespace(tensors=A, mask=MASK), SimpleNamespace(tensors=B, mask=MASK)],
    ],
)
def test_forms_of_maps(output: Any) -> None:
    assert [id(m) for m in find_maps("features", output).values()] == [id(A), id(B)]


def test_a_single_map_and_channels_last() -> None:
    assert list(find_maps("features", A)) == ["0"]
    swin = torch.arange(24.0).view(1, 2, 4, 3)
    found = find_maps("features", [swin], "NHWC")["0"]
    assert found.shape == (1, 3, 2, 4)
    assert found[0, 1, 1, 2] == swin[0, 1, 2, 1]
    assert found.data_ptr() == swin.data_ptr()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (None, "got None"),
        ({"logits": torch.zeros(1, 5), "maps": A}, r"got a dict of {logits: a tensor of shape \[1, 5\], maps: "),
        ([torch.zeros(1, 7, 3)], r"got a list of 1 \(a tensor of shape \[1, 7, 3\]\)"),
        ("maps", "got a str"),
    ],
)
def test_what_holds_no_maps_is_described(output: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"features: expected feature maps .*{told}"):
        find_maps("features", output)


def test_pairs_by_name_or_order() -> None:
    assert pair_names({"a": A, "b": B}, {"b": B, "a": A}) == ["a", "b"]
    assert pair_names({"0": A, "1": B}, {"p3": A, "p4": B}) == ["p3", "p4"]
    with pytest.raises(ValueError, match="expected maps of the same names, or of none in common"):
        pair_names({"p3": A, "p4": B}, {"p4": B, "p5": A})
    with pytest.raises(ValueError, match=r"as many expert maps as the apprentice has, 1 .* got 2 .*choose the levels"):
        pair_names({"p3": A}, {"p4": B, "p5": A})


def test_modules_of_wrappers_are_found() -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.model = Network((3, 3, 3))

        def __call__(self, x: Tensor) -> list[Tensor]:
            return self.model.features(x)

    wrapper = Wrapper()
    assert find_modules(wrapper) == [wrapper.model]
    assert find_modules(functools.partial(Wrapper.__call__, wrapper)) == [wrapper.model]
    assert find_modules(wrapper.__call__) == [wrapper.model]
    wrapper.heads = {"p3": nn.Conv2d(1, 1, 1)}  # type: ignore[attr-defined]
    assert find_modules(wrapper) == [wrapper.model, wrapper.heads["p3"]]  # type: ignore[attr-defined]
    del wrapper.heads  # type: ignore[attr-defined]
    distiller = Distiller(wrapper)
    distiller(images(), BOXES, [m.requires_grad_() for m in Network((3, 3, 3), 4).features(images())])
    assert not wrapper.model.training
    with pytest.raises(
        TypeError, match=r"expert: could not find the module inside this function.* features=function\(module, images"
    ):
        Distiller(lambda x: wrapper(x))


class Stubborn(Network):
    """Overrides ``train`` by something else, as ultralytics' models do."""

    def train(self, mode: Any = True) -> Any:
        return self


def test_the_expert_is_in_eval_mode_whatever_it_overrides() -> None:
    expert = Stubborn((4, 8, 8))
    assert expert.training
    before = snapshot(expert)
    distiller = Distiller(expert, features=STAGES)
    expert.stages.train()  # someone else's
    distiller(images(), BOXES, Network().features(images()))
    assert same_state(expert, before)
    assert not any(module.training for module in expert.modules())


def test_an_expert_that_is_or_shares_the_apprentice_is_refused() -> None:
    network, other = Network(), Network(seed=1)
    with pytest.raises(ValueError, match=r"expert: expected a network of its own, got one that shares 18 parameters"):
        Distiller(network, apprentice=network)
    with pytest.raises(ValueError, match="shares 18 parameters"):
        Distiller(network.features, apprentice=network)
    other.stages[0] = network.stages[0]
    with pytest.raises(
        ValueError, match=r"shares 4 parameters with the apprentice, such as \['stages.0.conv.weight'\]"
    ):
        Distiller(other, apprentice=network)
    assert network.training
    assert all(p.requires_grad for p in (*network.parameters(), *other.parameters()))
