"""Runs side by side give the results of one after the other; a run that fails or is killed takes nothing along."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jobs_cases
import pytest
import torch

from rakd.checkpoints import load_weights
from rakd.distributed import Processes
from rakd.files import without_nan
from rakd.study import experiment as module
from rakd.study.experiment import Experiment
from rakd.study.jobs import run_side_by_side
from rakd.study.settings import STUDIES

CPU = Processes(torch.device("cpu"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_tasks_share_slots_and_threads_and_wait_and_fail_with_those_that_wait_for_them(
    two_threads: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    tasks = {name: (tmp_path, name) for name in ("user", "late", "never", "fine", "program", "killed")}
    after = {"late": "fine", "never": "user", "fine": "no task"}
    with pytest.raises(ValueError, match="4 of 6 runs failed: ") as caught:
        run_side_by_side(jobs_cases.fail, tasks, 2, said.append, after)
    for part in ("user (exit code 2)", "program (exit code 1)", "killed (exit code -9)", "never (waited for user)"):
        assert part in str(caught.value)
    assert str(caught.value).endswith("; the others are finished")
    errors = capfd.readouterr().err
    assert "rakd: error: user: the folder is full" in errors
    assert "RuntimeError: an error of the program" in errors
    assert "rakd: warning: fine takes a moment\n" in errors and "warnings.warn(" not in errors
    assert {path.name for path in tmp_path.glob("*.done")} == {"fine.done", "late.done"}
    notes = [[int(word) for word in path.read_text().split()] for path in tmp_path.glob("*.begun")]
    assert all(slot in (0, 1) and threads == 1 for slot, threads, _ in notes)
    assert len({process for _, _, process in notes} | {os.getpid()}) == 3
    assert said[:2] == ["user: begins (5 more wait)", "fine: begins (4 more wait)"]
    assert {"fine: done", "late: done", "user: failed (exit code 2)"} <= set(said)
    places = {line.partition(" (")[0]: place for place, line in enumerate(said)}
    assert places["fine: done"] < places["late: begins"] and "never: begins" not in places
    # Never are there more than two, and two as long as some can begin.
    there = [0]
    for line in said:
        there.append(there[-1] + (1 if "begins" in line else -1))
    assert max(there) == 2 and there[-1] == 0


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_runs_end_with_the_process_that_started_them(signal: str, tmp_path: Path) -> None:
    path = [str(Path(jobs_cases.__file__).parent), *sys.path]
    parent = subprocess.Popen(
        [sys.executable, jobs_cases.__file__, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    )
    limit = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < limit and parent.poll() is None
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    assert alive(child)
    parent.send_signal({"SIGKILL": 9, "SIGINT": 2}[signal])
    parent.wait(60)
    limit = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out pictures and timing."""
    monkeypatch.setattr(module, "write_report", lambda *arguments: None)
    monkeypatch.setattr(Experiment, "_draw_frames", lambda self: None)
    monkeypatch.setattr(Experiment, "_models", lambda self: ())


def test_side_by_side_is_as_one_after_the_other(
    two_threads: None, bare: None, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = STUDIES["tiny"]
    training = replace(base.training, steps=2, batch_size=2, warm_up=0)
    settings = replace(base, methods=("none", "rakd"), expert_training=training, training=training)
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    at_once = Experiment(settings, scenes, beside, CPU, quiet=True, jobs=2).run()
    torch.set_num_threads(1)  # as each of the two has
    in_turn = Experiment(settings, scenes, alone, CPU, quiet=True).run()

    def figures(runs: Any) -> list[Any]:
        return [{**without_nan(asdict(run)), "seconds": 0} for run in runs]

    assert figures(at_once.runs) == figures(in_turn.runs)
    assert [run.method for run in at_once.runs] == ["expert", "none", "rakd"]
    for name in ("expert-seed0", "none-seed0", "rakd-seed0"):
        ours, theirs = (load_weights(out / name / "detector.pt")[0] for out in (beside, alone))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    # What is missing is made again, and only that; the tasks are done here, as a process would take seconds to start.
    times = {path: path.stat().st_mtime_ns for path in beside.glob("*/detector.pt")}
    (beside / "rakd-seed0" / "result.json").unlink()
    asked: list[str] = []

    def do_here(work: Any, tasks: dict[str, tuple[Any, ...]], jobs: int, *_: Any) -> None:
        assert jobs == 2
        asked.extend(tasks)
        for arguments in tasks.values():
            work(0, *arguments)

    monkeypatch.setattr(module, "run_side_by_side", do_here)
    again = Experiment(settings, scenes, beside, CPU, quiet=True, jobs=2).run()
    assert asked == ["rakd-seed0"] and figures(again.runs) == figures(at_once.runs)
    changed = {path.parent.name for path, time_ in times.items() if path.stat().st_mtime_ns != time_}
    assert changed == {"rakd-seed0"}


def test_jobs_are_checked(scenes: Path, tmp_path: Path) -> None:
    for count, jobs, message in ((1, 0, "1 or more, got 0"), (2, 2, "1 for processes .*, got 2")):
        with pytest.raises(ValueError, match=f"jobs must be {message}"):
            Experiment(STUDIES["tiny"], scenes, tmp_path, replace(CPU, count=count), jobs=jobs)
