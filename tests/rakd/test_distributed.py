"""Counts and checkpoints that processes share: alone, and with two on Gloo, which must give the gradients of one."""

import copy

import pytest
import torch
from processes import run_two_processes
from torch import nn

from rakd import distributed
from rakd.distill import Distiller
from rakd.distributed import GradientAverage, shared_mean_count

CPU = torch.device("cpu")

CODE = """
import os, pickle, torch
import torch.distributed as dist
from torch import nn
from rakd.distill.distiller import Distiller
from rakd.distill.methods import make_method
from rakd.distributed import broadcast_state, current_processes, shared_mean_count

class Network(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.ModuleDict({f"p{i}": nn.Conv2d(3, channels, 2**i, stride=2**i) for i in (2, 3)})
    def forward(self, images):
        return {name: layer(images) for name, layer in self.layers.items()}

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.apprentice = Network(2)
        method = make_method("rakd", strides=(4, 8), expert_channels=3, apprentice_channels=2)
        self.distiller = Distiller(Network(3), method)
    def forward(self, images, boxes):
        return self.distiller(images, boxes, self.apprentice(images))

torch.manual_seed(0)
torch.set_num_threads(1)
model = Toy().double()
images = torch.rand(2, 3, 32, 48, dtype=torch.float64)
three = torch.tensor([[4.0, 4.0, 40.0, 30.0], [30.0, 8.0, 45.0, 30.0], [0.0, 0.0, 20.0, 20.0]])

def gradients(network, images, boxes):
    model.zero_grad()
    network(images, boxes).backward()
    return [p.grad.clone() for p in model.parameters()]

cases = [[three, three[:1]], [three, three[:0]], [three[:0], three[:0]]]
alone = [gradients(model, images, boxes) for boxes in cases]
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)
assert shared_mean_count(3 * rank, torch.device("cpu")) == 1.5
assert shared_mean_count(0, torch.device("cpu")) == 1

def compare():
    parallel = nn.parallel.DistributedDataParallel(model)
    for boxes, expected in zip(cases, alone):
        shared = gradients(parallel, images[rank : rank + 1], boxes[rank : rank + 1])
        assert len(shared) == len(expected) == 8
        for a, b in zip(shared, expected):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)

def state():
    if rank:
        raise AssertionError("the main process alone makes the state")
    return make_state()

def make_state():
    network = nn.Sequential(nn.Conv2d(3, 300, 5), nn.BatchNorm2d(300))
    nn.init.constant_(network[0].weight, 0.25)
    nn.init.constant_(network[0].bias, 0.5)
    return {
        "network": network.to(memory_format=torch.channels_last).state_dict(),
        "several": [torch.tensor(True), (torch.arange(6).view(2, 3).T, "text", None), torch.zeros(0, 4)],
        "strided": torch.arange(20.0)[::2],
        "half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    }

sent, broadcast_object_list = [], dist.broadcast_object_list
def noting(objects, **options):
    sent.append(len(pickle.dumps(objects)))
    broadcast_object_list(objects, **options)
dist.broadcast_object_list = noting
received, expected = broadcast_state(current_processes(torch.device("cpu")), state), make_state()
dist.broadcast_object_list = broadcast_object_list
assert len(sent) == 1 and sent[0] < 10_000, sent  # without the 90 kB of weights
flat, spec = torch.utils._pytree.tree_flatten(received)
others, other_spec = torch.utils._pytree.tree_flatten(expected)
assert spec == other_spec
for own, other in zip(flat, others):
    if isinstance(other, torch.Tensor):
        assert own.dtype == other.dtype and own.shape == other.shape and torch.equal(own, other), (own, other)
    else:
        assert own == other
weight = received["network"]["0.weight"]
assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
assert received["network"]._metadata == expected["network"]._metadata

compare()  # a function: DDP holds the group, and a group that lives on at exit may abort the process
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one_and_share_its_state() -> None:
    run_two_processes("-c", CODE)


def test_gradients_are_averaged_after_what_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # As DistributedDataParallel waits for its collectives: a callback that is queued when its last gradient is there.
    order: list[str] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda *_: None)
    monkeypatch.setattr(distributed, "all_reduce_mean", lambda values: order.append("averaged") or values)
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)
    average = GradientAverage()
    average.attach(last)
    queue = torch.autograd.Variable._execution_engine.queue_callback
    first.weight.register_post_accumulate_grad_hook(lambda _: queue(lambda: order.append("waited for")))
    for _ in range(2):
        last(first(torch.ones(1, 3))).sum().backward()
    assert order == ["waited for", "averaged"] * 2


def test_alone_it_is_the_count() -> None:
    assert shared_mean_count(7, CPU).item() == 7
    assert shared_mean_count(0, CPU).item() == 1
    assert (torch.zeros(3, dtype=torch.bfloat16) / shared_mean_count(2, CPU)).dtype == torch.bfloat16


def test_one_process_alone_may_check(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: sent.append("broadcast"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: sent.append("all_reduce"))
    maps = [torch.rand(2, 3, 8 // s, 12 // s, requires_grad=True) for s in (1, 2)]
    expert = [torch.rand(2, 5, 8 // s, 12 // s) for s in (1, 2)]
    boxes = [torch.tensor([[4.0, 4.0, 30.0, 30.0]])] * 2
    distiller = Distiller(None)
    distiller.check(torch.rand(2, 3, 32, 48), boxes, maps, expert)
    assert sent == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"expected one step before torch\.compile sees it"):
        distiller(torch.rand(2, 3, 32, 48), boxes, maps, expert)  # whose gradients would not be averaged
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    distiller(torch.rand(2, 3, 32, 48), boxes, maps, expert)
    assert sent.count("broadcast") == len(list(distiller.parameters())) > 0
    copied = copy.deepcopy(distiller)  # which averages nothing yet
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert distiller(torch.rand(2, 3, 32, 48), boxes, maps, expert).isfinite()
    with pytest.raises(RuntimeError, match=r"expected one step before torch\.compile sees it"):
        copied(torch.rand(2, 3, 32, 48), boxes, maps, expert)
