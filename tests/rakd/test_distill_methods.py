"""Distillation methods: values against formulas, invariances, gradients, and what is said about wrong arguments."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rakd.distill import MethodName
from rakd.distill.adapters import ChannelAdapters
from rakd.distill.methods import make_method
from rakd.distill.pkd import PearsonDistillation
from rakd.distill.regions import RegionDistillation
from rakd.distill.semckd import SemanticCalibration
from rakd_ops import reference, soft_roi_distill

STRIDES = (4, 8)
BOXES = [torch.tensor([[2.0, 3.0, 20.0, 14.0]]), torch.tensor([[0.0, 0.0, 32.0, 16.0], [8.0, 1.0, 12.0, 9.0]])]
NO_BOXES = [torch.zeros(0, 4), torch.zeros(0, 4)]
NAMES = [name for name in get_args(MethodName) if name not in ("none", "score_l2")]


def make_maps(
    seed: int, channels: Sequence[int] = (3, 3), images: int = 2, scale: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Maps of a 16 × 32 image (times ``scale``) at strides 4 and 8."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(16 * scale // stride, 32 * scale // stride) for stride in STRIDES]
    return {
        f"p{i + 2}": torch.randn(images, c, *size, generator=generator, dtype=dtype).requires_grad_()
        for i, (c, size) in enumerate(zip(channels, sizes, strict=True))
    }


def make(name: Any, expert_channels: Any = 3, apprentice_channels: Any = 3, **options: Any) -> nn.Module:
    options = {"strides": STRIDES, "batch_size": 2, "canonical_size": 32.0, **options}
    method = make_method(name, expert_channels=expert_channels, apprentice_channels=apprentice_channels, **options)
    assert method is not None
    return method.double()


@pytest.mark.parametrize(("name", "assignment"), [("rakd", "soft"), ("hfa", "hard"), ("l_roi", "uniform")])
def test_region_methods_are_the_reference(name: str, assignment: str) -> None:
    expert, apprentice = make_maps(1), make_maps(2)
    options: dict[str, Any] = {"strides": STRIDES, "canonical_size": 32.0, "output_size": (3, 4), "sampling_ratio": 1}
    loss = make(name, **options, sigma=0.7)(expert, apprentice, BOXES)
    expected = reference.soft_roi_distill(apprentice, expert, BOXES, assignment=assignment, sigma=0.7, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_region_loss_is_the_mean_to_the_bit() -> None:
    expert, apprentice = make_maps(1), make_maps(2)
    loss = RegionDistillation("soft", STRIDES)(expert, apprentice, BOXES)
    assert torch.equal(loss, soft_roi_distill(apprentice, expert, BOXES, strides=STRIDES))


def test_region_expert_at_another_resolution() -> None:
    expert, apprentice = make_maps(1, scale=2), make_maps(2)
    loss = make("rakd", expert_strides=(2, 4))(expert, apprentice, BOXES)
    expected = reference.soft_roi_distill(
        apprentice, expert, BOXES, strides=STRIDES, expert_strides=(2, 4), canonical_size=32.0
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="expert_strides"):
        make("rakd")(expert, apprentice, BOXES)


def test_adapting_before_pooling_is_adapting_after() -> None:
    apprentice = make_maps(2, channels=(2, 2))
    adapter = ChannelAdapters((2, 2), (3, 3)).double()
    for before, adapted, convolution in zip(
        apprentice.values(), adapter(list(apprentice.values())), adapter.levels, strict=True
    ):
        rows = [torch.tensor([[5.0, 2.0, 27.0, 13.0]], dtype=torch.float64)] * 2
        stride = 16 / before.shape[2]
        after = convolution(reference.multilevel_roi_align([before], rows, strides=[stride]))
        torch.testing.assert_close(reference.multilevel_roi_align([adapted], rows, strides=[stride]), after)


@given(seed=st.integers(0, 1000), images=st.integers(1, 3))
def test_pkd_is_one_minus_pearson_r(seed: int, images: int) -> None:
    expert, apprentice = make_maps(seed, images=images), make_maps(seed + 1, images=images)
    expected = 0.0
    for name, feature in apprentice.items():
        ours, theirs = (m.detach().numpy().transpose(1, 0, 2, 3).reshape(3, -1) for m in (feature, expert[name]))
        count = ours.shape[1]
        r = [np.corrcoef(a, e)[0, 1] for a, e in zip(ours, theirs, strict=True)]
        expected += (count - 1) / count * (1 - np.mean(r))  # the standard deviation is the unbiased one
    # 1e-5: each standard deviation is about 1 and has 1e-6 added, in both maps.
    assert PearsonDistillation()(expert, apprentice, []).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10), offset=st.floats(-10, 10))
def test_pkd_ignores_scale_and_offset_of_channels(seed: int, scale: float, offset: float) -> None:
    expert, apprentice = make_maps(seed), make_maps(seed + 1)
    factors = torch.tensor([1.0, scale, 1 / scale], dtype=torch.float64)[:, None, None]
    changed = {name: feature * factors + offset * factors.flip(0) for name, feature in apprentice.items()}
    method = PearsonDistillation()
    # 1e-6 is added to standard deviations that are here as small as 0.1.
    torch.testing.assert_close(method(expert, changed, []), method(expert, apprentice, []), rtol=1e-4, atol=0)
    assert method(apprentice, changed, []) < 1e-8
    mirrored = {name: -feature for name, feature in apprentice.items()}
    assert method(apprentice, mirrored, []).item() == pytest.approx(4, rel=0.05)  # r = -1 on two levels


def test_pkd_resizes_the_apprentice() -> None:
    expert, apprentice = make_maps(1, scale=2), make_maps(2)
    resized = {
        name: F.interpolate(m, size=expert[name].shape[2:], mode="bilinear", align_corners=False)
        for name, m in apprentice.items()
    }
    method = PearsonDistillation()
    assert torch.equal(method(expert, apprentice, []), method(expert, resized, []))


def test_pkd_of_constant_channels_and_half_maps_is_finite() -> None:
    dead = {name: torch.zeros_like(m).requires_grad_() for name, m in make_maps(1).items()}
    loss = PearsonDistillation()(make_maps(2), dead, [])
    loss.backward()
    assert loss.isfinite()
    assert all(m.grad is not None and m.grad.isfinite().all() for m in dead.values())
    loud = {name: (300 * m.detach()).half() for name, m in make_maps(3).items()}  # squares exceed float16
    assert PearsonDistillation()(make_maps(2, dtype=torch.float32), loud, []).isfinite()


def slow_semckd(method: SemanticCalibration, expert: list[Tensor], apprentice: list[Tensor]) -> Tensor:
    """SemCKD by its definition: image by image, pair by pair, batch normalisation written out."""

    def embed(mlp: Any, feature: Tensor, image: int) -> Tensor:
        similarity = torch.stack([(feature[image] * feature[other]).sum() for other in range(len(feature))])
        hidden = (mlp.hidden.weight @ similarity + mlp.hidden.bias).clamp(min=0)
        vector = mlp.out.weight @ hidden + mlp.out.bias
        return vector / vector.square().sum().sqrt()

    def project(convolutions: list[Tensor], feature: Tensor) -> Tensor:
        for weight in convolutions[:-1]:
            feature = F.conv2d(feature, weight, padding=weight.shape[2] // 2)
            mean = feature.mean(dim=(0, 2, 3), keepdim=True)
            variance = (feature - mean).square().mean(dim=(0, 2, 3), keepdim=True)
            feature = ((feature - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
        return F.conv2d(feature, convolutions[-1])

    total = torch.zeros((), dtype=torch.float64)
    for i, ours in enumerate(apprentice):
        for j, theirs in enumerate(expert):
            if ours.shape[2] > theirs.shape[2]:
                a, e = F.adaptive_avg_pool2d(ours, theirs.shape[2:]), theirs
            else:
                a, e = ours, F.adaptive_avg_pool2d(theirs, ours.shape[2:])
            weights = [m.weight for m in method.projections[i][j] if isinstance(m, nn.Conv2d)]  # type: ignore[index]
            difference = project(weights, a) - e
            for image in range(len(ours)):
                query = embed(method.queries[i], ours, image)
                scores = torch.stack(
                    [query @ embed(key, m, image) for key, m in zip(method.keys, expert, strict=True)]
                ).exp()
                total = total + scores[j] / scores.sum() * difference[image].square().mean()
    return total / (len(apprentice[0]) * len(apprentice))


@pytest.mark.parametrize("size", [(4, 8), (3, 7)], ids=["multiples", "not multiples"])
def test_semckd_is_its_definition(size: tuple[int, int]) -> None:
    apprentice = make_maps(2, channels=(2, 4), images=3)
    expert = {
        "a": make_maps(1, images=3)["p2"],
        "b": torch.randn(3, 5, *size).double(),
        "c": make_maps(4, images=3)["p3"],
    }
    method = SemanticCalibration((3, 5, 3), (2, 4), batch_size=3).double()
    expected = slow_semckd(method, list(expert.values()), list(apprentice.values()))
    loss = method(expert, apprentice, [])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    gradients = [
        torch.autograd.grad(value, [*apprentice.values(), *method.parameters()], allow_unused=True)
        for value in (loss, expected)
    ]
    # Ones and zeros of batch normalisation's own scale and shift are not in the definition.
    compared = [(a, e) for a, e in zip(*gradients, strict=True) if e is not None]
    assert len(compared) == 2 + 4 * 5 + 3 * 6
    for a, e in compared:
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


def test_semckd_attention_sums_to_one_and_learns() -> None:
    method = SemanticCalibration((3, 3), (3, 3), batch_size=2).double()
    expert, apprentice = make_maps(1), make_maps(2)
    weights = method.attention(list(expert.values()), list(apprentice.values()))
    assert weights.shape == (2, 2, 2)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 2).double())
    method(expert, apprentice, []).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_semckd_under_autocast_keeps_float32_for_the_attention() -> None:
    method = SemanticCalibration((3, 3), (3, 3), batch_size=2)
    loud = {name: 3000 * m.detach() for name, m in make_maps(1, dtype=torch.float32).items()}
    plain = method.attention(list(loud.values()), list(loud.values()))
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(method.attention(list(loud.values()), list(loud.values())), plain)
        assert method(loud, loud, []).isfinite()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [(3, 3), (2, 4)], ids=["same channels", "other channels"])
def test_gradients_reach_the_apprentice_and_what_is_learnt_and_no_expert(name: str, channels: tuple[int, int]) -> None:
    method = make(name, apprentice_channels=channels)
    expert, apprentice = make_maps(1), make_maps(2, channels=channels)
    loss = method(expert, apprentice, BOXES)
    assert loss.shape == ()
    loss.backward()
    assert all(m.grad is None for m in expert.values())
    for learnt in (*apprentice.values(), *method.parameters()):
        assert learnt.grad is not None
        assert learnt.grad.isfinite().all()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in apprentice.values())
    assert bool(list(method.parameters())) == (name in ("semckd", "mgd") or channels != (3, 3))


@pytest.mark.parametrize("name", ["rakd", "pkd"])
def test_levels_are_paired_by_name(name: str) -> None:
    method, expert, apprentice = make(name), make_maps(1), make_maps(2)
    turned = dict(reversed(list(expert.items())))
    assert torch.equal(method(turned, apprentice, BOXES), method(expert, apprentice, BOXES))


@pytest.mark.parametrize("name", ["rakd", "hfa", "l_roi"])
def test_no_boxes_give_zero_with_gradients(name: str) -> None:
    method = make(name, apprentice_channels=2)
    apprentice = make_maps(2, channels=(2, 2))
    loss = method(make_maps(1), apprentice, NO_BOXES)
    loss.backward()
    assert loss.item() == 0
    learnt = [*apprentice.values(), *method.parameters()]
    assert len(learnt) == 2 + 4
    assert all(t.grad is not None and not t.grad.any() for t in learnt)


def test_weights_come_from_the_seed_alone() -> None:
    def weights(name: str, seed: int) -> list[Tensor]:
        return [p.detach() for p in make(name, apprentice_channels=2, seed=seed).parameters()]

    for name in ("rakd", "pkd", "semckd"):
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        first = weights(name, 5)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(first, weights(name, 5), strict=True))
        assert not torch.equal(first[0], weights(name, 6)[0])


def test_names() -> None:
    with pytest.raises(
        ValueError, match=r"name: expected one of 'pkd', 'semckd', 'l_roi', 'hfa', 'rakd', .*'none', got 'kd'"
    ):
        make("kd")
    assert make_method("none", strides=STRIDES, expert_channels=3, apprentice_channels=3) is None


def test_channels_are_checked() -> None:
    with pytest.raises(ValueError, match="apprentice_channels: expected 2 numbers, one per stride, got 3"):
        make("rakd", apprentice_channels=(3, 3, 3))
    with pytest.raises(ValueError, match=r"expert_channels\[1\]: expected 1 or more channels, got 0"):
        make("rakd", expert_channels=(3, 0))
    with pytest.raises(TypeError, match=r"expert_channels\[0\]: expected an integer, got 'a'"):
        make("pkd", expert_channels=("a", 3))
    with pytest.raises(TypeError, match="expert_channels: expected a sequence"):
        ChannelAdapters((3,), "3")
    with pytest.raises(ValueError, match="apprentice_channels: expected 1 levels as in expert_channels, got 2"):
        ChannelAdapters((3, 3), (3,))
    with pytest.raises(ValueError, match="adapter: expected 2 levels as in strides, got 1"):
        RegionDistillation("soft", STRIDES, adapter=ChannelAdapters((3,), (2,)))
    adapted = make("rakd", apprentice_channels=2)
    with pytest.raises(ValueError, match=r"expected 2 channels in map 0, as its adapter .* got shape \[2, 3, 4, 8\]"):
        adapted(make_maps(1), make_maps(2), BOXES)
    with pytest.raises(ValueError, match=r"apprentice\['p2'\]: expected 3 channels as in expert"):
        PearsonDistillation()(make_maps(1), make_maps(2, channels=(2, 3)), [])
    with pytest.raises(ValueError, match=r"expected 3 channels in map 1, as in apprentice_channels"):
        make("semckd")(make_maps(1), make_maps(2, channels=(3, 2)), [])


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_checked(name: str) -> None:
    method, expert, apprentice = make(name), make_maps(1), make_maps(2)
    with pytest.raises(ValueError, match=r"expert: expected maps of 2 images as in apprentice, got 3"):
        method(make_maps(1, images=3), apprentice, BOXES)
    with pytest.raises(ValueError, match=r"expert\['p3'\]: expected 2 images as in expert\['p2'\]"):
        method({**expert, "p3": make_maps(1, images=3)["p3"]}, apprentice, BOXES)
    with pytest.raises(ValueError, match=r"apprentice\['p2'\]: expected shape \[B, C, H, W\]"):
        method(expert, {**apprentice, "p2": torch.zeros(2, 3, 4)}, BOXES)
    with pytest.raises(TypeError, match=r"apprentice\['p2'\]: expected floating-point numbers, got torch.int64"):
        method(expert, {**apprentice, "p2": torch.zeros(2, 3, 4, 8, dtype=torch.int64)}, BOXES)
    with pytest.raises(TypeError, match=r"expert\['p2'\]: expected a tensor, got NoneType"):
        method({**expert, "p2": None}, apprentice, BOXES)
    with pytest.raises(TypeError, match="expert: expected a dict of maps by name, got list"):
        method(list(expert.values()), apprentice, BOXES)
    with pytest.raises(ValueError, match="expert: expected at least one map, got none"):
        method({}, {}, BOXES)
    with pytest.raises(ValueError, match=r"expert\['p3'\]: expected device cpu as in expert\['p2'\], got meta"):
        method({**expert, "p3": expert["p3"].to("meta")}, apprentice, BOXES)
    with pytest.raises(ValueError, match="expert: expected maps on cpu as in apprentice, got them on meta"):
        method({k: m.to("meta") for k, m in expert.items()}, apprentice, BOXES)
    if name == "semckd":
        with pytest.raises(ValueError, match="expert: expected 2 maps as in expert_channels, got 1"):
            method({"p2": expert["p2"]}, apprentice, BOXES)
    else:
        with pytest.raises(ValueError, match=r"it lacks \['p3'\] and has besides \['p9'\]"):
            method({"p2": expert["p2"], "p9": expert["p3"]}, apprentice, BOXES)


def test_boxes_are_checked() -> None:
    method, expert, apprentice = make("rakd"), make_maps(1), make_maps(2)
    with pytest.raises(TypeError, match=r"boxes: expected \[K, 5\] or a sequence of tensors, one per image, got dict"):
        method(expert, apprentice, {})
    rows = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], dim=1) for i, b in enumerate(BOXES)])
    assert torch.equal(method(expert, apprentice, rows), method(expert, apprentice, BOXES))
    with pytest.raises(ValueError, match="boxes: expected 2 tensors, one per image, got 1"):
        method(expert, apprentice, BOXES[:1])
    with pytest.raises(ValueError, match="apprentice: expected 3 maps, one per stride, got 2"):
        RegionDistillation("soft", (4, 8, 16))(expert, apprentice, BOXES)


def test_pkd_needs_two_values() -> None:
    single = {"p2": torch.randn(1, 3, 1, 1)}
    with pytest.raises(ValueError, match=r"expert\['p2'\]: expected two or more values per channel"):
        PearsonDistillation()(single, single, [])


def test_semckd_batch_sizes() -> None:
    with pytest.raises(ValueError, match=r"expert: expected batches of 2 images.*got 3; .*drop_last=True"):
        make("semckd")(make_maps(1, images=3), make_maps(2, images=3), [])
    with pytest.raises(ValueError, match=r"batch_size: SemCKD compares .* expected 2 or more, got 1"):
        make("semckd", batch_size=1)
    with pytest.raises(ValueError, match="batch_size: SemCKD needs the number of images in every batch"):
        make("semckd", batch_size=None)
    with pytest.raises(TypeError, match=r"batch_size: expected an integer, got 2.0"):
        make("semckd", batch_size=2.0)
    with pytest.raises(ValueError, match="embedding: expected 2 or more, got 1"):
        SemanticCalibration((3,), (3,), 2, embedding=1)


def test_names_load_no_torch() -> None:
    code = "import sys, rakd.distill; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
