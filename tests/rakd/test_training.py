"""The trainer in one process: it learns, resumes to the same bits, says what is wrong."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Sequence
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_model import CPU, Scripted, ToyModel, assert_same_bits, make_trainer, settings, weights

from rakd.checkpoints import load_checkpoint
from rakd.data.frames import find_frames
from rakd.data.kitti import Batch, KittiDataset, Sample
from rakd.errors import UserError
from rakd.files import locked
from rakd.training.log import Row
from rakd.training.optim import learning_rate
from rakd.training.trainer import Trainer


class Interrupted(ToyModel):
    """Stops in one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().forward(batch, seeds)


def without_times(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def resume(scenes: Path, out: Path, step: int, **options: Any) -> Trainer:
    """Interrupt a run in a step, then run it to the end."""
    with pytest.raises(KeyboardInterrupt):
        make_trainer(scenes, out, Interrupted(step), **options).run()
    trainer = make_trainer(scenes, out, **options)
    trainer.run()
    return trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_loss_falls(scenes: Path, tmp_path: Path, optimizer: str) -> None:
    rows = make_trainer(scenes, tmp_path, optimizer=optimizer, steps=40, learning_rate=0.05).run()
    assert [row["step"] for row in rows] == list(range(2, 41, 2))
    assert rows[-1]["total"] < 0.5 * rows[0]["total"]
    written = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert list(written[0]) == ["step", "lr", "count", "height", "total", "grad_norm", "seconds", "images_per_second"]
    assert [float(row["total"]) for row in written] == pytest.approx([row["total"] for row in rows], rel=1e-7)


def test_each_step_has_its_frames_and_seeds(scenes: Path, tmp_path: Path) -> None:
    model = ToyModel()
    make_trainer(scenes, tmp_path, model, batch_size=6).run()
    ids = list(chain(*model.seen))
    for epoch in range(len(ids) // 8):
        assert len(set(ids[8 * epoch : 8 * epoch + 8])) == 8
    seeds = list(chain(*model.seeds))
    assert len(set(seeds)) == len(seeds) == 60


def test_a_batch_across_epochs_is_augmented_by_each_frames_own(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = KittiDataset.load

    def told(self: KittiDataset, index: int, epoch: int) -> Sample:
        loaded.append(epoch)
        return load(self, index, epoch)

    monkeypatch.setattr(KittiDataset, "load", told)
    make_trainer(scenes, tmp_path, batch_size=6, steps=4).run()
    assert loaded == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("step", [1, 3, 4, 9])
def test_an_interrupted_run_resumes_to_the_same_bits(scenes: Path, tmp_path: Path, step: int) -> None:
    whole = make_trainer(scenes, tmp_path / "whole", optimizer="adamw", log_every=4)
    rows = whole.run()
    again = resume(scenes, tmp_path / "again", step, optimizer="adamw", log_every=4)
    assert_same_bits(weights(again), weights(whole))
    assert without_times(again.log.rows) == without_times(rows)
    assert [row["step"] for row in rows] == [4, 8, 10]


def test_a_finished_run_can_be_extended(scenes: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": "adamw", "schedule": "cosine", "log_every": 1}
    first = make_trainer(scenes, tmp_path, steps=4, **options).run()
    with pytest.raises(ValueError, match=r"settings\.steps is 4 there and 8 here; choose another folder or extend it"):
        make_trainer(scenes, tmp_path, steps=8, **options)
    shutil.copytree(tmp_path, tmp_path / "again")
    whole = make_trainer(scenes, tmp_path, steps=8, extend=True, **options)
    assert whole.step == 4
    rows = whole.run()
    assert rows[:4] == first
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    # The rates are those of the longer schedule: higher than the last of the shorter one.
    assert [row["lr"] for row in rows[4:]] == [learning_rate(whole.settings, step) for step in range(4, 8)]
    assert rows[4]["lr"] > 3 * rows[3]["lr"]
    assert all(isfinite(value) for row in rows for value in row.values())
    # The optimizer goes on, too: its steps have been counted on.
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {8.0}
    assert state["fingerprint"]["extended_from"] == [4]
    # An extension goes on from an interruption as other runs do, to the same bits.
    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        make_trainer(scenes, out, Interrupted(3), steps=8, extend=True, **options).run()
    with pytest.raises(ValueError, match=r"extended_from is \[4\] there and absent here; choose another folder or ext"):
        make_trainer(scenes, out, steps=8, **options)
    again = make_trainer(scenes, out, steps=8, extend=True, **options)
    assert again.step == 6
    again.run()
    assert_same_bits(weights(again), weights(whole))
    with pytest.raises(ValueError, match=r"steps is 8 there and 6 here; choose another folder$"):
        make_trainer(scenes, out, steps=6, extend=True, **options)


def validated(scenes: Path, out: Path, validation: Scripted, model: nn.Module | None = None) -> Trainer:
    trainer = make_trainer(scenes, out, model, validation=validation, validate_every=3)
    validation.trainer = trainer
    return trainer


def test_validation_keeps_the_best_and_changes_nothing(scenes: Path, tmp_path: Path) -> None:
    plain = make_trainer(scenes, tmp_path / "plain")
    plain.run()
    validation = Scripted(1.0, 3.0, 2.0, 3.0)
    trainer = validated(scenes, tmp_path / "run", validation)
    trainer.run()
    assert validation.kept == [3, 6, 10]  # of equals the last
    assert validation.training == {False} and trainer.model.training
    assert_same_bits(weights(trainer), weights(plain))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 8, 9, 10, 10]
    figures = [(line["step"], line["figure"]) for line in lines if "figure" in line]
    assert figures == [(3, 1.0), (6, 3.0), (9, 2.0), (10, 3.0)]
    assert [line for line in lines if "figure" not in line] == trainer.log.rows
    # An interrupted run knows the best so far, and a run may be validated or not.
    with pytest.raises(KeyboardInterrupt):
        validated(scenes, tmp_path / "again", Scripted(5.0, 4.0), Interrupted(7)).run()
    again = Scripted(4.5, 6.0)
    validated(scenes, tmp_path / "again", again).run()
    assert again.kept == [10]
    assert make_trainer(scenes, tmp_path / "again").step == 10
    # A finished run that had no validation at its end gets one, once.
    for late, wanted in ((Scripted(2.0), [10]), (Scripted(), [])):
        trainer = validated(scenes, tmp_path / "plain", late)
        trainer.run()
        assert late.kept == wanted
        assert_same_bits(weights(trainer), weights(plain))


def test_float16_resumes_to_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    whole = make_trainer(scenes, tmp_path / "whole", amp="float16")
    whole.run()
    again = resume(scenes, tmp_path / "again", 7, amp="float16")
    assert_same_bits(weights(again), weights(whole))
    assert again.scaler.state_dict() == whole.scaler.state_dict()


def test_draws_from_global_generators_are_repeated_and_leave_no_trace(scenes: Path, tmp_path: Path) -> None:
    class Dropping(Interrupted):
        def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
            return {name: loss * torch.rand(()) for name, loss in super().forward(batch, seeds).items()}

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    whole = make_trainer(scenes, tmp_path / "whole", Dropping(99))
    whole.run()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(scenes, tmp_path / "again", Dropping(5)).run()
    again = make_trainer(scenes, tmp_path / "again", Dropping(99))
    again.run()
    assert_same_bits(weights(again), weights(whole))


def test_workers_change_nothing(scenes: Path, tmp_path: Path) -> None:
    alone, helped = (make_trainer(scenes, tmp_path / str(n), workers=n, steps=4) for n in (0, 2))
    assert without_times(alone.run()) == without_times(helped.run())
    assert_same_bits(weights(alone), weights(helped))


def test_workers_need_few_open_files(scenes: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + 40, hard))  # a batch has more tensors than that
    try:
        make_trainer(scenes, tmp_path, workers=1, steps=3, batch_size=8).run()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_checkpoints_run_no_code_on_loading(scenes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(scenes, tmp_path, amp="float16", optimizer="adamw")
    trainer.run()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert_same_bits(state["model"], weights(trainer))
    assert state["step"] == 10
    assert state["fingerprint"]["model"] == {"name": "toy", "post_nms_top_n": 3}


def test_a_finished_run_stays_finished(scenes: Path, tmp_path: Path) -> None:
    first = make_trainer(scenes, tmp_path)
    rows = first.run()
    (tmp_path / "log.csv").unlink()
    again = make_trainer(scenes, tmp_path, Interrupted(0), workers=2)
    assert again.run() == rows
    assert_same_bits(weights(again), weights(first))
    assert (tmp_path / "log.csv").exists()


def test_other_settings_are_refused(scenes: Path, tmp_path: Path) -> None:
    make_trainer(scenes, tmp_path, steps=3).run()
    with pytest.raises(
        ValueError, match=r"settings\.seed is 0 there and 7 here; settings\.steps is 3 there and 9 here"
    ):
        make_trainer(scenes, tmp_path, steps=9, seed=7)
    dataset = KittiDataset(scenes, "val", height=64)
    with pytest.raises(
        ValueError, match=r"data\.augmentation is .* data\.digest is .* data\.frames is 8 there and 2 here"
    ):
        Trainer(ToyModel(), dataset, settings(steps=3), tmp_path, CPU)
    make_trainer(scenes, tmp_path, steps=3, workers=1, checkpoint_every=1)  # these change nothing that is learned


def test_other_data_of_the_same_names_are_refused(scenes: Path, tmp_path: Path) -> None:
    """Neither goes a run on with them, nor does it count as finished."""
    copy = shutil.copytree(scenes, tmp_path / "copy")
    make_trainer(scenes, tmp_path / "run", steps=3).run()
    assert make_trainer(copy, tmp_path / "run", steps=3).step == 3
    label = find_frames(copy, "train")[5].label
    assert label is not None
    label.write_text(label.read_text() + label.read_text())
    with pytest.raises(
        ValueError, match=r"holds a run with other settings: data\.digest is '\w+' there and '\w+' here"
    ):
        make_trainer(copy, tmp_path / "run", steps=3)


def test_another_model_is_refused(scenes: Path, tmp_path: Path) -> None:
    make_trainer(scenes, tmp_path, steps=3).run()
    with pytest.raises(ValueError, match=r"(?s)checkpoint\.pt holds another model: .*head\.weight"):
        make_trainer(scenes, tmp_path, nn.Linear(2, 2), steps=3)


def test_fingerprint_is_checked(scenes: Path, tmp_path: Path) -> None:
    dataset = KittiDataset(scenes, "train")
    with pytest.raises(TypeError, match="fingerprint must hold numbers, text"):
        Trainer(ToyModel(), dataset, settings(), tmp_path, CPU, fingerprint={"model": ToyModel()})
    with pytest.raises(ValueError, match="fingerprint must not have the key 'data'"):
        Trainer(ToyModel(), dataset, settings(), tmp_path, CPU, fingerprint={"data": 1})


def test_clipping(scenes: Path, tmp_path: Path) -> None:
    free = make_trainer(scenes, tmp_path / "free", clip=None, steps=1, warm_up=0, weight_decay=0.0)
    before = weights(free)
    (row,) = free.run()
    clipped = make_trainer(scenes, tmp_path / "clipped", clip=0.01, steps=1, warm_up=0, weight_decay=0.0)
    (other,) = clipped.run()
    assert row["grad_norm"] == other["grad_norm"] > 1
    lengths = [
        torch.cat([(weights(trainer)[name] - before[name]).flatten() for name in before]).norm().item()
        for trainer in (free, clipped)
    ]
    assert lengths == pytest.approx([0.02 * row["grad_norm"], 0.02 * 0.01], rel=1e-3)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], TypeError, r"give a dict of loss terms, got \[\]"),
        ({}, TypeError, r"give a dict of loss terms, got \{\}"),
        ({"a": 1.0}, TypeError, "give scalar tensors as loss terms, got 1.0 for 'a'"),
        ({"a": torch.ones(1)}, TypeError, r"got shape \(1,\) for 'a'"),
        ({"total": torch.ones(())}, ValueError, "not name a loss term 'total'"),
    ],
)
def test_what_models_give_is_checked(
    scenes: Path, tmp_path: Path, losses: Any, error: type[Exception], message: str
) -> None:
    class Wrong(ToyModel):
        def forward(self, batch: Batch, seeds: Sequence[int]) -> Any:
            return losses

    with pytest.raises(error, match=f"model must .*{message}"):
        make_trainer(scenes, tmp_path, Wrong()).run()


def test_terms_must_stay_the_same(scenes: Path, tmp_path: Path) -> None:
    class Changing(ToyModel):
        def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
            losses = super().forward(batch, seeds)
            return losses if len(self.seen) < 3 else {"count": losses["count"]}

    with pytest.raises(ValueError, match=r"the same terms in every step, \('count', 'height'\), got \('count',\)"):
        make_trainer(scenes, tmp_path / "one", Changing()).run()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(scenes, tmp_path / "resumed", Interrupted(4)).run()
    changed = Changing()
    changed.seen = [[]] * 2
    with pytest.raises(ValueError, match="the same terms in every step"):
        make_trainer(scenes, tmp_path / "resumed", changed).run()


def test_the_bar_can_be_silent_and_nothing_warns(
    scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(scenes, tmp_path / "quiet", steps=2).run()
    assert capfd.readouterr() == ("", "")
    dataset = KittiDataset(scenes, "train", height=64)
    Trainer(ToyModel(), dataset, settings(steps=2), tmp_path / "loud", CPU, name="teaching").run()
    shown = capfd.readouterr().err
    assert "teaching" in shown and "2/2" in shown and "count=" in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
def test_on_a_gpu(scenes: Path, tmp_path: Path, amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda")
    pinned = []

    class Watching(Interrupted):
        def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
            pinned.append(batch.images.is_pinned())
            return super().forward(batch, seeds)

    whole = make_trainer(scenes, tmp_path / "whole", Watching(99), device, amp=amp, workers=1)
    rows = whole.run()
    assert all(pinned)
    assert all(value.is_cuda for value in weights(whole).values())
    with pytest.raises(KeyboardInterrupt):
        make_trainer(scenes, tmp_path / "again", Interrupted(5), device, amp=amp).run()
    again = make_trainer(scenes, tmp_path / "again", device=device, amp=amp)
    again.run()
    assert_same_bits(weights(again), weights(whole))
    if amp == "off":
        on_cpu = make_trainer(scenes, tmp_path / "cpu").run()
        assert rows[0]["total"] == pytest.approx(on_cpu[0]["total"], rel=1e-4)


def test_two_commands_do_not_train_in_one_folder(scenes: Path, tmp_path: Path) -> None:
    first, second = (make_trainer(scenes, tmp_path, seed=seed) for seed in (0, 1))
    with locked(tmp_path), pytest.raises(UserError, match="is in use by another command"):  # as while the first runs
        second.run()
    assert not list(tmp_path.iterdir())
    first.run()
    assert make_trainer(scenes, tmp_path, seed=0).step == first.step > 0
    first.run()  # it has left the folder free


def test_long_steps_are_saved_by_time(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rakd.training.trainer._SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(scenes, tmp_path, Interrupted(2), checkpoint_every=1000).run()
    assert make_trainer(scenes, tmp_path, checkpoint_every=1000).step == 2
