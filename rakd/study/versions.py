"""Versions and the machine, on which figures depend besides settings and data."""

import platform
from pathlib import Path

import numpy as np
import torch
import torchvision


def versions(device: torch.device) -> dict[str, str]:
    """Versions and machine, by name.

    Args:
        device: Where things were computed.
    """
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
