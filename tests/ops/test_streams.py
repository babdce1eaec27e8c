"""What only a GPU can show of every backend there: captured graphs, no synchronisation."""

from __future__ import annotations

import pytest
import torch
from cases import backend_params, gpu_inputs, gpu_step, gpu_warm_up, random_boxes

backends = pytest.mark.parametrize("backend", backend_params("cuda", "triton"))


@backends
def test_a_step_can_be_captured_in_a_graph(backend: str) -> None:
    maps, expert, boxes = gpu_inputs()
    gpu_warm_up(maps, expert, boxes, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu_step(maps, expert, boxes, backend)
    for seed in (3, 4):  # other values in the same memory
        with torch.no_grad():
            for m in maps:
                m.copy_(torch.randn_like(m))
            boxes.copy_(random_boxes(60, 2, 256, 512, seed=seed))
        graph.replay()
        for a, b in zip(captured, gpu_step(maps, expert, boxes, backend), strict=True):
            assert torch.equal(a, b)


@backends
def test_a_step_does_not_synchronise(backend: str) -> None:
    call = (*gpu_inputs(), backend)
    gpu_step(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_step(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
