"""Runs a training in child processes and kills each with SIGKILL, at a later point than the last.

``python killed_training.py SCENES OUT`` prints after each kill how the child ended and what it left in OUT.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from toy_model import ToyModel, make_trainer

import rakd.training.log
from rakd.training.trainer import Trainer

SCENES, OUT = Path(sys.argv[1]), Path(sys.argv[2])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number: int, original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does something else on its ``number``th call, counted from 1."""
    calls = iter(range(1, 1_000_000))
    return lambda *args, **kwargs: (instead if next(calls) == number else original)(*args, **kwargs)


def half_a_checkpoint() -> None:
    save = torch.save

    def half(content: Any, file: BinaryIO) -> None:
        save(content, file)
        file.truncate(file.tell() // 2)
        die()

    torch.save = on_call(2, save, half)


def first_step() -> None:
    ToyModel.forward = on_call(1, ToyModel.forward, die)  # type: ignore[method-assign]


def between_forward_and_update() -> None:
    Trainer._check_finite = on_call(4, Trainer._check_finite, die)  # type: ignore[method-assign]


def before_the_new_checkpoint_stands() -> None:
    Path.replace = on_call(3, Path.replace, die)  # type: ignore[method-assign]  # checkpoint, log, checkpoint


def between_checkpoint_and_log() -> None:
    rakd.training.log.write_text = on_call(2, rakd.training.log.write_text, die)


def after_the_last_checkpoint() -> None:
    # The 8th checkpoint, at the end, is written and the log is not.
    rakd.training.log.write_text = lambda path, text: die() if "\n24," in text else write_text(path, text)


def at_any_time() -> None:
    """Nothing; the parent kills."""


write_text = rakd.training.log.write_text
POINTS = [
    first_step,
    half_a_checkpoint,
    between_forward_and_update,
    before_the_new_checkpoint_stands,
    at_any_time,
    between_checkpoint_and_log,
    after_the_last_checkpoint,
]

for point in POINTS:
    before = time.time_ns()
    child = os.fork()
    if child == 0:
        point()
        make_trainer(SCENES, OUT, steps=24, log_every=4).run()
        os._exit(0)  # it was not killed: the parent's print says so
    if point is at_any_time:
        checkpoint = OUT / "checkpoint.pt"
        while checkpoint.stat().st_mtime_ns < before and time.time_ns() < before + 60 * 10**9:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    files = sorted("temporary" if file.name.startswith(".") else file.name for file in OUT.glob("*"))
    for leftover in OUT.glob(".*"):  # younger ones may be another process's
        os.utime(leftover, (time.time() - 7200,) * 2)
    print(point.__name__, -os.waitstatus_to_exitcode(status), *files, flush=True)
