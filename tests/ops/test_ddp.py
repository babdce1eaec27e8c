"""DistributedDataParallel: two processes on gloo give the gradients of one process on the whole batch."""

from __future__ import annotations

from processes import run_two_processes

CODE = """
import os, torch
import torch.distributed as dist
from torch import nn
from rakd_ops import SoftRoIDistillLoss

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 4, s, stride=s) for s in (4, 8, 16, 32))
    def forward(self, images):
        return [layer(images) for layer in self.layers]

torch.manual_seed(0)
torch.set_num_threads(1)
apprentice, expert = Network().double(), Network().double().eval()
images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
boxes = [torch.tensor([[4.0, 4.0, 40.0, 60.0], [30.0, 8.0, 90.0, 30.0]]), torch.tensor([[0.0, 0.0, 64.0, 64.0]] * 2)]
criterion = SoftRoIDistillLoss()

def gradients(network, images, boxes):
    with torch.no_grad():
        targets = expert(images)
    criterion(network(images), targets, boxes).backward()
    return [p.grad for p in apprentice.parameters()]

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)
parallel = nn.parallel.DistributedDataParallel(apprentice)
shared = [g.clone() for g in gradients(parallel, images[rank : rank + 1], boxes[rank : rank + 1])]
apprentice.zero_grad()
for a, b in zip(shared, gradients(apprentice, images, boxes)):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one() -> None:
    run_two_processes("-c", CODE)
