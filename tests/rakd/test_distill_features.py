"""``rakd distill-features``: it learns, it resumes to the same bits, it says what is wrong."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rakd.cli import main
from rakd.detector.pyramid import Pyramid
from rakd.distill.features import FeatureDistillation, FeatureTrainer, Outcome, object_boxes

CPU = torch.device("cpu")


def settings(scenes: Path, **options: Any) -> FeatureDistillation:
    small = {"weights": "random", "height": 32, "steps": 4, "expert": "resnet18", "split": "train", **options}
    return FeatureDistillation(data=str(scenes), **small)


def test_the_loss_falls(scenes: Path, tmp_path: Path) -> None:
    outcome = FeatureTrainer(settings(scenes, steps=15), tmp_path, CPU).run()
    assert len(outcome.steps) == 15
    assert outcome.ratio > 2
    rows = list(csv.DictReader((tmp_path / "loss.csv").open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(outcome.steps, rel=1e-6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["times_fallen"] == outcome.ratio
    assert "random weights" in summary["expert_started_from"]
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size[0] > 600
    state = torch.load(tmp_path / "apprentice.pt", weights_only=True)
    Pyramid("resnet18", "random", 9).load_state_dict(state)


def test_the_expert_never_changes(scenes: Path, tmp_path: Path) -> None:
    trainer = FeatureTrainer(settings(scenes), tmp_path, CPU)
    trainer.run()
    after = {k: v.clone() for k, v in trainer.expert.state_dict().items()}
    longer = FeatureTrainer(settings(scenes, steps=4), tmp_path / "again", CPU)
    longer.expert.load_state_dict(after)
    assert all(not p.requires_grad for p in trainer.expert.parameters())
    trainer._step(0)
    assert all(torch.equal(v, after[k]) for k, v in trainer.expert.state_dict().items())


def test_an_interrupted_run_resumes_to_the_same_bits(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FeatureTrainer(settings(scenes), tmp_path / "whole", CPU, checkpoint_every=2)
    expected = whole.run()

    original = FeatureTrainer._step

    def killed(self: FeatureTrainer, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(FeatureTrainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        FeatureTrainer(settings(scenes), tmp_path / "killed", CPU, checkpoint_every=2).run()
    monkeypatch.undo()
    trainer = FeatureTrainer(settings(scenes), tmp_path / "killed", CPU, checkpoint_every=2)
    assert trainer.resumed
    assert len(trainer.losses) == 2
    outcome = trainer.run()
    assert outcome == expected
    state, other = trainer.apprentice.state_dict(), whole.apprentice.state_dict()
    assert all(torch.equal(state[k], other[k]) for k in other)
    assert not [p for p in (tmp_path / "killed").iterdir() if p.name.startswith(".")]


def test_another_run_in_the_folder_is_refused(scenes: Path, tmp_path: Path) -> None:
    FeatureTrainer(settings(scenes, steps=1), tmp_path, CPU).run()
    with pytest.raises(ValueError, match=r"other settings: \{'steps': 1\}"):
        FeatureTrainer(settings(scenes, steps=2), tmp_path, CPU)


def test_nan_stops_and_names_the_frames(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureTrainer, "_loss", lambda self, batch: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match=r"the loss is nan in step 0: frames \d{6}, \d{6}"):
        FeatureTrainer(settings(scenes), tmp_path, CPU).run()


def test_dontcare_regions_are_no_objects(scenes: Path, tmp_path: Path) -> None:
    trainer = FeatureTrainer(settings(scenes), tmp_path, CPU)
    batch = trainer._batch(trainer.frames[:2])
    boxes = object_boxes(batch)
    for rows, sample in zip(boxes, batch.samples, strict=True):
        assert sample.objects is not None
        assert len(rows) == sum(kind != "DontCare" for kind in sample.objects.types)


def test_settings_are_checked(scenes: Path) -> None:
    for name, value in (("steps", 0), ("height", 0), ("batch_size", -1), ("seed", -1), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=name):
            settings(scenes, **{name: value})


def test_command(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["distill-features", "--data", str(scenes), "--weights", "random", "--height", "32", "--steps", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "expert: resnet50, random weights" in printed
    assert "times lower" in printed
    assert main(["distill-features", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "b")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_outcome_ratio() -> None:
    assert Outcome([1.0], 6.0, 2.0).ratio == 3.0
    assert Outcome([1.0], 6.0, 0.0).ratio == float("inf")
