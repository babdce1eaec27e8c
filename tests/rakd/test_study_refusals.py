"""What an experiment refuses before it trains, and runs that it does not set beside each other."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_study_options import run
from test_study_run import CPU, TRAINING, Finished, bare, detectors, finished, forbid_work, settings  # noqa: F401

from rakd.commands.distill import Distill
from rakd.detector.configs import DETECTORS
from rakd.detector.files import save_detector
from rakd.errors import UserError
from rakd.files import write_text
from rakd.study.experiment import Experiment
from rakd.study.report import _provenance
from rakd.study.settings import STUDIES

pytestmark = pytest.mark.usefixtures("bare")

_DRAW = Experiment._draw_frames  # which the fixture leaves out


def test_apprentices_of_another_expert_are_not_taken(finished: Finished, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    out = shutil.copytree(finished.out, tmp_path / "run")
    shutil.rmtree(out / "expert-seed0")
    shutil.rmtree(out / "rakd-seed0")
    other = {"expert_training": replace(TRAINING, steps=1)}
    run(scenes, out, other)
    shutil.rmtree(out / "rakd-seed0")
    shutil.copytree(finished.out / "rakd-seed0", out / "rakd-seed0")
    with pytest.raises(ValueError, match=r"rakd-seed0 holds a run taught by another expert than expert-seed0 now is"):
        run(scenes, out, other)
    shutil.rmtree(out / "rakd-seed0")
    write_text(out / "rakd-seed0" / "expert.txt", "of a run that was killed before its first checkpoint")
    run(scenes, out, other)


def test_a_finished_run_is_never_trained_again(finished: Finished, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("expert-seed0", "rakd-seed0"):
        out = shutil.copytree(finished.out, tmp_path / name)
        (out / name / "checkpoint.pt").unlink()
        result = (out / name / "result.json").read_bytes()
        with pytest.raises(ValueError, match=rf"{name} is finished, but its checkpoint\.pt is gone"):
            run(scenes, out)
        assert (out / name / "result.json").read_bytes() == result


def test_jobs_look_at_finished_experts_first(
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "run")
    monkeypatch.setattr("rakd.study.experiment.run_side_by_side", lambda *_: pytest.fail("nothing is to be trained"))
    changes = {"methods": ("none", "pkd"), "expert_training": replace(TRAINING, steps=5)}
    with pytest.raises(ValueError, match=r"expert-seed0 .*steps is 3 there and 5 here"):
        run(scenes, out, changes, jobs=2)


@pytest.mark.parametrize("case", ["regions", "init", "expert"])
def test_what_fits_not_is_told_before_anything_is_trained(
    case: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_work(monkeypatch)
    changes: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if case == "regions":
        changes, message = {"regions": "expert"}, "regions: .*expert"
    else:
        name = "mini-expert" if case == "init" else "monodetr-tiny"
        file = tmp_path / "other.pt"
        other = replace(DETECTORS[name], height=64) if case == "expert" else DETECTORS[name]
        save_detector(file, other.without_download().build())
        options = {case: file}
        message = r"other\.pt" if case == "init" else "expert"
    with pytest.raises(ValueError, match=message):
        run(scenes, tmp_path / "run", changes, **options)
    assert not list(tmp_path.glob("run/*/checkpoint.pt"))


def test_a_refused_command_leaves_its_folder_free(scenes: Path, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.pt", tmp_path / "wrong.pt"
    save_detector(right, DETECTORS["mini-expert"].without_download().build())
    save_detector(wrong, DETECTORS["monodetr-tiny"].without_download().build())
    with pytest.raises(ValueError, match="expert"):
        run(scenes, tmp_path / "run", expert=wrong)
    assert [one.method for one in run(scenes, tmp_path / "run", expert=right).runs] == ["expert", "none", "rakd"]
    with pytest.raises(ValueError, match="holds a run with other settings: expert is"):
        run(scenes, tmp_path / "run", expert=wrong)


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("rakd", "backend", "triton", "options of rakd: backend: 'triton'"),
        ("pkd", "canonical_size", 56.0, "options of pkd: canonical_size does nothing in pkd"),
        ("mgd", "seed", 3, "options of mgd: seed is the networks' or the training's: leave it out"),
        ("rakd", "expert_strides", [4, 8], "options of rakd: expert_strides is the networks'"),
    ],
)
def test_options_that_cannot_work_are_told_before_anything_is_trained(
    method: str, option: str, value: Any, message: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_work(monkeypatch)
    with pytest.raises(UserError, match=message):
        changed = {"methods": ("none", method), "options": {method: {option: value}}, "weights": {method: 1.0}}
        run(scenes, tmp_path / "run", changed)


def test_a_distillation_loss_that_is_not_finite_is_an_error_in_one_line(
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="the distillation loss is not finite"):
        run(scenes, tmp_path / "run", {"weights": {"rakd": 1e300}}, expert=finished.out / "expert-seed0/detector.pt")


def test_images_that_are_too_wide_are_told_before_anything_is_trained(scenes: Path, tmp_path: Path) -> None:
    data = shutil.copytree(scenes, tmp_path / "data")
    (frame, *_) = (data / "ImageSets" / "val.txt").read_text().split()
    file = data / "training" / "image_2" / f"{frame}.png"
    Image.new("RGB", (1000, 100)).save(file)
    with pytest.raises(ValueError, match=rf"{frame}\.png: too wide for the detector: resized from 1000 x 100 .* 640"):
        Experiment(settings(), data, tmp_path / "run", CPU, quiet=True)


def test_pictures_and_names_of_what_is_there(
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "run", ignore=shutil.ignore_patterns("detections"))
    drawn: list[list[str]] = []
    monkeypatch.setattr("rakd.study.experiment.draw_frames", lambda path, frames, models: drawn.append(list(models)))
    monkeypatch.chdir(scenes)
    own = Experiment(settings(), Path(), out, CPU, quiet=True)
    assert own.run().data.startswith("small: 8 frames")
    _DRAW(own)
    (out / "none-seed0" / "detections").mkdir()
    _DRAW(own)
    assert drawn == [["apprentice alone"]]


def test_the_report_tells_what_runs_started_from_and_which_went_on(
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
) -> None:
    start = shutil.copytree(finished.out, tmp_path / "first runs")
    text = _provenance(run(scenes, tmp_path / "run", init=start))
    assert "Detectors started from: those in first runs." in text and "Backbones started from" not in text
    file = tmp_path / "run" / "none-seed0" / "detector.pt"
    text = _provenance(run(scenes, tmp_path / "other", {"methods": ("none",)}, init=file))
    assert "Apprentices started from: none-seed0/detector.pt." in text and "Detectors started from" not in text
    assert "Backbones started from: expert random weights." in text
    text = _provenance(run(scenes, start, {"training": replace(TRAINING, steps=3)}, extend=True))
    assert "Runs that went on to more steps than they were made for: none-seed0, rakd-seed0." in text
    assert "Backbones started from: " in text and "Detectors started from" not in text


def test_options_that_do_nothing_are_told(tmp_path: Path) -> None:
    write_text(tmp_path / "expert.pt", "")
    command = Distill(
        expert=tmp_path / "expert.pt",
        expert_steps=3,
        steps=20,
        methods=("none", "rakd"),
        weight=("mgd=3", "rakd=2", "5"),
        option=("pkd.nothing=1",),
    )
    own = settings(methods=("none", "rakd"), options={"pkd": {"nothing": 1}}, training=replace(TRAINING, warm_up=30))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        command._warn(own)
    texts = [str(warning.message) for warning in told]
    assert texts == [
        "warm_up: the learning rate rises over 30 steps and the training has 2: it ends before its height",
        "--expert-steps does nothing with --expert, which is trained already",
        "--weight does nothing for mgd, not among --methods",
        "--option does nothing for pkd, not among --methods",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Distill()._warn(STUDIES["scenes"])
