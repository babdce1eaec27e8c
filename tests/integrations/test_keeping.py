"""`rakd.integrations.keep_in_optimizer`: adapters and measured values travel in an optimizer's state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rakd.distill import Distiller
from rakd.extras import require
from rakd.integrations import keep_in_optimizer


class Net(nn.Module):
    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stages = nn.ModuleList(nn.Conv2d(3, channels, s, stride=s) for s in (4, 8))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [stage(images) for stage in self.stages]


def start() -> tuple[Net, Distiller, torch.optim.Optimizer, Any]:
    net = Net(4, seed=0)
    optimizer = torch.optim.AdamW([{"params": net.stages[0].parameters()}, {"params": net.stages[1].parameters()}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    distiller = Distiller(Net(6, seed=1), weight="auto:0.2", normalize=True)
    keep_in_optimizer(distiller, optimizer, group=1)
    return net, distiller, optimizer, scheduler


def train(parts: tuple[Net, Distiller, torch.optim.Optimizer, Any], steps: int) -> None:
    net, distiller, optimizer, scheduler = parts
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    boxes = [torch.tensor([[2.0, 3, 20, 28]]), torch.tensor([[5.0, 5, 30, 30]])]
    for _ in range(steps):
        maps = net(images)
        task = maps[0].square().mean()
        optimizer.zero_grad()
        (task + distiller(images, boxes, maps, task_loss=task)).backward()
        optimizer.step()
        scheduler.step()


def test_goes_on_to_the_same_bits() -> None:
    whole = start()
    train(whole, 6)
    half = start()
    train(half, 3)
    net, optimizer, scheduler = (copy.deepcopy(part.state_dict()) for part in (half[0], half[2], half[3]))
    assert "rakd" in optimizer["param_groups"][1] and "rakd" not in half[2].param_groups[1]
    again = start()
    assert not list(again[1].parameters())
    again[0].load_state_dict(net)
    again[2].load_state_dict(optimizer)
    again[3].load_state_dict(scheduler)
    assert len(list(again[1].parameters())) == 4
    assert "rakd" in optimizer["param_groups"][1]  # left as it was, for whoever loads it next
    train(again, 3)
    for one, other in ((whole[0], again[0]), (whole[1], again[1])):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_gradients_are_clipped_where_the_trainer_clips_those_of_the_model_alone() -> None:
    for limit in (None, 1e-3):
        net = Net(4, seed=0)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        distiller = Distiller(Net(6, seed=1), weight=100.0)
        keep_in_optimizer(distiller, optimizer, limit=limit)
        images, boxes = torch.rand(2, 3, 32, 32), [torch.tensor([[2.0, 3, 20, 28]])] * 2
        distiller(images, boxes, net(images)).backward()
        before = [parameter.detach().clone() for parameter in distiller.parameters()]
        optimizer.step()
        moved = torch.stack([(p - old).norm() for p, old in zip(distiller.parameters(), before, strict=True)]).norm()
        assert float(moved.detach()) > 0.1 if limit is None else float(moved.detach()) == pytest.approx(limit, rel=1e-3)


def test_two_distillers_in_one_group() -> None:
    net, optimizer = Net(4, seed=0), torch.optim.AdamW(Net(4, seed=0).parameters())
    pair = [Distiller(Net(6 + i, seed=i), weight="auto:0.2") for i in range(2)]
    again = [Distiller(Net(6 + i, seed=i), weight="auto:0.2") for i in range(2)]
    other = torch.optim.AdamW(Net(4, seed=0).parameters())
    for i in range(2):
        keep_in_optimizer(pair[i], optimizer)
        keep_in_optimizer(again[i], other)
        loss = pair[i](
            torch.rand(1, 3, 32, 32),
            [torch.tensor([[2.0, 3, 20, 28]])],
            net(torch.rand(1, 3, 32, 32)),
            task_loss=torch.tensor(1.0 + i),
        )
        loss.backward()
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for one, two in zip(pair, again, strict=True):
        assert one.weight == two.weight and set(one.state_dict()) == set(two.state_dict())
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert pair[0].weight != pair[1].weight


def test_a_state_without_distillation_can_be_loaded_before_the_first_step() -> None:
    plain = Net(4, seed=0)
    optimizer = torch.optim.AdamW([{"params": plain.stages[0].parameters()}, {"params": plain.stages[1].parameters()}])
    parts = start()
    saved = copy.deepcopy(parts[0].state_dict())
    parts[2].load_state_dict(optimizer.state_dict())
    parts[3].base_lrs = [group.setdefault("initial_lr", 1e-3) for group in parts[2].param_groups]
    train(parts, 1)
    assert any(not torch.equal(value, saved[name]) for name, value in parts[0].state_dict().items())


def test_another_import_error_is_not_covered_up(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_package", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("half_there", "timm")
    with pytest.raises(ImportError, match=r"not_there is not installed; run: pip install 'rakd\[timm\]'"):
        require("not_there", "timm")
