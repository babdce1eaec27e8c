"""A detector in two processes learns what it learns in one."""

import pickle
from dataclasses import replace
from pathlib import Path

import monodetr_cases
import pytest
from detector_cases import MANY, NONE, ONE, images
from processes import run_two_processes

from rakd.detector.configs import DetectorConfig

PROCESS = """
import os, pickle, sys, torch
import torch.distributed as dist
from torch import nn

with open(sys.argv[1], "rb") as file:
    config, images, batches = pickle.load(file)
torch.set_num_threads(1)

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.detector = config.build().double().train()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    def forward(self, rows, targets):
        features = self.detector.extract_features(images[rows].double())
        sizes = [(images.shape[3], images.shape[2])] * len(rows)
        return self.detector.losses(features, sizes, [targets[i] for i in rows], [7 + i for i in rows])

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)
model = Toy()
parallel = nn.parallel.DistributedDataParallel(model)

def gradients(network, rows, targets):
    model.zero_grad()
    terms, foreground = network(rows, targets)
    torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, [len(boxes) for boxes in foreground]

for targets in batches:
    shared, (own,) = gradients(parallel, [rank], targets)
    whole, counts = gradients(model, [0, 1], targets)
    assert counts[0] != counts[1] and counts[rank] == own, (counts, own)
    for name, gradient in whole.items():
        # The heads' answers are float32, so that sums in another order differ in the seventh digit. What a key's bias
        # has is rounding alone: it moves all scores of a query alike.
        atol = 2e-6 * gradient.abs().max().item() + 1e-12
        torch.testing.assert_close(shared[name], gradient, rtol=1e-5, atol=atol, msg=lambda text: name + text)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("family", ["two-stage", "monodetr"])
def test_two_processes_give_the_gradients_of_one(family: str, small_config: DetectorConfig, tmp_path: Path) -> None:
    batches = [[MANY, ONE], [NONE, ONE]]
    # Without dropout, which each process draws for itself.
    queries = replace(monodetr_cases.CONFIG, transformer=replace(monodetr_cases.CONFIG.transformer, dropout=0.0))
    config = small_config if family == "two-stage" else queries
    (tmp_path / "input").write_bytes(pickle.dumps((config, images(2), batches)))
    run_two_processes("-c", PROCESS, str(tmp_path / "input"))
