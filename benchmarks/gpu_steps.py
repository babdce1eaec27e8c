"""Small programs that ``gpu_check.sh`` runs under a sanitizer or a profiler.

::

    python -m benchmarks.gpu_steps small [DEVICE]          # every dtype and layout, both ops, on small maps
    python -m benchmarks.gpu_steps hot WORKLOAD [DEVICE]   # two training steps in each form

Each runs in both forms of a training step (RAKD_CUDA_FORM), one after the other. DEVICE is cuda unless given.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
from torch import Tensor

from benchmarks.workloads import WORKLOADS, make_inputs
from rakd_ops import multilevel_roi_align, soft_roi_distill

FORMS = ("pooled", "gram")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 36: a whole slab and a part of one, and channels-last cells that are read several channels at a time. 19: odd.
CHANNELS = (36, 19)
HEIGHT, WIDTH = 64, 96


def _maps(channels: int, dtype: torch.dtype, layout: str, strides: tuple[float, ...], device: str) -> list[Tensor]:
    maps = []
    for stride in strides:
        shape = (2, channels, -int(-HEIGHT // stride), -int(-WIDTH // stride))
        if layout == "strided":
            feature = torch.randn([2 * n for n in shape], device=device)[::2, ::2, ::2, ::2].to(dtype)
        else:
            last = layout == "channels_last"
            form = torch.channels_last if last else torch.contiguous_format
            feature = torch.randn(shape, device=device).to(dtype=dtype, memory_format=form)
        maps.append(feature.requires_grad_())
    return maps


def small(device: str) -> None:
    """Run both ops, forward and backward, over dtypes, layouts and experts of another resolution."""
    torch.manual_seed(0)
    corners = (torch.rand(9, 2, 2) * 1.4 - 0.2) * torch.tensor([WIDTH, HEIGHT])
    image = torch.randint(0, 2, (9, 1)).float()
    boxes = torch.cat([image, corners.amin(1), corners.amax(1)], 1).to(device)
    strides, others = (4.0, 8.0, 16.0, 32.0), (3.0, 6.0, 12.0, 24.0)
    choices = itertools.product(DTYPES, ("contiguous", "channels_last", "strided"), CHANNELS, (strides, others))
    for number, (dtype, layout, channels, steps) in enumerate(choices):
        apprentice = _maps(channels, dtype, layout, strides, device)
        expert = _maps(channels, dtype, layout, steps, device)
        loss = soft_roi_distill(apprentice, expert, boxes, expert_strides=steps, sampling_ratio=number % 3)
        torch.autograd.grad(loss, apprentice + expert)
        pooled = multilevel_roi_align(apprentice, boxes, sampling_ratio=number % 3)
        torch.autograd.grad(pooled.float().sum(), apprentice)


def hot(workload: str, device: str) -> None:
    """Run two training steps of a benchmark's workload."""
    sizes = WORKLOADS["distill"][workload]
    call = make_inputs(sizes, "float32", "nchw", device, 0)
    for _ in range(2):
        loss = soft_roi_distill(call.apprentice, call.expert, call.boxes, output_size=sizes.output_size)
        torch.autograd.grad(loss, call.apprentice)


def main(arguments: list[str]) -> None:
    """Run the program that the arguments name."""
    name, *rest = arguments
    needed = {"small": 0, "hot": 1}[name]
    device = rest[needed] if len(rest) > needed else "cuda"
    for form in FORMS:
        os.environ["RAKD_CUDA_FORM"] = form
        if name == "small":
            small(device)
        else:
            hot(rest[0], device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{' '.join(arguments)}: done")


if __name__ == "__main__":
    main(sys.argv[1:])
