"""Scale of the loss: shares of energy, maps brought to one scale, and weights as shares of the task loss."""

import json
import warnings
from itertools import permutations
from typing import Any

import pytest
import torch
from distill_cases import BOXES, STAGES, Network, images
from distiller_cases import features, make
from torch import Tensor, nn

from rakd.distill import Distiller
from rakd.distill.registry import METHODS
from rakd.distill.scale import RunningEnergy, UnitScale


def zeros() -> list[Tensor]:
    return [torch.zeros_like(m).requires_grad_() for m in features()]


@pytest.mark.parametrize("method", ["rakd", "hfa", "l_roi", "box_l2"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_normalized_zeros_are_one_and_equals_are_zero_in_every_network(method: str, scale: float) -> None:
    class Scaled(Network):
        def features(self, x: Tensor) -> list[Tensor]:
            return [scale * m for m in super().features(x)]

    options = {"canonical_size": 24} if method != "box_l2" else {}
    expert = Scaled((4, 6, 8), seed=1)
    distiller = Distiller(expert.features, method, normalize=True, **options)  # type: ignore[arg-type]
    assert distiller.weight == 1
    # float32 keeps seven digits.
    assert distiller(images(), BOXES, zeros()).item() == pytest.approx(1, rel=1e-6)
    same = [m.requires_grad_() for m in expert.features(images())]
    assert distiller(images(), BOXES, same).item() == 0
    half = [(m.detach() / 2).requires_grad_() for m in same]
    assert distiller(images(), BOXES, half).item() == pytest.approx(0.25, rel=1e-6)


def test_the_energy_is_a_running_mean_measured_now_and_then() -> None:
    energy, measured = RunningEnergy(), []

    def measure() -> Tensor:
        value = float(energy.calls + 1)
        measured.append(value)
        return torch.tensor(value if value != 4 else 0.0)  # the fourth batch has no boxes

    for _ in range(48):
        energy.update(measure)
    assert measured == [1, 2, 4, 8, 16, 32, 48]
    counted = [1, 2, 8, 16, 32, 48]
    assert float(energy.value) == pytest.approx(sum(counted) / 6, rel=1e-12)
    assert energy.factor(torch.device("cpu")).item() == pytest.approx(6 / sum(counted), rel=1e-12)
    # At most a third of the calls, and of the loss where a measurement costs as much: 5 of the first 16.
    assert len([n for n in measured if n <= 16]) / 16 < 1 / 3


@pytest.mark.parametrize("method", [name for name in METHODS if name != "score_l2"])
def test_rescaled_experts_teach_as_if_their_maps_had_a_mean_square_of_one(method: str) -> None:
    expert = Network((4, 6, 8), seed=1)
    theirs = expert.features(images())
    by_hand = [m / m.double().square().mean().sqrt().float() for m in theirs]
    options = {"canonical_size": 24} if method in ("rakd", "hfa", "l_roi") else {}
    expected = Distiller(None, method, **options)(images(), BOXES, features(), by_hand)
    plain = Distiller(None, method, **options)(images(), BOXES, features(), theirs)
    for scale in (1e-3, 1.0, 1e3):
        scaled = [scale * m for m in theirs]
        loss = Distiller(None, method, rescale=True, **options)(images(), BOXES, features(), scaled)
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-7)
    if method != "pkd":  # which knows no scale
        assert abs(plain.item() / expected.item() - 1) > 0.01


@pytest.mark.parametrize("method", ["rakd", "box_l2", "cwd"])
def test_maps_of_both_networks_are_brought_to_a_mean_square_of_one(method: str) -> None:
    """So that an apprentice of large maps need not shrink them, nor one of small maps blow them up."""
    theirs = Network((4, 6, 8), seed=1).features(images())
    options = {"canonical_size": 24} if method == "rakd" else {}
    unit = [[m / m.double().square().mean().sqrt().float() for m in maps] for maps in (features(), theirs)]
    ours = [m.detach().requires_grad_() for m in unit[0]]
    expected = Distiller(None, method, **options)(images(), BOXES, ours, unit[1])
    expected.backward()
    for scale in (0.01, 1.0, 30.0):
        own = [(scale * m).detach().requires_grad_() for m in features()]
        distiller = Distiller(None, method, rescale="both", **options)
        loss = distiller(images(), BOXES, own, [7 * m for m in theirs])
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-7)
        loss.backward()
        for mine, other, feature in zip(own, ours, features(), strict=True):
            factor = 1 / (scale * feature.detach().square().mean().sqrt().item())
            assert mine.grad is not None and other.grad is not None
            torch.testing.assert_close(mine.grad, factor * other.grad, rtol=1e-3, atol=1e-6 * factor)
        # An apprentice that grows is compared as it is: factors stay.
        distiller.train()
        for _ in range(20):
            distiller(images(), BOXES, own, [7 * m for m in theirs])
        grown = distiller(images(), BOXES, [2 * m for m in own], [7 * m for m in theirs])
        assert abs(grown.item() / loss.item() - 1) > 0.01
        again = Distiller(None, method, rescale="both", **options).train()
        again.load_state_dict(distiller.state_dict())
        assert torch.equal(again(images(), BOXES, [2 * m for m in own], [7 * m for m in theirs]), grown)


def test_the_maps_scale_is_measured_over_twenty_training_steps_then_fixed() -> None:
    distiller = Distiller(None, rescale=True, normalize=True, canonical_size=24).train()
    theirs = [m.detach() for m in Network((4, 6, 8), seed=1).features(images())]
    squares = [m.double().square().mean().item() for m in theirs]
    sums = [0.0, 0.0, 0.0]
    for i in range(25):
        grown = [(1 + i + level) * m for level, m in enumerate(theirs)]
        if i < 20:
            sums = [s + (1 + i + level) ** 2 * q for level, (s, q) in enumerate(zip(sums, squares, strict=True))]
        distiller(images(), BOXES, features(), grown)
        count = min(i + 1, 20)
        factors = distiller._scale.factors(grown)  # type: ignore[union-attr]
        assert factors.tolist() == pytest.approx([(count / s) ** 0.5 for s in sums], rel=1e-6)
    state = distiller.state_dict()
    other = Distiller(None, rescale=True, normalize=True, canonical_size=24)
    other.load_state_dict(state)
    for each in (other.train(), other.eval()):
        loss = each(images(), BOXES, features(seed=7), theirs)
        assert torch.equal(loss, distiller(images(), BOXES, features(seed=7), theirs))
    # Evaluation measures once, where nothing has been: that holds until training measures, which forgets it.
    seen, fresh = (Distiller(None, rescale="both", normalize=True, canonical_size=24) for _ in range(2))
    for evaluate in (seen.eval, torch.no_grad().__enter__):
        evaluate()
        first = seen(images(), BOXES, features(), theirs).detach()
        assert seen(images(), BOXES, features(), [3 * m for m in theirs]) != first
        assert torch.equal(seen(images(), BOXES, features(), theirs).detach(), first)
        seen.train()
    torch.set_grad_enabled(True)
    grown = [7 * m for m in theirs]
    for _ in range(3):
        loss, expected = (each.train()(images(), BOXES, features(seed=7), grown) for each in (seen, fresh))
        assert torch.equal(loss, expected)
    assert torch.equal(seen.get_extra_state(), fresh.get_extra_state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "zeros", "no images"])
def test_maps_that_tell_no_scale_do_not_count(bad: float | str) -> None:
    # A cell outside all boxes, which the loss never sees; the finest level alone, so that the others still count.
    theirs = [m.detach() for m in Network((4, 6, 8), seed=1).features(images())]
    broken = [m.clone() for m in theirs]
    if bad == "zeros":
        broken[0].zero_()
    elif bad == "no images":
        broken = [m[:0] for m in broken]
    else:
        broken[0][0, 0, 0, 0] = bad
    scale, expected = UnitScale(), UnitScale()
    for maps in (broken, theirs, broken, [2 * m for m in theirs]):
        scale.update(maps)
    for maps in (theirs, [2 * m for m in theirs]):
        expected.update(maps)
    assert scale.calls == 4
    assert scale.factors(theirs)[0] == expected.factors(theirs)[0]
    if bad == "no images":
        assert torch.equal(scale.factors(theirs), expected.factors(theirs))
    other = UnitScale()
    other.load(json.loads(json.dumps(scale.state())))
    assert torch.equal(other.factors(theirs), scale.factors(theirs))


def test_levels_without_a_scale_stay_as_they_are() -> None:
    scale = UnitScale()
    scale.update([torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 4.0)])
    assert scale.factors(features()[:2]).tolist() == [1, 0.25]
    for call in (scale.update, scale.factors):
        with pytest.raises(ValueError, match="expected 2 maps, as at the first step, got 3"):
            call(features())


def test_a_state_of_maps_at_another_scale_is_refused() -> None:
    for saved, now in permutations((False, True, "both"), 2):
        one, other = (Distiller(None, rescale=rescale, canonical_size=24) for rescale in (saved, now))
        one(images(), BOXES, features(), [m.detach() for m in Network((4, 6, 8), seed=1).features(images())])
        with pytest.raises(ValueError, match=f"rescale: expected {saved!r} as when the state was saved, got {now!r}"):
            other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("wrong", ["yes", 2, None, 1])
def test_whose_maps_are_rescaled_is_one_of_three(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"rescale: expected False, True or 'both', got {wrong!r}"):
        Distiller(None, rescale=wrong)


def test_without_boxes_nothing_is_divided_by_zero() -> None:
    distiller = make(normalize=True)
    nothing = [b[:0] for b in BOXES]
    maps = features()
    loss = distiller(images(), nothing, maps)
    loss.backward()
    assert loss.item() == 0
    assert distiller(images(), BOXES, zeros()).item() == pytest.approx(1, rel=1e-6)


def test_normalized_gradients_are_those_of_the_share() -> None:
    plain, share = features(), [m.detach().requires_grad_() for m in features()]
    distiller = make(normalize=True, weight=0.5)
    make()(images(), BOXES, plain).backward()
    distiller(images(), BOXES, share).backward()
    energy = make()(images(), BOXES, zeros()).item()
    roots = torch.autograd.grad(make()(images(), BOXES, (fresh := [m.detach().requires_grad_() for m in share])), fresh)
    for ours, theirs in zip(share, roots, strict=True):
        torch.testing.assert_close(ours.grad, 0.5 * theirs / energy, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_energies_that_are_not_finite_do_not_count(bad: float) -> None:
    energy = RunningEnergy()
    for value in (4.0, bad, 4.0, 4.0):  # measured at the first, second and fourth
        energy.update(lambda value=value: torch.tensor(value))
    assert float(energy.value) == 4 and float(energy.count) == 2
    assert energy.factor(torch.device("cpu")).item() == 0.25
    first = RunningEnergy()
    first.update(lambda: torch.tensor(bad))
    assert not first.known and first.factor(torch.device("cpu")).item() == 1


def test_validation_is_not_measured_beside_training_whatever_the_mode() -> None:
    distiller = make(weight="auto:0.1", normalize=True, rescale=True).train()
    with torch.no_grad():  # as a loop of one's own does before it trains, without the distiller's eval()
        assert distiller(images(), BOXES, features(), task_loss=torch.tensor(100.0)).item() == 0
    loss = distiller(images(), BOXES, features(), task_loss=torch.tensor(4.0))
    assert loss.item() == pytest.approx(0.4, rel=1e-6)
    state = distiller.state_dict()["_extra_state"].clone()
    with torch.no_grad():
        distiller(images(), BOXES, features())
    assert torch.equal(distiller.state_dict()["_extra_state"], state)


def test_a_weight_as_a_share_of_the_task_loss() -> None:
    distiller, raw = make(weight="auto:0.1").train(), make()
    tasks, losses = [], []
    for i in range(25):
        maps, task = features(seed=i), torch.tensor(46.0 + i)
        loss = distiller(images(), BOXES, maps, task_loss=task)
        plain = raw(images(), BOXES, maps).item()
        if i < 20:
            tasks.append(task.item())
            losses.append(plain)
        weight = 0.1 * sum(tasks) / sum(losses)
        assert distiller.weight == pytest.approx(weight, rel=1e-6)
        assert loss.item() == pytest.approx(weight * plain, rel=1e-5)
        if i == 0:
            assert loss.item() == pytest.approx(4.6, rel=1e-6)
    fixed = distiller.weight
    distiller(images(), BOXES, features())  # fixed: no task loss is needed
    other = make(weight="auto:0.1")
    other.load_state_dict(distiller.state_dict())
    assert other.weight == fixed
    with pytest.raises(ValueError, match="task_loss: expected the apprentice's own loss"):
        make(weight="auto:0.1")(images(), BOXES, features())
    for wrong in ("auto", "auto:x", "auto:-1", "0.1"):
        with pytest.raises(ValueError, match=r"weight: expected a number or 'auto:SHARE' such as 'auto:10'"):
            make(weight=wrong)


def test_a_share_that_is_never_measured_is_told() -> None:
    distiller = make(weight="auto:0.1").eval()
    with pytest.warns(UserWarning, match="'auto:0.1' is measured in training mode and 0 until then") as told:
        assert distiller(images(), BOXES, features(), task_loss=torch.tensor(1.0)) == 0
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():  # a validation
            distiller(images(), BOXES, features(), task_loss=torch.tensor(1.0))
        distiller.train()(images(), BOXES, features(), task_loss=torch.tensor(1.0))
        distiller.eval()(images(), BOXES, features(), task_loss=torch.tensor(1.0))


def test_scales_are_measured_where_the_first_batches_have_no_boxes() -> None:
    distiller, raw = make(weight="auto:0.1", normalize=True).train(), make(normalize=True).train()
    none = [torch.zeros(0, 4)] * 2
    tasks, losses = 0.0, 0.0
    for i, boxes in enumerate([none, none, BOXES, none, BOXES, BOXES, none, BOXES]):
        maps = features(seed=i)
        loss = distiller(images(), boxes, maps, task_loss=2.0)  # a number will do
        plain = raw(images(), boxes, maps).item()
        tasks, losses = tasks + 2 * (plain > 0), losses + plain
        if i == 2:  # not a power of two, at which a measurement is due
            energy = make()(images(), boxes, zeros()).item()
            assert plain == pytest.approx(make()(images(), boxes, maps).item() / energy, rel=1e-6)
            assert abs(energy - 1) > 0.1
        assert loss.item() == pytest.approx(0.1 * tasks / losses * plain if losses else 0, rel=1e-5)


def test_losses_that_are_not_finite_are_left_out_of_a_share() -> None:
    # float16 overflows now and then, and the optimizer's step is left out.
    distiller = make(weight="auto:0.1").train()
    for task in (torch.tensor(float("inf")), torch.tensor([3.0]), torch.tensor(float("nan"))):
        distiller(images(), BOXES, features(), task_loss=task)
    assert distiller.weight * make()(images(), BOXES, features()).item() == pytest.approx(0.3, rel=1e-6)
    with pytest.raises(ValueError, match=r"task_loss: expected one number, got shape \[2\]"):
        distiller(images(), BOXES, features(), task_loss=torch.ones(2))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"method": "box_l2"}, {"method": "cwd"}, "method: expected 'box_l2', .* got 'cwd'"),
        ({"normalize": True}, {"normalize": False}, "normalize: expected True, .* got False"),
        ({}, {"normalize": True}, "normalize: expected False, .* got True"),
    ],
)
def test_what_was_measured_of_one_loss_scales_no_other(
    before: dict[str, Any], after: dict[str, Any], told: str
) -> None:
    def share(**options: Any) -> Distiller:
        network = Network((4, 6, 8), seed=1)
        return Distiller(network, weight="auto:0.1", features=STAGES, **options).train()

    distiller = share(**before)
    distiller(images(), BOXES, features(), task_loss=3.0)
    with pytest.raises(ValueError, match=told):
        share(**after).load_state_dict(distiller.state_dict())
    again = share(**before)
    again.load_state_dict(distiller.state_dict())
    assert again.weight == distiller.weight
    share(**after).load_state_dict(share(**before).state_dict())  # nothing was measured yet


def test_a_share_of_a_negative_task_loss_is_an_error() -> None:
    # Its weight would be negative, and drive the apprentice away from the expert.
    distiller = make(weight="auto:0.1").train()
    distiller(images(), BOXES, features(), task_loss=torch.tensor(0.0))
    distiller(images(), BOXES, features(), task_loss=torch.tensor(3.0))
    before = distiller.weight
    with pytest.raises(ValueError, match=r"'auto:0.1' is a share of the task loss, expected .* never negative, got -2"):
        distiller(images(), BOXES, features(), task_loss=torch.tensor(-2.0))
    assert distiller.weight == before > 0


class Constant(nn.Module):
    """A method whose loss is a number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, expert: Any, apprentice: Any, boxes: Any) -> Tensor:
        return next(iter(apprentice.values())).sum() * 0 + self.value


def test_a_share_needs_a_loss_that_is_not_negative_and_not_always_0() -> None:
    def constant(value: float) -> Distiller:
        return Distiller(Network((4, 6, 8), seed=1), Constant(value), "auto:10", features=STAGES)

    with pytest.raises(ValueError, match=r"'auto:10' needs a distillation loss that is never negative, got -2"):
        constant(-2.0)(images(), BOXES, features(), task_loss=torch.tensor(1.0))
    distiller = constant(0.0)
    with pytest.warns(
        UserWarning, match=r"was 0 in all of the first 100 steps, and 'auto:10' has no weight yet"
    ) as told:
        for _ in range(120):
            distiller(images(), BOXES, features(), task_loss=torch.tensor(1.0))
    assert len(told) == 1 and distiller.weight == 0


def test_a_task_loss_that_gives_no_share() -> None:
    def step(distiller: Distiller, task: Any) -> Tensor:
        loss: Tensor = distiller(images(), BOXES, features(), task_loss=task)
        return loss

    distiller = make(weight="auto:10")
    for _ in range(19):
        assert step(distiller, 0.0) == 0
    with pytest.raises(ValueError, match=r"task_loss: expected the apprentice's own loss, .* got 0 in 20 steps"):
        step(distiller, torch.zeros(()))
    distiller = make(weight="auto:10")
    for _ in range(20):
        assert step(distiller, 0.0 if distiller.weight == 0 else 1.0).isfinite()
        step(distiller, 1.0)
    assert distiller.weight > 0
    with pytest.raises(TypeError, match="task_loss: expected one number, the sum of terms, got a dict"):
        step(make(weight="auto:10"), {"class": torch.ones(())})
