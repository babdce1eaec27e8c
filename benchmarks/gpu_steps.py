"""Small programs that ``gpu_check.sh`` runs under a sanitizer or a profiler.

::

    python -m benchmarks.gpu_steps smoke [DEVICE]          # every backend beside the reference, loss and gradients
    python -m benchmarks.gpu_steps small [DEVICE]          # every dtype and layout, both ops, on small maps
    python -m benchmarks.gpu_steps hot WORKLOAD [DEVICE]   # two training steps of a workload

DEVICE is cuda unless given.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from benchmarks.workloads import WORKLOADS, make_inputs
from rakd_ops import available_backends, multilevel_roi_align, soft_roi_distill

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 36: a whole block of channels and a part of one, and channels-last cells that are read several channels at a time.
CHANNELS = (36, 19)
HEIGHT, WIDTH = 64, 96
STRIDES, OTHER_STRIDES = (4.0, 8.0, 16.0, 32.0), (3.0, 6.0, 12.0, 24.0)
MAX_ERROR = 1e-4  # of a float32 loss and gradient, relative; the reference takes float64


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


def _boxes(device: str) -> Tensor:
    corners = (torch.rand(9, 2, 2) * 1.4 - 0.2) * torch.tensor([WIDTH, HEIGHT])
    image = torch.randint(0, 2, (9, 1)).float()
    return torch.cat([image, corners.amin(1), corners.amax(1)], 1).to(device)


def smoke(device: str) -> None:
    """Compare loss and gradients of every backend that can run with those of the reference on the CPU.

    Raises:
        SystemExit: One is further off than ``MAX_ERROR``, or the CUDA library cannot run on the GPU.
    """
    state = available_backends()
    print(state)
    if device == "cuda" and state["cuda"] is not True:
        raise SystemExit(f"the CUDA library cannot run: {state['cuda']}")
    apprentice = _maps(40, torch.float64, "contiguous", STRIDES, "cpu")
    expert = [feature.detach() for feature in _maps(40, torch.float64, "contiguous", STRIDES, "cpu")]
    rows = _boxes("cpu")
    boxes = [rows[rows[:, 0] == image, 1:] for image in range(2)]

    def run(backend: str, where: str, dtype: torch.dtype) -> list[Tensor]:
        maps = [feature.detach().to(where, dtype).requires_grad_() for feature in apprentice]
        others = [feature.to(where, dtype) for feature in expert]
        loss = soft_roi_distill(maps, others, [box.to(where) for box in boxes], backend=backend)
        return [loss.detach().double().cpu(), *(g.double().cpu() for g in torch.autograd.grad(loss, maps))]

    expected = run("reference", "cpu", torch.float64)
    backends = ("cuda", "triton") if device == "cuda" else ("cpu",)
    errors = {}
    for backend in (name for name in backends if state[name] is True):
        found = run(backend, device, torch.float32)
        errors[backend] = max(
            float((got - want).norm() / want.norm()) for got, want in zip(found, expected, strict=True)
        )
        print(f"{backend}: largest relative error {errors[backend]:.1e}", flush=True)
    if not max(errors.values()) <= MAX_ERROR:
        raise SystemExit(f"expected errors of at most {MAX_ERROR:.0e}")


def small(device: str) -> None:
    """Run both ops, forward and backward, over dtypes, layouts and experts of another resolution."""
    torch.manual_seed(0)
    boxes = _boxes(device)
    choices = itertools.product(DTYPES, ("contiguous", "channels_last", "strided"), CHANNELS, (STRIDES, OTHER_STRIDES))
    for number, (dtype, layout, channels, steps) in enumerate(choices):
        apprentice = _maps(channels, dtype, layout, STRIDES, device)
        expert = _maps(channels, dtype, layout, steps, device)
        loss = soft_roi_distill(apprentice, expert, boxes, expert_strides=steps, sampling_ratio=number % 3)
        torch.autograd.grad(loss, apprentice + expert)
        pooled = multilevel_roi_align(apprentice, boxes, sampling_ratio=number % 3)
        torch.autograd.grad(pooled.float().sum(), apprentice)


def hot(workload: str, device: str) -> None:
    """Run two training steps of a benchmark's workload."""
    sizes = WORKLOADS["distill"][workload]
    call = make_inputs(sizes, "float32", "nchw", device, 0)
    boxes = call.box_list()
    for _ in range(2):
        loss = soft_roi_distill(call.apprentice, call.expert, boxes, output_size=sizes.output_size)
        torch.autograd.grad(loss, call.apprentice)


def main(arguments: list[str]) -> None:
    """Run the program that the arguments name."""
    name, *rest = arguments
    needed = {"smoke": 0, "small": 0, "hot": 1}[name]
    device = rest[needed] if len(rest) > needed else "cuda"
    if name == "hot":
        hot(rest[0], device)
    else:
        {"smoke": smoke, "small": small}[name](device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{' '.join(arguments)}: done")


if __name__ == "__main__":
    main(sys.argv[1:])
