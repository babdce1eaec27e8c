"""The methods RAKD is compared with, against values computed cell by cell; and the registry that lists all methods."""

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_two_processes
from torch import Tensor
from torch.nn import functional as F

import rakd
from rakd.distill import Distiller
from rakd.distill.cwd import ChannelWiseDistillation
from rakd.distill.fgd import FocalAttentionDistillation
from rakd.distill.masked_l2 import BoxMaskedL2, ScoreWeightedL2
from rakd.distill.methods import make_method
from rakd.distill.mgd import MaskedGenerativeDistillation
from rakd.distill.registry import METHODS
from rakd.study.results import RunResult, StudyResult
from rakd.study.tables import make_tables

STRIDES = (4, 8)
BOXES = [torch.tensor([[2.0, 3.0, 20.0, 14.0]]), torch.tensor([[0.0, 0.0, 32.0, 9.0], [8.0, 1.0, 12.0, 8.0]])]


def maps(seed: int, channels: Sequence[int] = (3, 2), images: int = 2) -> dict[str, Tensor]:
    """Maps of a 16 × 32 image at strides 4 and 8."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"p{i}": torch.randn(images, c, 16 // s, 32 // s, generator=generator, dtype=torch.float64).requires_grad_()
        for i, (c, s) in enumerate(zip(channels, STRIDES, strict=True))
    }


def touched(box: Tensor, stride: int, y: int, x: int) -> bool:
    """Whether a box and a cell have area in common."""
    x1, y1, x2, y2 = box.tolist()
    return x1 < (x + 1) * stride and x2 > x * stride and y1 < (y + 1) * stride and y2 > y * stride


def weighted_by_cells(weights: Any) -> Tensor:
    """``mean over levels of Σ w mean_c d² / Σ w`` by loops."""
    expert, apprentice = maps(1), maps(2)
    losses = []
    for level, (name, stride) in enumerate(zip(expert, STRIDES, strict=True)):
        total = weight = 0.0
        for image in range(2):
            for y in range(16 // stride):
                for x in range(32 // stride):
                    w = weights(level, stride, image, y, x)
                    d = (apprentice[name][image, :, y, x] - expert[name][image, :, y, x]).square().mean()
                    total, weight = total + w * d.detach(), weight + w
        losses.append(total / weight)
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


def test_box_masked_l2_is_its_definition() -> None:
    expected = weighted_by_cells(
        lambda _, stride, image, y, x: float(any(touched(box, stride, y, x) for box in BOXES[image]))
    )
    method = BoxMaskedL2(STRIDES)
    torch.testing.assert_close(method(maps(1), maps(2), BOXES).detach(), expected, rtol=1e-12, atol=0)
    assert method(maps(1), maps(2), [b[:0] for b in BOXES]) == 0


def test_box_masked_l2_of_one_cell_by_hand() -> None:
    ours, theirs = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    ours[0, :, 1, 0] = torch.tensor([3.0, 1.0])  # (9 + 1) / 2 in one of the two cells that the box touches
    ours[0, :, 0, 1] = 100.0  # outside
    loss = BoxMaskedL2((4,))({"p": theirs}, {"p": ours}, torch.tensor([[0.0, 0.5, 1.0, 3.9, 7.5]]))
    assert loss.item() == 2.5


def test_score_weighted_l2_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 4, 16 // s, 32 // s, generator=generator, dtype=torch.float64) for s in STRIDES]
    expected = weighted_by_cells(
        lambda level, _, image, y, x: 1 / (1 + math.exp(-max(logits[level][image, :, y, x].tolist())))
    )
    method = ScoreWeightedL2()
    torch.testing.assert_close(method(maps(1), maps(2), BOXES, logits).detach(), expected, rtol=1e-12, atol=0)
    probabilities = [score.sigmoid() for score in logits]
    given = ScoreWeightedL2(logits=False)(maps(1), maps(2), BOXES, probabilities)
    torch.testing.assert_close(given.detach(), expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="scores: expected the expert's class logits, one map per level, got None"):
        method(maps(1), maps(2), BOXES)
    with pytest.raises(ValueError, match=r"scores\[1\]: expected shape \[B, classes, H, W\]"):
        method(maps(1), maps(2), BOXES, [logits[0], logits[0]])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_its_definition(temperature: float) -> None:
    expert, apprentice = maps(1), maps(2)
    expected = 0.0
    for name, feature in expert.items():
        for image in range(2):
            for channel in range(feature.shape[1]):
                p = [math.exp(v / temperature) for v in feature[image, channel].flatten().tolist()]
                q = [math.exp(v / temperature) for v in apprentice[name][image, channel].flatten().tolist()]
                p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
                divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                expected += temperature**2 * divergence / (2 * feature.shape[1])
    method = ChannelWiseDistillation(temperature=temperature)
    assert method(expert, apprentice, BOXES).item() == pytest.approx(expected, rel=1e-12)
    shifted = {name: feature + 7.0 for name, feature in apprentice.items()}
    assert method(expert, shifted, BOXES).item() == pytest.approx(expected, rel=1e-9)


def test_cwd_of_two_cells_by_hand() -> None:
    # Expert (1/4, 3/4), apprentice (1/2, 1/2): KL = 1/4 ln(1/2) + 3/4 ln(3/2).
    theirs = torch.tensor([[[[0.0, math.log(3.0)]]]], dtype=torch.float64)
    loss = ChannelWiseDistillation()({"p": theirs}, {"p": torch.zeros(1, 1, 1, 2, dtype=torch.float64)}, [])
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-12)


def test_mgd_is_its_definition() -> None:
    expert, apprentice = maps(1), maps(2)
    method = MaskedGenerativeDistillation((3, 2), masked=0.65, seed=4).double()
    masks = method.masks(list(apprentice.values()))
    method.draws = 0
    expected = torch.zeros((), dtype=torch.float64)
    for mask, generator, name in zip(masks, method.generators, expert, strict=True):
        first, second = generator[0], generator[2]
        restored = F.conv2d(apprentice[name] * mask, first.weight, first.bias, padding=1).clamp(min=0)
        restored = F.conv2d(restored, second.weight, second.bias, padding=1)
        expected = expected + (restored - expert[name]).square().sum() / 2
    torch.testing.assert_close(method(expert, apprentice, BOXES), expected, rtol=1e-12, atol=0)


def test_mgd_hides_the_share_that_it_says_and_resumes_its_draws() -> None:
    method = MaskedGenerativeDistillation((3,), masked=0.65)
    before = torch.random.get_rng_state()
    first, second = (method.masks([torch.zeros(4, 3, 100, 100)])[0] for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(first.unique().tolist()) == {0.0, 1.0}
    # 40,000 cells: four standard deviations of a share of 0.65 are 0.0095.
    assert abs(float((first == 0).double().mean()) - 0.65) < 0.0095
    assert not torch.equal(first, second)
    state = method.state_dict()
    third = method.masks([torch.zeros(4, 3, 100, 100)])[0]
    resumed = MaskedGenerativeDistillation((3,), masked=0.65)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.masks([torch.zeros(4, 3, 100, 100)])[0], third)


def slow_fgd(expert: dict[str, Tensor], apprentice: dict[str, Tensor], temperature: float) -> float:
    """FGD's equations 2 to 9 without its weights' being tensors: cell by cell."""

    def attentions(feature: Tensor, image: int) -> tuple[list[list[float]], list[float]]:
        channels, height, width = feature.shape[1:]
        cells = [
            [math.exp(feature[image, :, y, x].abs().mean().item() / temperature) for x in range(width)]
            for y in range(height)
        ]
        total = sum(map(sum, cells))
        spatial = [[height * width * v / total for v in row] for row in cells]
        values = [math.exp(feature[image, c].abs().mean().item() / temperature) for c in range(channels)]
        return spatial, [channels * v / sum(values) for v in values]

    loss = 0.0
    for name, stride in zip(expert, STRIDES, strict=True):
        channels, height, width = expert[name].shape[1:]
        for image in range(2):
            spatial, channel = attentions(expert[name], image)
            our_spatial, our_channel = attentions(apprentice[name], image)
            mask = [[0.0] * width for _ in range(height)]
            for x1, y1, x2, y2 in BOXES[image].tolist():
                left, top = math.floor(x1 / stride), math.floor(y1 / stride)
                right, bottom = math.ceil(x2 / stride), math.ceil(y2 / stride)
                area = (right + 1 - left) * (bottom + 1 - top)
                for y in range(top, min(bottom + 1, height)):
                    for x in range(left, min(right + 1, width)):
                        mask[y][x] = max(mask[y][x], 1 / area)
            empty = sum(value == 0 for row in mask for value in row)
            for y in range(height):
                for x in range(width):
                    d = apprentice[name][image, :, y, x] - expert[name][image, :, y, x]
                    square = sum(channel[c] * d[c].item() ** 2 for c in range(channels)) * spatial[y][x]
                    inside = mask[y][x]
                    loss += (1e-3 * inside if inside else 5e-4 / empty) * square / 2
                    loss += 1e-3 * abs(spatial[y][x] - our_spatial[y][x]) / 2
            loss += 1e-3 * sum(abs(a - b) for a, b in zip(channel, our_channel, strict=True)) / 2
    return loss


def test_fgd_attention_is_its_definition() -> None:
    expert, apprentice = maps(1), maps(2)
    expected = slow_fgd(expert, apprentice, 0.5)
    loss = FocalAttentionDistillation(STRIDES)(expert, apprentice, BOXES)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # box masks are float32, as the boxes are
    loss.backward()
    assert all(m.grad is not None and m.grad.isfinite().all() for m in apprentice.values())
    nothing = FocalAttentionDistillation(STRIDES)(expert, apprentice, [b[:0] for b in BOXES])
    assert 0 < nothing < loss


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_class_with_a_weight_of_its_own(name: str) -> None:
    spec = METHODS[name]
    channels = (3, 2)
    options: dict[str, Any] = {"strides": STRIDES, "batch_size": 2}
    method = make_method(name, expert_channels=channels, apprentice_channels=channels, **options)
    assert method is not None
    assert type(method) is spec.load()
    expert, apprentice = maps(1), maps(2)
    scores = [torch.zeros(2, 1, 16 // s, 32 // s, dtype=torch.float64) for s in STRIDES]
    extra = {"scores": scores} if spec.load().needs_scores else {}
    raw = method.double()(expert, apprentice, BOXES, **extra)
    distiller = Distiller(None, name, expert_channels=channels, apprentice_channels=channels, **options).double()
    assert distiller.weight == spec.weight
    loss = distiller(None, BOXES, apprentice, expert, image_size=(16, 32), scores=scores)
    torch.testing.assert_close(loss, spec.weight * raw, rtol=1e-12, atol=0)
    assert spec.paper


@pytest.mark.parametrize("name", ["rakd", "hfa", "l_roi", "box_l2", "score_l2", "mgd"])
def test_energy_is_the_loss_of_zeros(name: str) -> None:
    channels = (3, 2)
    method = make_method(name, strides=STRIDES, expert_channels=channels, apprentice_channels=channels)
    expert = maps(1)
    zeros = {key: torch.zeros_like(feature) for key, feature in expert.items()}
    scores = [torch.zeros(2, 1, 16 // s, 32 // s, dtype=torch.float64) for s in STRIDES]
    extra = {"scores": scores} if METHODS[name].load().needs_scores else {}
    assert method is not None
    method.double()
    if name == "mgd":  # convolutions of zeros give their biases
        for parameter in method.parameters():
            torch.nn.init.zeros_(parameter)
    energy = method.energy(expert, BOXES, **extra)  # type: ignore[operator]
    assert not energy.requires_grad
    torch.testing.assert_close(energy, method(expert, zeros, BOXES, **extra).detach(), rtol=1e-12, atol=0)


def test_energy_with_an_expert_at_another_resolution() -> None:
    expert = {name: F.interpolate(feature.detach(), scale_factor=2.0) for name, feature in maps(1).items()}
    zeros = {name: torch.zeros_like(feature) for name, feature in maps(1).items()}
    method = make_method(
        "rakd", strides=STRIDES, expert_strides=(2, 4), expert_channels=(3, 2), apprentice_channels=(3, 2)
    )
    assert method is not None
    energy = method.energy(expert, BOXES)  # type: ignore[operator]
    torch.testing.assert_close(energy, method(expert, zeros, BOXES), rtol=1e-12, atol=0)


def test_methods_without_a_scale_refuse_to_be_normalized() -> None:
    for name in ("pkd", "cwd", "semckd", "fgd_attention"):
        options: dict[str, Any] = {"strides": STRIDES, "expert_channels": (3, 2), "apprentice_channels": (3, 2)}
        distiller = Distiller(None, name, normalize=True, batch_size=2, **options).double()
        with pytest.raises(ValueError, match=r"normalize: .* does not depend on the features' scale"):
            distiller(None, BOXES, maps(2), maps(1), image_size=(16, 32))


def test_the_registry_is_the_only_list_of_methods() -> None:
    root = Path(rakd.__file__).parent
    for path in root.rglob("*.py"):
        if path.name == "registry.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
                if isinstance(node, ast.Dict) and all(isinstance(value, ast.Constant) for value in node.values):
                    continue  # the weights of one study
                entries = node.keys if isinstance(node, ast.Dict) else node.elts
                named = {e.value for e in entries if isinstance(e, ast.Constant) and e.value in METHODS}
                assert len(named) < 3, f"{path}: {named}"


def test_tables_hold_the_papers_methods_and_others_where_they_were_run() -> None:
    def rows(*methods: str) -> dict[str, list[str]]:
        study = StudyResult(runs=tuple(RunResult(method, 0, {}) for method in methods))
        return {table.key: [row.method for row in table.rows] for table in make_tables(study)}

    paper = rows("none", "rakd")
    assert paper["table3"] == ["expert", "none", "pkd", "semckd", "rakd"]
    assert paper["ablation"] == ["expert", "none", "l_roi", "hfa", "rakd"]
    assert paper["training"] == ["expert", "none", "pkd", "semckd", "l_roi", "hfa", "rakd"]
    more = rows("none", "cwd", "rakd")
    assert more["table3"] == [*paper["table3"], "cwd"]
    assert more["ablation"] == paper["ablation"]
    assert more["training"] == [*paper["training"], "cwd"]


PROCESSES = """
import os, sys
import torch
import torch.distributed as dist
sys.path[:0] = [{folder!r}]
from distill_cases import BOXES, SIZE, Network, images
from rakd.distill import Distiller

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
# One small box in the first image, one large and one small box in the second, and scores as uneven.
scores = [torch.cat([torch.full((1, 2, *m.shape[2:]), s) for s in (-3.0, 1.0)]) for m in Network().features(images())]

def gradients(method, chosen):
    apprentice, expert = Network(seed=2).double().eval(), Network(seed=1).double().eval()
    batch = images().double()[chosen]
    distiller = Distiller(expert, method, features=lambda e, x: e.features(x), check=False)
    options = dict(scores=[s[chosen].double() for s in scores]) if method == "score_l2" else {}
    boxes = [BOXES[0] * 0.3, BOXES[1]][chosen]
    loss = distiller(batch, boxes, apprentice.features(batch), **options)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in apprentice.stages.parameters()]), loss.detach()

methods = ("rakd", "hfa", "l_roi", "box_l2", "score_l2")
whole = [gradients(method, slice(0, 2)) for method in methods]  # before there are several processes
dist.init_process_group("gloo", rank=rank, world_size=2)
for method, expected in zip(methods, whole):
    for mine, all_of_it in zip(gradients(method, slice(rank, rank + 1)), expected):
        dist.all_reduce(mine)
        torch.testing.assert_close(mine / 2, all_of_it, rtol=1e-9, atol=1e-12)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch() -> None:
    run_two_processes("-c", PROCESSES.replace("{folder!r}", repr(str(Path(__file__).parent))))
