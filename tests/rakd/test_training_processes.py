"""Two processes train as one does, and end together; ``torchrun`` starts them, or sets what it would set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_two_processes
from toy_model import ToyModel, assert_same_bits, make_trainer

from rakd.checkpoints import load_checkpoint

SCRIPT = Path(__file__).with_name("distributed_training.py")


class Outcome:
    """What one process and two made of the same training."""

    def __init__(self, scenes: Path, out: Path) -> None:
        self.out = out
        halfway = make_trainer(scenes, out / "half", ToyModel(torch.float64), checkpoint_every=5)
        save = halfway._save

        def save_and_copy() -> None:
            save()
            if halfway.step == 5:
                shutil.copytree(out / "half", out / "one_to_two")

        halfway._save = save_and_copy
        self.rows = halfway.run()
        self.model = halfway.model
        self.state = load_checkpoint(out / "half" / "checkpoint.pt")
        run_two_processes(str(SCRIPT), str(scenes), str(out))
        self.reports: list[dict[str, Any]] = [json.loads((out / f"report-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def outcome(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(scenes, tmp_path_factory.mktemp("processes"))


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal to the rounding of float64, which ten steps multiply a little; each step moves weights by the momentum."""
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name], rtol=1e-11, atol=1e-13)


def test_two_processes_train_as_one(outcome: Outcome) -> None:
    state = load_checkpoint(outcome.out / "two" / "checkpoint.pt")
    assert_close(state, outcome.state)
    assert state.keys() == outcome.state.keys()
    assert state["fingerprint"] == outcome.state["fingerprint"]
    assert [report["count"] for report in outcome.reports] == [2, 2]
    for report in outcome.reports:
        for row, other in zip(report["rows"], outcome.rows, strict=True):
            assert row.keys() == other.keys()
            for name in ("step", "lr", "count", "height", "total", "grad_norm"):
                assert row[name] == pytest.approx(other[name], rel=1e-11), name


def test_the_processes_share_each_batch(outcome: Outcome) -> None:
    first, second = (report["seen"] for report in outcome.reports)
    assert [[*a, *b] for a, b in zip(first, second, strict=True)] == outcome.model.seen


def test_runs_go_on_with_another_number_of_processes(outcome: Outcome, scenes: Path) -> None:
    assert_close(load_checkpoint(outcome.out / "one_to_two" / "checkpoint.pt"), outcome.state)
    trainer = make_trainer(scenes, outcome.out / "two_to_one", ToyModel(torch.float64))
    assert trainer.step == 3
    trainer.run()
    assert_close(load_checkpoint(outcome.out / "two_to_one" / "checkpoint.pt"), outcome.state)


def test_two_processes_resume_to_the_same_bits(outcome: Outcome) -> None:
    assert [report["resumed_at"] for report in outcome.reports] == [3, 3]
    whole, resumed = (load_checkpoint(outcome.out / name / "checkpoint.pt") for name in ("two", "two_to_two"))
    assert_same_bits(resumed["model"], whole["model"])


def test_the_main_process_validates_for_all(outcome: Outcome) -> None:
    assert [report["validations"] for report in outcome.reports] == [[1.0, 3.0, 2.0, 2.5]] * 2
    assert [report["kept"] for report in outcome.reports] == [[3, 6], []]
    validated, plain = (load_checkpoint(outcome.out / name / "checkpoint.pt") for name in ("validated", "two"))
    assert_same_bits(validated["model"], plain["model"])


def test_all_processes_say_what_is_not_finite_in_one(outcome: Outcome) -> None:
    messages = {report["not_finite"] for report in outcome.reports}
    assert len(messages) == 1
    (message,) = messages
    assert message.startswith("the loss of step 3 is not finite: count ")
    assert "height nan" in message
    assert message.endswith("frames " + ", ".join(outcome.model.seen[2]))


def test_a_part_unused_in_one_process_learns_from_the_others(outcome: Outcome) -> None:
    first, second = (torch.tensor(report["extra"]) for report in outcome.reports)
    assert torch.equal(first, second)
    assert (first < 1).all()


def test_all_processes_refuse_wrong_settings(outcome: Outcome) -> None:
    for report in outcome.reports:
        assert report["odd"] == "batch_size must be a multiple of the number of processes, 2, got 3"
        assert "settings.steps is 10 there and 11 here" in report["other"]
        assert report["unlike"].startswith("process 1 (here) differs from the first one (there): data.digest is ")


def test_only_the_first_process_writes(outcome: Outcome) -> None:
    assert sorted(file.name for file in (outcome.out / "two").iterdir()) == ["checkpoint.pt", "log.csv", "log.jsonl"]
    assert [line.split(",")[0] for line in (outcome.out / "two" / "log.csv").read_text().splitlines()[1:]] == [
        "2", "4", "6", "8", "10",
    ]  # fmt: skip


def test_a_process_that_fails_ends_all_with_its_own_error() -> None:
    script = SCRIPT.with_name("distributed_failure.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "UserError: the second process has its own trouble" in done.stderr
