"""Runs Python code in processes of its own, one or a torch.distributed group; conftest.py makes it importable.

The processes are forked from one that has imported torch: that takes longer than what most tests do.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
# Nothing of this project, which a process must find as the test that starts it does, and load with its environment.
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])


def run_process(*arguments: str, **environment: str | None) -> str:
    """Run Python with these arguments, ``-c`` and code, ``-m`` and a module or a script, and give what it prints.

    None takes a variable out of the environment.
    """
    return _run(arguments, [environment])[0]


def run_two_processes(*arguments: str, count: int = 2) -> None:
    """Run Python with these arguments, ``-c`` and code or a script, twice (or more often); all must end well.

    The processes have the environment that torchrun gives them, RANK and the like. The code joins the group.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    _run(arguments, [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)])


def _run(arguments: Sequence[str], environments: Sequence[Mapping[str, str | None]]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number, environment in enumerate(environments):
            output = str(Path(folder) / str(number))
            processes.append(_CONTEXT.Process(target=_main, args=(arguments, environment, output), daemon=True))
            processes[-1].start()
        for number, process in enumerate(processes):
            process.join(120)
            if process.exitcode is None:
                for each in processes:
                    each.kill()
            assert process.exitcode == 0, (process.exitcode, (Path(folder) / f"{number}.err").read_text())
        return [(Path(folder) / str(number)).read_text() for number in range(len(processes))]


def _main(arguments: Sequence[str], environment: Mapping[str, str | None], output: str) -> None:
    for descriptor, name in ((1, output), (2, f"{output}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    import torch

    torch.set_num_threads(1)
    what, *rest = arguments
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *rest]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")
    sys.stdout.flush()
