"""Independent runs side by side, each in a process of its own with its share of the cores."""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch

from rakd.errors import UserError, show_warning


def run_side_by_side(
    work: Callable[..., object],
    tasks: Mapping[str, tuple[Any, ...]],
    jobs: int,
    say: Callable[[str], object],
    after: Mapping[str, str] | None = None,
) -> None:
    """Call a function with each task's arguments, several at a time, each in a process of its own.

    The processes are spawned, so function and arguments must be picklable. Each gets this process's threads divided by
    ``jobs``, one at least. A task that fails stops only those that wait for it; interrupting or killing this process
    stops all.

    Args:
        work: Called as ``work(slot, *arguments)``; slots are numbers below ``jobs``, which no two tasks have at a time.
        tasks: Arguments by the task's name.
        jobs: How many at a time.
        say: Told about each task's beginning and end.
        after: By the name of a task, the one that must be done before it begins. One that is no task is done.

    Raises:
        UserError: Tasks failed or could not begin; names them. Errors are on stderr.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, failed = list(tasks), dict[str, str]()
    after = after or {}
    running: dict[int, tuple[str, multiprocessing.context.SpawnProcess]] = {}  # by slot
    try:
        while waiting or running:
            for name in [name for name in waiting if after.get(name) in failed]:
                waiting.remove(name)
                failed[name] = f"waited for {after[name]}"
            there = {*waiting, *(name for name, _ in running.values())}
            ready = [name for name in waiting if after.get(name) not in there]
            for slot, name in zip([slot for slot in range(jobs) if slot not in running], ready, strict=False):
                waiting.remove(name)
                process = context.Process(target=_run, args=(work, name, (slot, *tasks[name]), threads), name=name)
                running[slot] = name, process  # before the start: an interruption may come right after it
                process.start()
                say(f"{name}: begins ({len(waiting)} more wait)")
            if running:
                wait([process.sentinel for _, process in running.values()])
            for slot, (name, process) in list(running.items()):
                if not process.is_alive():
                    del running[slot]
                    if process.exitcode:
                        failed[name] = f"exit code {process.exitcode}"
                    say(f"{name}: {f'failed (exit code {process.exitcode})' if process.exitcode else 'done'}")
    finally:
        for _, process in running.values():
            if process.pid is not None:
                process.terminate()
    if failed:
        names = ", ".join(f"{name} ({why})" for name, why in failed.items())
        raise UserError(f"{len(failed)} of {len(tasks)} runs failed: {names}; the others are finished")


def _run(work: Callable[..., object], name: str, arguments: tuple[Any, ...], threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    warnings.showwarning = show_warning
    try:
        work(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"rakd: error: {name}: {error}", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    # Else a run would go on unseen, and a repeated command would write to the same folder.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
