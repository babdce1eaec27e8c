"""What a method learns: its optimizer, its state in files and copies, and several processes."""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_cases import BOXES, STAGES, Network, images
from distiller_cases import features, make
from processes import run_two_processes
from torch import Tensor, nn

from rakd.distill import Distiller, Expert
from rakd.distill.optim import TrainingWatch
from rakd.distill.registry import METHODS
from rakd.distributed import GradientAverage


def train(distiller: Distiller, apprentice: Network, optimizer: Any, scheduler: Any, steps: range) -> list[float]:
    losses = []
    for i in steps:
        apprentice(images(seed=i))
        task = sum(m.square().mean() for m in apprentice.features(images(seed=i)))
        loss = task + distiller(images(seed=i), BOXES, task_loss=task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def parts(method: str, **options: Any) -> tuple[Distiller, Network, Any, Any]:
    """A distiller that comes when optimizer and scheduler exist already."""
    apprentice = Network(seed=2)
    optimizer = torch.optim.AdamW(apprentice.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12)
    expert = Network((4, 8, 8), seed=1)
    options = {"features": STAGES, "apprentice_features": "input:head", **options}
    if method == "score_l2":
        options["scores"] = ["head.scores.0", "head.scores.1", "head.scores.2"]
    distiller = Distiller(expert, method, apprentice=apprentice, **options).train()
    distiller.add_to(optimizer)
    return distiller, apprentice, optimizer, scheduler


NORMALIZED = ("rakd", "box_l2", "score_l2", "mgd")


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("hfa", "l_roi")])
def test_a_resumed_run_has_the_same_bits(method: str, told: bool) -> None:
    options = {"weight": "auto:0.1", "normalize": method in NORMALIZED, "rescale": True}
    if told:
        options |= {"strides": (4, 8, 16), "expert_channels": (4, 8, 8), "apprentice_channels": (4, 6, 8)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="boxes from .* all get the same")
        distiller, apprentice, optimizer, scheduler = parts(method, **options)
        train(distiller, apprentice, optimizer, scheduler, range(5))
        assert {id(p) for p in distiller.parameters()} <= {id(p) for p in optimizer.param_groups[0]["params"]}
        file = io.BytesIO()
        objects = {"distiller": distiller, "apprentice": apprentice, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({name: each.state_dict() for name, each in objects.items()}, file)
        rest = train(distiller, apprentice, optimizer, scheduler, range(5, 10))

        file.seek(0)
        state = torch.load(file, weights_only=True)
        resumed, again, anew, schedule = parts(method, **options)
        resumed.load_state_dict(state["distiller"])  # makes what is learnt, and gives it to the optimizer that waits
        again.load_state_dict(state["apprentice"])
        anew.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["scheduler"])
        assert train(resumed, again, anew, schedule, range(5, 10)) == rest
    for ours, theirs in zip(resumed.parameters(), distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"rescale": True}, {"rescale": "both"}, {"normalize": True}, {"weight": "auto:10"}], ids=str
)
def test_another_expert_is_measured_anew(options: dict[str, Any]) -> None:
    maps = [m.detach().requires_grad_() for m in Network((4, 8, 8), seed=2).features(images())]
    small, large = Network((4, 8, 8), seed=1), Network((4, 8, 8), seed=1)
    with torch.no_grad():
        for stage in large.stages:
            stage.norm.weight.mul_(10)

    def last(distiller: Distiller) -> Tensor:
        return [distiller(images(), BOXES, maps, task_loss=torch.ones(())) for _ in range(25)][-1]

    expected = last(Distiller(large, features=STAGES, canonical_size=24, **options))
    distiller = Distiller(small, features=STAGES, canonical_size=24, **options)
    assert not torch.equal(last(distiller), expected) or "weight" in options
    distiller.attach(expert=small)  # which it was
    with pytest.raises(ValueError, match="expected as an argument of the Expert"):
        distiller.attach(expert=Expert(large))
    assert all(scale.known for scale in distiller._scales)
    distiller.attach(expert=large)
    assert torch.equal(last(distiller), expected)
    assert not any(module._forward_hooks for module in small.modules())


def test_what_a_fused_optimizer_changes_has_changed() -> None:
    distiller = make()
    maps = [m.detach().requires_grad_() for m in Network((4, 8, 8), seed=2).features(images())]
    distiller.check(images(), BOXES, maps)
    optimizer = torch.optim.AdamW(distiller.parameters(), fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(101):
            distiller(images(), BOXES, maps).backward()
            optimizer.step()


def test_what_no_optimizer_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = make(expert_channels=None)
    apprentice = Network((4, 8, 8), seed=2)
    maps = [m.detach().requires_grad_() for m in apprentice.features(images())]
    monkeypatch.setattr(TrainingWatch, "STEPS", 100)
    with pytest.warns(UserWarning, match=r"4 parameters|2 parameters .*did not change in 100 steps"):
        for _ in range(100):
            distiller(images(), BOXES, maps)
    trained = make()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    trained.add_to(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(101):
            trained(images(), BOXES, maps).backward()
            optimizer.step()
    with pytest.raises(TypeError, match="optimizer: expected an optimizer with param_groups, got list"):
        trained.add_to([])


@pytest.mark.parametrize("method", ["rakd", "mgd"])
def test_a_state_of_before_the_first_step_can_be_gone_back_to(method: str) -> None:
    """As tuners of trainers do: they save, train a little, and load what they saved."""
    distiller = make(method=method, weight="auto:10", rescale=True)
    before = copy.deepcopy(distiller.state_dict())
    maps = [m.detach().requires_grad_() for m in Network((4, 8, 8), seed=2).features(images())]
    distiller(images(), BOXES, maps, task_loss=torch.tensor(1.0)).backward()
    first = copy.deepcopy(dict(distiller.named_parameters()))
    assert first and distiller.weight > 0
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter.add_(1.0)
    distiller.load_state_dict(before)
    assert distiller.weight == 0
    assert all(torch.equal(value, first[name]) for name, value in distiller.named_parameters())
    # Of a state from after the first step nothing may be missing.
    after = distiller.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        distiller.load_state_dict({name: value for name, value in after.items() if "method." not in name})


def test_evaluation_first_waits_for_nobody_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    attached: list[Any] = []
    monkeypatch.setattr(GradientAverage, "attach", lambda _, module: attached.append(module))
    distiller = make(method="semckd", batch_size=2).eval()
    with torch.no_grad():
        distiller(images(), BOXES, features())
    assert distiller.method is not None and not any(part.training for part in distiller.modules())
    assert not attached
    state = copy.deepcopy(distiller.state_dict())
    with torch.no_grad():
        distiller(images(), BOXES, features(3))
    assert all(torch.equal(value, state[name]) for name, value in distiller.state_dict().items())
    distiller.train()(images(), BOXES, features())
    assert attached == [distiller] and all(part.training for part in distiller.method.modules())


def test_no_adapters_where_channels_agree() -> None:
    same = make(adapters=False)
    assert torch.equal(same(images(), BOXES, features()), make()(images(), BOXES, features()))
    assert not list(same.parameters())
    with pytest.raises(ValueError, match=r"adapters: expected equal channels where adapters=False"):
        make(adapters=False)(images(), BOXES, Network((4, 8, 8)).features(images()))


def test_ema_copies_do_not_touch_the_expert() -> None:
    model = nn.Module()
    model.apprentice = Network((4, 8, 8), seed=2)
    expert = Network((4, 6, 8), seed=1)
    model.distiller = Distiller(expert, apprentice=model.apprentice, features=STAGES, apprentice_features=STAGES)
    model.apprentice(images())
    model.distiller(images(), BOXES)
    copies = copy.deepcopy(model)
    count = len(list(model.parameters()))
    assert count == len(list(copies.parameters())) == len(list(model.apprentice.parameters())) + 2
    for value in copies.state_dict().values():
        if value.dtype.is_floating_point:
            value.mul_(0.5)
    copies.half()
    assert expert.stages[0].conv.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(expert.stages[0].conv.weight, Network((4, 6, 8), seed=1).stages[0].conv.weight)  # type: ignore[union-attr]


PROCESSES = """
import os, sys
import torch
import torch.distributed as dist
sys.path[:0] = [{folder!r}]
from distill_cases import BOXES, STAGES, Network, images
from rakd.distill import Distiller

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)

def run(wrap, method):
    apprentice, expert = Network(seed=2), Network((4, 8, 8), seed=1)
    network = torch.nn.parallel.DistributedDataParallel(apprentice)
    options = dict(canonical_size=24) if method == "rakd" else dict()
    distiller = Distiller(
        expert, method, weight="auto:0.5", rescale=True, normalize=True, apprentice=network, features=STAGES,
        apprentice_features="input:head", seed=rank, strides=(4, 8, 16), expert_channels=(4, 8, 8),
        apprentice_channels=(4, 6, 8), **options
    )  # other weights in each process
    called = torch.nn.parallel.DistributedDataParallel(distiller) if wrap else distiller
    optimizer = torch.optim.SGD([*network.parameters(), *distiller.parameters()], lr=0.05)
    for step in range(4):
        # Rank 1 has no boxes now and then: it must not wait, nor be waited for.
        boxes = BOXES if rank == 0 or step % 2 else [b[:0] for b in BOXES]
        batch = images(seed=10 * rank + step)
        task = sum(m.square().mean() for m in network(batch)["boxes"])
        optimizer.zero_grad()
        (task + called(batch, boxes, task_loss=task)).backward()
        if rank == 0:  # a validation here alone waits for nobody
            apprentice.eval(), distiller.eval()
            with torch.no_grad():
                apprentice(batch)
                distiller(batch, BOXES)
            apprentice.train(), distiller.train()
        torch.nn.utils.clip_grad_norm_([*network.parameters(), *distiller.parameters()], 0.1)
        optimizer.step()
    learnt = [p.detach().clone() for p in (*distiller.parameters(), *apprentice.parameters())]
    assert len(learnt) > 18
    for value in [*learnt, torch.tensor(distiller.weight), distiller.get_extra_state()]:
        mine = value.clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, value), (wrap, method, rank, value.shape)
    return learnt

for method in ("rakd", "mgd"):
    alone, wrapped = run(False, method), run(True, method)
    for a, b in zip(alone, wrapped):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_learn_the_same_with_and_without_ddp() -> None:
    run_two_processes("-c", PROCESSES.replace("{folder!r}", repr(str(Path(__file__).parent))))
