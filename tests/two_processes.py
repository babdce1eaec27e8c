"""Runs a command as the two processes of a torch.distributed group; the folders' conftest.py make it importable."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def run_two_processes(*arguments: str) -> None:
    """Run Python with these arguments twice, with RANK 0 and 1; both must end well.

    The code joins the group by ``init_process_group("gloo", rank=rank, world_size=2)``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments], env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
