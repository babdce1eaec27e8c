"""Options of ``rakd train``: starting from a file, extending, validating, and files of options."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rakd.cli import main
from rakd.detector.files import load_detector
from rakd.errors import UserError
from rakd.study.results import read_run
from rakd.training.settings import TrainSettings


def options(scenes: Path, out: Path, **more: Any) -> list[str]:
    """Words of a training that takes seconds."""
    given = {"data": scenes, "out": out, "detector": "tiny", "steps": 2, "batch_size": 2, "device": "cpu"}
    given |= {"optimizer": "adamw", "learning_rate": 0.001, "warm_up": 0, **more}
    return ["train", *(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value)))]


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of two steps, validated after each; not to be written to."""
    out = tmp_path_factory.mktemp("train") / "run"
    assert main(options(scenes, out, validate_every=1)) == 0
    return out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--detector", "tiny"], ("sgd", 0.02)),
        (["--detector", "monodetr-tiny"], ("adamw", 2e-4)),
        (["--detector", "monodetr-tiny", "--optimizer", "sgd", "--learning-rate", "0.1"], ("sgd", 0.1)),
    ],
)
def test_each_family_learns_as_its_own_unless_told(
    words: list[str], expected: tuple[str, float], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[TrainSettings] = []

    def stop(_: Any, __: Any, settings: TrainSettings, *___: Any, **____: Any) -> None:
        taken.append(settings)
        raise UserError("enough")

    monkeypatch.setattr("rakd.training.trainer.Trainer", stop)
    options = ["--data", str(scenes), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["train", *options, *words]) == 2
    assert (taken[0].optimizer, taken[0].learning_rate) == expected


def test_validation_is_that_of_the_detectors_then(run: Path) -> None:
    figures = {row["step"]: row["car_3d_moderate"] for row in log(run) if "car_3d_moderate" in row}
    assert set(figures) == {1, 2}
    final = read_run(run / "result.json").precisions["official"]["3d"]["Car"][1]
    assert figures[2] == final
    best, last = (load_detector(run / name).state_dict() for name in ("best.pt", "detector.pt"))
    same = all(torch.equal(value, last[name]) for name, value in best.items())
    assert same == (figures[2] >= figures[1])


def test_without_moderate_cars_nothing_is_trained(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for file in (data / "training" / "label_2").iterdir():
        file.write_text(file.read_text().replace("Car ", "Van "))
    assert main(options(data, tmp_path / "run", validate_every=1)) == 2
    assert "validate_every: the frames to evaluate on hold no Car of moderate difficulty" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.csv").exists()


def test_a_file_of_options_comes_back(run: Path, scenes: Path, tmp_path: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    assert content["command"] == "train" and content["steps"] == 2 and content["splits"] == ["train", "val"]
    assert content["data"] == str(scenes.resolve())
    # The same again, from the file alone: the same bits.
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.json"), "--out", str(again)]) == 0
    assert json.loads((again / "config.json").read_text()) == {**content, "out": str(again)}
    ours, theirs = (load_detector(out / "detector.pt").state_dict() for out in (again, run))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # The command line overrides the file, wherever the file is named.
    other = tmp_path / "other"
    words = ["train", "--steps", "1", "--no-augment", f"--config={run / 'config.json'}", "--out", str(other)]
    assert main(words) == 0
    changed = {**content, "out": str(other), "steps": 1, "augment": False}
    assert json.loads((other / "config.json").read_text()) == changed
    assert [row["step"] for row in log(other) if "total" in row] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stepz": 3, "lr": 1}', "train has no option stepz, lr; it has data, out"),
        ('{"config": "x"}', "train has no option config"),
        ('{"command": "distill"}', "holds the options of another command than train"),
        ('{"steps": ', "expected options as JSON"),
        ("[1]", "expected options by name, got list"),
        ('{"steps": "many"}', "many"),
        ('{"amp": "half"}', "half"),
        (None, "is not there: expected a file of options"),
    ],
)
def test_wrong_files_of_options_are_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.json"
    if content is not None:
        file.write_text(content)
    assert main(["train", "--data", "d", "--out", str(tmp_path / "run"), "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_refused_command_leaves_the_options_of_the_run(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    before = (copy / "config.json").read_text()
    assert main(options(scenes, copy, seed=1)) == 2
    assert "settings.seed is 0 there and 1 here" in capsys.readouterr().err
    assert (copy / "config.json").read_text() == before


def test_a_finished_run_without_its_checkpoint_is_not_trained_again(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoint.pt").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert main(options(scenes, copy, steps=4)) == 2
    assert "copy is finished, but its checkpoint.pt is gone" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("command", "other"), [("train", "distill"), ("distill", "train")])
def test_a_folder_of_another_command_is_left_alone(
    command: str, other: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.dumps({"command": other})
    (tmp_path / "config.json").write_text(content)
    words = ["--device", "cpu", "--data", str(scenes), "--out", str(tmp_path)]
    assert main([command, *words]) == 2
    assert f"--out: {tmp_path} holds what rakd {other} wrote: choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == content


def test_training_starts_from_a_file(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "detector.pt"
    tuned, plain = tmp_path / "tuned", tmp_path / "plain"
    assert main(options(scenes, plain, steps=1)) == 0
    assert main(options(scenes, tuned, steps=1, init=file)) == 0
    assert f"starts from {file}" in capsys.readouterr().out
    assert log(tuned)[0]["total"] != log(plain)[0]["total"]  # of the same frames
    assert load_detector(tuned / "detector.pt").init_source == load_detector(file).init_source
    # Nothing but the start differs: with a rate of next to nothing the weights stay the file's.
    still = tmp_path / "still"
    assert main(options(scenes, still, steps=1, init=file, learning_rate=1e-12)) == 0
    after, before = (dict(load_detector(path).named_parameters()) for path in (still / "detector.pt", file))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    # A run goes on from its own start only.
    assert main(options(scenes, tuned, steps=1)) == 2
    assert "init is" in capsys.readouterr().err


def test_a_file_that_does_not_fit_is_refused(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(scenes, tmp_path / "run", detector="tiny-expert", init=run / "detector.pt")
    assert main(words) == 2
    line = capsys.readouterr().err
    assert "detector.pt: does not fit the detector: shape of " in line and " more" in line
    assert "pyramid." in line
    assert main(options(scenes, tmp_path / "run", init=tmp_path / "none.pt")) == 2
    assert "none.pt is not there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_finished_run_is_extended(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert main(options(scenes, copy, steps=4)) == 2
    assert "steps is 2 there and 4 here; choose another folder or extend it" in capsys.readouterr().err
    # The best detector is that of the best figure, and figures on other frames do not compare.
    assert main([*options(scenes, copy, steps=4), "--extend", "--splits", "train", "train"]) == 2
    assert "evaluated_frames is " in capsys.readouterr().err
    assert (copy / "result.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("rakd.training.trainer.Trainer.run", interrupt)
        assert main([*options(scenes, copy, steps=4), "--extend"]) == 130
    assert not (copy / "result.json").exists()  # of the shorter run
    assert main([*options(scenes, copy, steps=4), "--extend"]) == 0
    assert [row["step"] for row in log(copy) if "total" in row] == [2, 4]
    assert all(torch.isfinite(value).all() for value in load_detector(copy / "detector.pt").parameters())


@pytest.mark.parametrize("command", ["train", "distill"])
@pytest.mark.parametrize("fault", ["label_2", "calib"])
def test_what_only_the_evaluation_would_find_is_told_before_the_training(
    command: str, fault: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    last = (data / "ImageSets" / "val.txt").read_text().split()[-1]
    broken = data / "training" / fault / f"{last}.txt"
    broken.write_text(broken.read_text() + "Car 0 0 x\n" if fault == "label_2" else "P2: 1 2\n")
    words = ["--device", "cpu", "--data", str(data), "--out", str(tmp_path / "run")]
    words += ["--detector", "tiny"] if command == "train" else ["--study", "tiny"]
    assert main([command, *words]) == 2
    assert str(broken) in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.csv"))


def test_a_folder_in_the_place_of_its_file(run: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(scenes, run.parent / "other", init=run)) == 2
    assert f"{run} is a folder: expected a file of weights, such as detector.pt of a run" in capsys.readouterr().err
    assert main(["distill", "--data", str(scenes), "--expert", str(run), "--out", str(run.parent / "other")]) == 2
    assert f"{run} is a folder: expected a detector, detector.pt of a run (--expert)" in capsys.readouterr().err
