"""Versions and the machine, on which figures depend besides settings and data."""

import platform
from pathlib import Path

import numpy as np
import torch
import torchvision

from rakd.machine import git_state, processor


def versions(device: torch.device) -> dict[str, str]:
    """Versions and machine, by name; the commit where the sources are run from a checkout.

    Args:
        device: Where things were computed.
    """
    commit, changed = git_state(Path(__file__).parents[2])
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        **({"commit": f"{commit[:7]}{' with changes' if changed else ''}"} if commit else {}),
    }
