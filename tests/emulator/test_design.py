"""The model of the CUDA kernels (benchmarks/gpu_design.py) counts what the kernels do."""

from __future__ import annotations

import sys
from dataclasses import asdict

import build
import pytest
import test_kernels
import torch

sys.path.insert(0, str(build.ROOT))

from benchmarks import gpu_counts
from benchmarks.workloads import STRIDES, Workload, draw_boxes


@pytest.mark.parametrize("form", ["pooled", "gram"])
@pytest.mark.parametrize(
    "workload",
    [
        Workload(2, 9, 7, "proposals", channels=40, height=96, width=250),
        Workload(1, 7, 19, "uniform", channels=16, height=70, width=150),
        Workload(1, 260, 2, "proposals", channels=5, height=40, width=60),  # beyond one round of candidates
        Workload(1, 70, 3, "objects", channels=280, height=64, width=64),  # several slabs a pooling block
    ],
)
def test_counts_are_the_kernels(workload: Workload, form: str) -> None:
    module = build.load(test_kernels.BINDING, [test_kernels.KERNELS])
    boxes = draw_boxes(workload, torch.Generator().manual_seed(1))
    call = test_kernels.Call(
        strides=STRIDES,
        output_size=(workload.output_size,) * 2,
        channels=workload.channels,
        boxes=0,
        batch=workload.batch,
        size=(workload.height, workload.width),
        form=form,
    )
    call.boxes = boxes.double()
    call.coefficients = torch.ones(len(boxes), dtype=torch.float64)
    module.counts()
    call.distill(module, (True, False))
    counted = module.counts()
    count = gpu_counts.count_gram if form == "gram" else gpu_counts.count_pooled
    expected = asdict(count(workload, gpu_counts.list_patches(workload, boxes)))
    assert {name: counted[name] for name in expected} == expected
