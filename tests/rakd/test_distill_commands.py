"""Options of ``rakd distill``: the study that they ask for, and what is told before anything is done."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rakd.distributed
import rakd.study.experiment
from rakd.cli import main
from rakd.commands import distill as distill_module
from rakd.data.frames import find_frames
from rakd.distill.registry import METHODS
from rakd.study.results import StudyResult
from rakd.study.settings import STUDIES, StudySettings


class FakeExperiment:
    """Notes what it was asked to do."""

    asked: tuple[StudySettings, Path, Path, dict[str, Any]]

    def __init__(self, settings: StudySettings, data: Path, out: Path, processes: Any, **options: Any) -> None:
        FakeExperiment.asked = (settings, data, out, options)

    def run(self) -> StudyResult:
        return StudyResult(runs=())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> type[FakeExperiment]:
    monkeypatch.setattr(rakd.study.experiment, "Experiment", FakeExperiment)
    return FakeExperiment


def test_distill_hands_its_options_on(
    asked: type[FakeExperiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_module, "find_spec", lambda package: package)
    expert = tmp_path / "e.pt"
    expert.touch()
    options = {
        "--data": ["d"],
        "--out": [str(tmp_path)],
        "--splits": ["a", "b"],
        "--methods": ["rakd", "none"],
        "--seeds": ["3", "1"],
        "--expert": [str(expert)],
        "--expert-steps": ["7"],
        "--batch-size": ["6"],
        "--steps": ["5"],
        "--weight": ["0.5", "--weight", "rakd=2", "--weight=pkd=3", "--weight=hfa=auto:30"],
        "--learning-rate": ["0.25"],
        "--amp": ["float16"],
        "--workers": ["1"],
        "--validate-every": ["4"],
        "--photometric": ["0.75"],
        "--rescale": ["no"],
        "--jobs": ["3"],
        "--init": [str(tmp_path / "other")],
        "--extend": [],
        "--feature-cache": ["0.5"],
        "--regions": ["objects"],
        "--device": ["cpu"],
    }
    assert main(["distill", *(word for name, words in options.items() for word in (name, *words))]) == 0
    settings, data, out, others = asked.asked
    base = STUDIES["scenes"]
    assert (data, out) == (Path("d"), tmp_path)
    assert others == {
        "expert": expert,
        "splits": ("a", "b"),
        "jobs": 3,
        "init": tmp_path / "other",
        "extend": True,
        "cache_bytes": 2**29,
        "onnx": True,
    }
    assert (settings.methods, settings.seeds, settings.regions) == (("rakd", "none"), (3, 1), "objects")
    assert (settings.expert_training.steps, settings.training.steps) == (7, 5)
    assert (settings.expert_training.batch_size, settings.training.batch_size) == (6, 6)
    assert settings.weights == {**dict.fromkeys(METHODS, 0.5), "rakd": 2.0, "pkd": 3.0, "hfa": "auto:30"}
    assert base.rescale and (settings.photometric, settings.rescale) == (0.75, False)
    for training in (settings.expert_training, settings.training):
        assert (training.learning_rate, training.amp) == (0.25, "float16")
        assert (training.workers, training.validate_every) == (1, 4)
    assert settings.training.optimizer == base.training.optimizer
    # The same again from the file of options, with one of them overridden; of weights the last counts. A package for
    # ONNX is missing.
    monkeypatch.setattr(distill_module, "find_spec", lambda package: None if package == "onnxscript" else package)
    words = ["--config", str(tmp_path / "config.json"), "--steps", "9", "--weight", "rakd=4"]
    assert main(["distill", *words]) == 0
    again, *rest = asked.asked
    assert rest == [Path("d").resolve(), out, others | {"onnx": False}]
    assert again == replace(
        settings, training=replace(settings.training, steps=9), weights={**settings.weights, "rakd": 4.0}
    )


def test_shares_of_the_task_loss_fit_maps_of_any_scale(asked: type[FakeExperiment], tmp_path: Path) -> None:
    words = ["distill", "--study", "kitti", "--data", "d", "--out", str(tmp_path)]
    assert main([*words, "--rescale", "yes"]) == 0
    settings = asked.asked[0]
    assert settings.rescale is True and settings.weights == dict.fromkeys(METHODS, "auto:10")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight", "rakd=x"], "--weight: expected [METHOD=]NUMBER or [METHOD=]auto:NUMBER, got 'rakd=x'"),
        (["--weight", "rakd=auto:0"], "weights must be numbers or such as 'auto:10', got 'auto:0' for rakd"),
        (["--weight", "rkd=1"], "--weight: expected one of pkd, semckd, "),
        (["--weight", "rakd=-1"], "weights must be positive, got -1.0 for rakd"),
        (["--weight", "nan"], "weights must be positive, got nan for"),
        (["--rescale", "no"], "weights must hold one for each method, pkd, rakd lack one: --weight METHOD=W"),
        (["--rescale", "no", "--weight", "rakd=1"], "weights must hold one for each method, pkd lack one"),
        (["--methods", "rakd", "fgd_attention"], "weights must hold one for each method, fgd_attention lack one"),
        (["--steps", "0"], "steps must be 1 or more, got 0"),
        (["--photometric", "2"], "photometric must lie in 0..1, got 2"),
        (["--feature-cache", "-1"], "--feature-cache: expected 0 or a number of GiB, got -1.0"),
        (
            ["--feature-cache", "1", "--photometric", "0.5"],
            "feature_cache: expected images that mirroring alone varies",
        ),
        (["--jobs", "0"], "jobs must be 1 or more, got 0"),
        (["--init", "nowhere.pt"], "nowhere.pt is not there: expected a detector to start from (init)"),
    ],
)
def test_wrong_options_of_distill_are_told_before_anything_is_done(
    words: list[str], message: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["distill", "--data", str(scenes), "--out", str(out), "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_distill_looks_for_the_expert_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--out", str(tmp_path / "run"), "--expert", str(tmp_path / "none.pt")]) == 2
    assert "(--expert)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_distill_without_options_is_the_named_study(
    asked: type[FakeExperiment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, study in STUDIES.items():
        assert main(["distill", "--study", name, "--data", "d", "--out", str(tmp_path), "--device", "cpu"]) == 0
        assert asked.asked[0] == study
        told = f"--study {name} as it stands takes {study.takes}"
        assert (told in capsys.readouterr().out) == bool(study.takes)
    assert STUDIES["scenes"].takes and STUDIES["scenes-long"].takes


@pytest.mark.parametrize("study", [name for name, study in STUDIES.items() if study.goes_on_from])
def test_distill_tells_of_a_study_that_goes_on_from_another(
    study: str, asked: type[FakeExperiment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", "--study", study, "--data", "d", "--out", str(tmp_path), "--device", "cpu"]
    told = f"{study} without --init starts anew; its table goes on from the networks of scenes-resolution"
    assert main(words) == 0
    assert told in capsys.readouterr().err
    assert main([*words, "--init", str(tmp_path)]) == 0
    assert told not in capsys.readouterr().err


def test_distill_renders_what_it_learns_from(
    asked: type[FakeExperiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(distill_module.STUDIES, "tiny", replace(STUDIES["tiny"], scenes=2))
    words = ["distill", "--study", "tiny", "--out", str(tmp_path), "--device", "cpu"]
    assert main(words) == 0
    assert "learning from 2 rendered street scenes" in capsys.readouterr().out
    assert asked.asked[1] == tmp_path / "scenes"
    assert len(find_frames(tmp_path / "scenes", "train")) == 1
    manifest = json.loads((tmp_path / "scenes" / "scenes.json").read_text())
    # Again: nothing is rendered over.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes" / "training").rglob("*.png")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert json.loads((tmp_path / "scenes" / "scenes.json").read_text()) == manifest
    # Another number would be refused after the rendering, and these runs could not go on.
    (tmp_path / "none-seed0").mkdir()
    (tmp_path / "none-seed0" / "checkpoint.pt").touch()
    monkeypatch.setitem(distill_module.STUDIES, "tiny", replace(STUDIES["tiny"], scenes=3))
    assert main(words) == 2
    assert "holds runs on 2 rendered scenes, --study tiny takes 3; choose another folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list((tmp_path / "scenes" / "training").rglob("*.png"))) == 2


def test_distill_tells_of_a_missing_package_before_it_renders(
    asked: type[FakeExperiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["distill", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert "timm is not installed; run: pip install 'rakd[pretrained]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
