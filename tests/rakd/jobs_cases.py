"""Tasks that tests run side by side; importable from the processes that do them."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from rakd.errors import UserError
from rakd.study.jobs import run_side_by_side


def note(slot: int, folder: Path, name: str) -> None:
    """Write down slot, threads and process, and stay for a moment."""
    (folder / f"{name}.begun").write_text(f"{slot} {torch.get_num_threads()} {os.getpid()}")
    warnings.warn(f"{name} takes a moment", stacklevel=1)
    time.sleep(0.3)
    (folder / f"{name}.done").touch()


def fail(slot: int, folder: Path, name: str) -> None:
    """Fail in one of several ways, or not at all."""
    if name == "user":
        raise UserError("the folder is full")
    if name == "program":
        raise RuntimeError("an error of the program")
    if name == "killed":
        os.kill(os.getpid(), 9)
    note(slot, folder, name)


def stay(slot: int, folder: Path) -> None:
    """Stay for good."""
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


if __name__ == "__main__":
    # Background jobs of a shell without job control inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_side_by_side(stay, {"stay": (Path(sys.argv[1]),)}, 1, print)
