"""``rakd distill-features``: it learns, it resumes to the same bits, it says what is wrong."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rakd.cli import main
from rakd.data.kitti import collate
from rakd.detector.pyramid import Pyramid
from rakd.distill.features import FeatureDistillation, FeatureModel, FeatureRun, Outcome, object_boxes

CPU = torch.device("cpu")


def settings(scenes: Path, **options: Any) -> FeatureDistillation:
    small = {"weights": "random", "height": 32, "steps": 4, "expert": "resnet18", "split": "train", **options}
    return FeatureDistillation(data=str(scenes), **small)


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureRun, Outcome]:
    """A run of 15 steps, done."""
    run = FeatureRun(settings(scenes, steps=15), tmp_path_factory.mktemp("features"), CPU)
    return run, run.run()


def test_the_loss_falls(finished: tuple[FeatureRun, Outcome]) -> None:
    run, outcome = finished
    assert len(outcome.steps) == 15
    assert outcome.ratio > 2
    rows = list(csv.DictReader((run.out / "log.csv").open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(outcome.steps, rel=1e-6)
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["times_fallen"] == outcome.ratio
    assert "random weights" in summary["expert_started_from"]
    with Image.open(run.out / "loss.png") as picture:
        assert picture.size[0] > 600
    state = torch.load(run.out / "apprentice.pt", weights_only=True)
    Pyramid("resnet18", "random", 9).load_state_dict(state)


def test_a_finished_run_gives_the_same_again(finished: tuple[FeatureRun, Outcome]) -> None:
    run, outcome = finished
    assert FeatureRun(run.settings, run.out, CPU).run() == outcome


def test_another_run_in_the_folder_is_refused(finished: tuple[FeatureRun, Outcome]) -> None:
    run, _ = finished
    with pytest.raises(ValueError, match=r"other settings: settings.steps is 15 there and 16 here"):
        FeatureRun(replace(run.settings, steps=16), run.out, CPU).run()


def test_the_expert_learns_nothing(finished: tuple[FeatureRun, Outcome]) -> None:
    run, _ = finished
    after = {k: v.clone() for k, v in run.expert.state_dict().items()}
    model = FeatureModel(run.apprentice, run.expert).train()
    model(collate([run.dataset[0]]))["loss"].backward()
    assert all(p.grad is None for p in run.expert.parameters())
    assert all(torch.equal(v, after[k]) for k, v in run.expert.state_dict().items())
    assert any(p.grad is not None for p in run.apprentice.parameters())


def test_dontcare_regions_are_no_objects(scenes: Path, tmp_path: Path) -> None:
    run = FeatureRun(settings(scenes), tmp_path, CPU)
    batch = collate([run.dataset[0], run.dataset[1]])
    boxes = object_boxes(batch)
    for rows, sample in zip(boxes, batch.samples, strict=True):
        assert sample.objects is not None
        assert len(rows) == sum(kind != "DontCare" for kind in sample.objects.types)


def test_features_are_compared_where_the_boxes_are(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FeatureRun(settings(scenes), tmp_path, CPU)
    model = FeatureModel(run.apprentice, run.expert)
    given: list[list[Tensor]] = []
    forward = model.distiller.forward

    def noting(images: Tensor, boxes: list[Tensor], features: dict[str, Tensor]) -> Tensor:
        given.append(boxes)
        return forward(images, boxes, features)

    monkeypatch.setattr(model.distiller, "forward", noting)
    batch = collate([run.dataset[0], run.dataset[1]])
    model(batch)
    for rows, sample in zip(given[0], batch.samples, strict=True):
        assert sample.objects is not None
        expected = sample.objects.boxes[~sample.objects.is_type("DontCare")] + 0.5
        torch.testing.assert_close(rows, torch.from_numpy(expected).float())


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
