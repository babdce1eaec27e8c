"""Versions and the machine, on which figures depend besides settings and data."""

import contextlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision


def versions(device: torch.device) -> dict[str, str]:
    """Versions and machine, by name; the commit where the sources are run from a checkout.

    Args:
        device: Where things were computed.
    """
    commit = source_commit(Path(__file__).parents[2])
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        **({"commit": commit} if commit else {}),
    }


def joined_versions(runs: Sequence[Mapping[str, str]], device: torch.device) -> dict[str, str]:
    """Versions of runs that may have been made on several days and machines, all where they differ.

    Args:
        runs: `versions` of each; empty where it was not noted.
        device: Where latencies are measured now.
    """
    here = versions(device)
    noted = [run for run in runs if run] or [here]
    names = dict.fromkeys(name for run in noted for name in run)
    joined = {name: " and ".join(dict.fromkeys(run[name] for run in noted if name in run)) for name in names}
    return {**joined, "latency threads": here["threads"]}


def processor() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def source_commit(folder: Path) -> str:
    """A checkout's commit, such as "1a2b3c4 with changes"; empty where the folder is no checkout's root."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return ""

    root = git("rev-parse", "--show-toplevel")
    if not root or Path(root).resolve() != folder.resolve():  # installed, perhaps below somebody else's sources
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=7", "HEAD") + (" with changes" if changed else "")
