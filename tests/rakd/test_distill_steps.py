"""Steps that differ from the first: sizes, boxes and modes that change after what a distiller found there."""

from typing import Any

import pytest
import torch
from distill_cases import BOXES, SIZE, STAGES, Network, images
from torch import Tensor, nn

from rakd.distill import Distiller
from rakd.distill.masked_l2 import BoxMaskedL2
from rakd.distill.registry import METHODS
from rakd.distill.scale import TaskShare

STRIDES = (4.0, 8.0, 16.0)
CHANNELS = {"strides": STRIDES, "expert_channels": (4, 6, 8), "apprentice_channels": (4, 6, 8)}
EMPTY = [torch.zeros(0, 4)] * 2


def make(method: Any = "rakd", **options: Any) -> Distiller:
    return Distiller(Network((4, 6, 8), seed=1), method, **{"features": STAGES, "canonical_size": 24, **options})


def maps(size: tuple[int, int] = SIZE, seed: int = 2) -> list[Tensor]:
    return Network(seed=seed).features(images(size=size))


@pytest.mark.parametrize("method", ["rakd", "box_l2", "fgd_attention"])
@pytest.mark.parametrize("ratio", [1.5, 2.0])
def test_strides_of_an_expert_that_sees_larger_images_are_found_whatever_is_given(method: str, ratio: float) -> None:
    larger = images(size=(int(ratio * SIZE[0]), int(ratio * SIZE[1])))
    own = tuple(stride / ratio for stride in STRIDES)
    expected = make(method, expert_strides=own, **CHANNELS)(images(), BOXES, maps(), expert_images=larger)
    for options in ({}, CHANNELS):  # the method is made at the first step, or at once
        distiller = make(method, **options)
        loss = distiller(images(), BOXES, maps(), expert_images=larger)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert distiller.method is not None and distiller.method.expert_strides == own
    assert make(method)(images(), BOXES, maps()).item() != pytest.approx(expected.item(), rel=1e-3)


def test_a_finished_methods_strides_are_checked() -> None:
    expert, step = Network(seed=1), (images(), BOXES, maps())
    right = Distiller(expert, BoxMaskedL2(STRIDES), features=STAGES)
    torch.testing.assert_close(right(*step), make("box_l2")(*step))
    wrong = Distiller(expert, BoxMaskedL2((8, 16, 32)), features=STAGES)
    with pytest.raises(ValueError, match=r"expert_strides: .* got 8 for map '0' of 8×12 cells"):
        wrong(*step)


@pytest.mark.parametrize("method", ["rakd", "box_l2", "fgd_attention"])
def test_one_networks_images_change_their_size(method: str) -> None:
    distiller, fixed = make(method), images()
    distiller(images(), BOXES, maps(), expert_images=fixed)
    both = images(size=(64, 96))
    torch.testing.assert_close(distiller(both, BOXES, maps((64, 96))), make(method)(both, BOXES, maps((64, 96))))
    with pytest.raises(ValueError, match=r"expert_strides: expected strides that fit images of 64×96 pixels"):
        distiller(both, BOXES, maps((64, 96)), expert_images=fixed)


def test_boxes_are_checked_in_the_first_step_that_has_some() -> None:
    shares = [rows / torch.tensor([SIZE[1], SIZE[0]] * 2) for rows in BOXES]
    for first in (True, False):
        distiller = make()
        if first:
            assert float(distiller(images(), EMPTY, maps())) == 0
        with pytest.raises(ValueError, match="expected pixels, but all lie in the unit square"):
            distiller(images(), shares, maps())
    distiller = make()
    assert distiller.check(images(), EMPTY, maps()).boxes == 0
    with pytest.raises(ValueError, match="expected pixels"):
        distiller(images(), shares, maps())


@pytest.mark.parametrize("first", ["check", "evaluation", "no_grad"])
def test_an_apprentice_that_cannot_learn_is_told_at_the_first_training_step(first: str) -> None:
    apprentice = Network(seed=2).requires_grad_(False)
    distiller = make(apprentice=apprentice, apprentice_features=STAGES)
    if first == "check":
        distiller.check(images(), BOXES)
        with pytest.raises(RuntimeError, match="did not run since the last step"):  # check's own run is not a step's
            distiller(images(), BOXES)
    elif first == "evaluation":
        apprentice(images())
        distiller.eval()(images(), BOXES)
    else:
        with torch.no_grad():
            apprentice(images())
            distiller(images(), BOXES)
    apprentice(images())
    with pytest.raises(ValueError, match="expected maps that need a gradient, got none"):
        distiller.train()(images(), BOXES)
    apprentice.requires_grad_(True)(images())
    assert distiller(images(), BOXES).requires_grad
    with torch.no_grad():  # a validation between the apprentice's step and the distiller's
        apprentice(images())
    with pytest.raises(ValueError, match="expected maps that need a gradient, got none"):
        distiller(images(), BOXES)


def test_a_share_is_measured_where_there_are_boxes() -> None:
    distiller, raw = make(weight="auto:10").train(), make()
    for _ in range(TaskShare.CALLS + 5):
        assert float(distiller(images(), EMPTY, maps(), task_loss=torch.tensor(2.0))) == 0
    loss = distiller(images(), BOXES, maps(), task_loss=torch.tensor(3.0))
    assert float(loss) == pytest.approx(30, rel=1e-6)
    assert distiller.weight == pytest.approx(30 / float(raw(images(), BOXES, maps())), rel=1e-6)


def test_inference_mode_first_and_in_between() -> None:
    """Adapters made there could never be trained, and a hooked apprentice must run there."""
    apprentice = Network((3, 5, 7), seed=2)
    distiller = make(apprentice=apprentice, apprentice_features=STAGES, weight="auto:1", rescale=True, normalize=True)
    with torch.inference_mode():
        apprentice(images())
        distiller.eval()(images(), BOXES)
    apprentice(images())
    loss = distiller.train()(images(), BOXES, task_loss=torch.tensor(1.0))
    loss.backward()
    assert all(p.grad is not None and not p.is_inference() for p in distiller.parameters())
    with torch.inference_mode():
        apprentice(images())  # a validation, whose maps nobody takes
        given = make().expert_features(images())
    apprentice(images())
    torch.testing.assert_close(
        make()(images(), BOXES, maps(), given), make()(images(), BOXES, maps()), rtol=1e-6, atol=0
    )
    apprentice(images())
    distiller(images(), BOXES, expert_features=given, task_loss=torch.tensor(1.0)).backward()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "score_l2"])
def test_another_default_device(method: str) -> None:
    """As ``torch.set_default_device("cuda")``, for tensors that are made without one."""
    extra = {"batch_size": 2} if method == "semckd" else {}
    expected = make(method, **extra)(images(), BOXES, maps())
    inputs, found = images(), maps()
    distiller = make(method, **extra)
    with torch.device("meta"):
        loss = distiller(inputs, BOXES, found)
    torch.testing.assert_close(loss, expected)


def test_an_experts_features_given_back_are_what_it_gives() -> None:
    class Last(Network):
        def features(self, x: Tensor) -> list[Tensor]:
            return [m.permute(0, 2, 3, 1) for m in super().features(x)]

    expert = Last(seed=1)
    distiller = Distiller((expert, lambda x: expert.features(x)), "box_l2", expert_layout="NHWC")
    given = distiller.expert_features(list(images()))
    assert [tuple(m.shape) for m in given.values()] == [(2, 8, 12, 4), (2, 4, 6, 6), (2, 2, 3, 8)]
    run = distiller(images(), BOXES, maps())
    assert torch.equal(distiller(images(), BOXES, maps(), given), run) and float(run) > 0


@pytest.mark.parametrize("method", ["pkd", "cwd", "mgd"])
def test_layers_of_one_stride(method: str) -> None:
    """Of a transformer: methods without level weights compare them."""
    layers = nn.ModuleList(nn.Conv2d(3, 4, 16, 16) for _ in range(2))
    found = [(layer(images()) + 1).detach().requires_grad_() for layer in reversed(layers)]
    distiller = Distiller((layers, lambda x: [layer(x) for layer in layers]), method, strides=(16, 16))
    assert float(distiller(images(), BOXES, found)) > 0
    report = distiller.check(images(), BOXES, found)
    assert [level.boxes for level in report.levels] == [3, 3]
    with pytest.raises(ValueError, match="strides: expected increasing"):
        Distiller((None, lambda x: found), "rakd", strides=(16, 16))(images(), BOXES, found)


def test_the_states_length_stays() -> None:
    """EMAs and distributed checkpoints copy into the tensors of an earlier state."""
    distiller = make(
        apprentice_channels=(3, 5, 7),
        rescale=True,
        normalize=True,
        weight="auto:1",
        **{name: value for name, value in CHANNELS.items() if name != "apprentice_channels"},
    ).train()
    before = {name: value.shape for name, value in distiller.state_dict().items()}
    distiller(images(), BOXES, Network((3, 5, 7), seed=2).features(images()), task_loss=torch.tensor(1.0))
    assert {name: value.shape for name, value in distiller.state_dict().items()} == before


@pytest.mark.parametrize("channels", [{}, CHANNELS])
@pytest.mark.parametrize("method", ["rakd", "box_l2", "fgd_attention"])
def test_strides_tell_the_size_of_images_that_are_not_there(method: str, channels: dict[str, Any]) -> None:
    """Also for the strides of an expert with maps of another size."""
    expert = [feature.detach().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) for feature in maps(seed=1)]
    expected = make(method, **CHANNELS)(images(), BOXES, maps(), expert)
    assert torch.equal(make(method, **{"strides": STRIDES, **channels})(None, BOXES, maps(), expert), expected)


def test_scores_follow_the_maps_that_are_paired_by_name() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = {name: torch.rand(2, 4, 8, 12, generator=generator) for name in ("p4", "p3")}
    scores = {name: torch.randn(2, 3, 8, 12, generator=generator) for name in expert}
    apprentice = {name: torch.rand(2, 4, 8, 12, generator=generator) for name in ("p3", "p4")}
    sorted_expert, sorted_scores = ({name: of[name] for name in apprentice} for of in (expert, scores))
    distiller = Distiller(None, "score_l2", 1.0, strides=(4, 4), check=False)
    expected = distiller(images(), BOXES, apprentice, sorted_expert, scores=list(sorted_scores.values()))
    assert torch.equal(distiller(images(), BOXES, apprentice, expert, scores=list(scores.values())), expected)
    swapped = distiller(images(), BOXES, apprentice, sorted_expert, scores=list(scores.values()))
    assert not torch.equal(swapped, expected)
    with pytest.raises(TypeError, match="scores: expected a list, one per level of the expert, got a dict"):
        distiller(images(), BOXES, apprentice, expert, scores=scores)
