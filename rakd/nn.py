"""Small helpers that detectors and distillation share: seeded weights, sums in float32, copies without a wait."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded_modules(seed: int) -> Iterator[None]:
    """Within the block, modules are made on the CPU with weights drawn from ``seed``; the global generator stays.

    Only the CPU's generator is set and restored, and `torch.manual_seed`, which would seed the GPUs' as well, is not
    used: weights are the same on every machine, and the trainer's own random numbers the same with and without them.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def widen(tensor: Tensor) -> Tensor:
    """Bring half types to float32, where sums over whole maps neither overflow nor lose what is small."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from main memory to a device; the host does not wait for a GPU to take it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
