"""``rakd train``, ``predict``, ``latency`` and ``distill``: what they do with their options, and what they write."""

import csv
import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import rakd.distributed
import rakd.study.experiment
from rakd.cli import main
from rakd.commands import distill as distill_module
from rakd.commands.models import scene_size
from rakd.data.frames import find_frames
from rakd.data.kitti import resized_width
from rakd.data.labels import read_results
from rakd.detector.configs import DETECTORS
from rakd.detector.files import load_detector
from rakd.distill.registry import METHODS
from rakd.distributed import Processes, choose_device
from rakd.study.results import StudyResult
from rakd.study.settings import STUDIES, StudySettings


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training."""
    out = tmp_path_factory.mktemp("train") / "run"
    assert main(train(scenes, out)) == 0
    return out


def train(scenes: Path, out: Path) -> list[str]:
    options = {"data": scenes, "out": out, "detector": "tiny", "steps": 2, "batch-size": 2, "device": "cpu"}
    options |= {"optimizer": "adamw", "learning-rate": 0.001}
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_train(run: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in run.iterdir()} == {
        "checkpoint.pt",
        "log.csv",
        "log.jsonl",
        "detector.pt",
        "detections",
        "result.json",
        "config.json",
    }
    assert load_detector(run / "detector.pt").config == DETECTORS["tiny"]
    frames = [frame.id for frame in find_frames(scenes, "val")]
    assert sorted(path.stem for path in (run / "detections").iterdir()) == sorted(frames)
    before = (run / "log.csv").read_text()
    # Done is done: the same again only evaluates.
    assert main(train(scenes, run)) == 0
    assert (run / "log.csv").read_text() == before
    text = capsys.readouterr().out
    assert "tiny: random weights" in text
    assert "R40" in text and "R11" in text
    assert main([*train(scenes, run), "--seed", "1"]) == 2
    captured = capsys.readouterr().err
    assert "settings.seed is 0 there and 1 here" in captured
    assert "warm_up: the learning rate rises over 500 steps and the training has 2" in captured


@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_leaves_the_training_before_the_evaluation(
    rank: int, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[set[str]] = []

    @contextmanager
    def start(device: str) -> Iterator[Processes]:
        yield Processes(torch.device(device), rank)
        assert len(there) == 1

    monkeypatch.setattr(rakd.distributed, "start_processes", start)
    monkeypatch.setattr(rakd.distributed, "barrier", lambda _: there.append({path.name for path in tmp_path.iterdir()}))
    assert main(train(scenes, tmp_path)) == 0
    written = {"checkpoint.pt", "log.csv", "log.jsonl"}
    assert there == [written if rank else written | {"detector.pt", "detections", "result.json", "config.json"}]


def test_predict(run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = find_frames(scenes, "val")
    arguments = ["predict", *(str(frame.image) for frame in frames), "--checkpoint", str(run / "detector.pt")]
    arguments += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--calib", str(frames[0].calib.parent), "--min-score", "0"]) == 0
    text = capsys.readouterr().out
    expected = {f"{frame.id}{suffix}" for frame in frames for suffix in (".png", ".txt")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    for frame in frames:
        # The same detections as after training, whose frames are read in another way.
        written = (tmp_path / "out" / f"{frame.id}.txt").read_text()
        assert written == (run / "detections" / f"{frame.id}.txt").read_text()
        count = len(read_results(tmp_path / "out" / f"{frame.id}.txt"))
        assert f"{frame.image}: {count} objects, {count} of them with a score of 0 or more" in text
        with Image.open(tmp_path / "out" / f"{frame.id}.png") as picture:
            assert picture.size[0] > 400
    assert main([*arguments, "--calib", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not there: expected a calibration file" in capsys.readouterr().err
    # A folder of images is all of its images.
    images = tmp_path / "images"
    images.mkdir()
    for frame in frames:
        shutil.copy(frame.image, images)
    (images / "notes.txt").touch()
    (images / f"._{frames[0].image.name}").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves on other file systems
    arguments = ["predict", str(images), "--checkpoint", str(run / "detector.pt"), "--out", str(tmp_path / "again")]
    options = ["--calib", str(frames[0].calib.parent), "--device", "cpu", "--no-pictures"]
    assert main([*arguments, *options]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {f"{frame.id}.txt" for frame in frames}
    for frame in frames:
        name = f"{frame.id}.txt"
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_predict_overwrites_no_input(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = find_frames(scenes)[0]
    image, calib = shutil.copy(frame.image, tmp_path), shutil.copy(frame.calib, tmp_path)
    before = [Path(path).read_bytes() for path in (image, calib)]
    options = [
        "--checkpoint",
        str(run / "detector.pt"),
        "--calib",
        str(tmp_path),
        "--out",
        str(tmp_path / "x" / ".."),
    ]
    assert main(["predict", str(image), *options]) == 2
    assert "out must be another folder" in capsys.readouterr().err
    assert [Path(path).read_bytes() for path in (image, calib)] == before


def test_predict_wants_a_detector(run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = find_frames(scenes)[0]
    arguments = ["predict", str(frame.image), "--calib", str(frame.calib), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--checkpoint", str(run / "checkpoint.pt")]) == 2
    assert "checkpoint.pt: expected the format 'rakd weights 1'" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no image")
    arguments[1] = str(tmp_path / "text.png")
    assert main([*arguments[:-4], "--out", str(tmp_path / "o"), "--checkpoint", str(run / "detector.pt")]) == 2
    assert "text.png: cannot be read as an image" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["wide", "missing", "calibration"])
def test_predict_says_what_is_wrong_with_the_last_image_before_it_begins(
    fault: str, run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = find_frames(scenes)[0]
    calib, last = tmp_path / "calib", tmp_path / "last.png"
    calib.mkdir()
    for name in (f"{frame.id}.txt", "last.txt"):
        shutil.copy(frame.calib, calib / name)
    shutil.copy(frame.image, last)
    if fault == "wide":
        Image.new("RGB", (1000, 250)).save(last)
        message = (
            f"{last}: too wide for the detector: resized from 1000 x 250 pixels to its height, 128, it is 512 wide; "
            "expected at most 448"
        )
    elif fault == "missing":
        last.unlink()
        message = f"{last} is not there: expected an image"
    else:
        shutil.copy(frame.image, calib / "last.txt")
        message = f"{calib / 'last.txt'}: not a text file"
    arguments = ["predict", str(frame.image), str(last), "--calib", str(calib), "--device", "cpu"]
    assert main([*arguments, "--checkpoint", str(run / "detector.pt"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latency(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "latency.csv"
    names = ["tiny", str(run / "detector.pt")]
    assert main(["latency", *names, "--repeats", "2", "--device", "cpu", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["detector", "runs", "image"]
    assert [line.split()[0] for line in lines[1:3]] == names
    assert "448 x 128" in lines[1]
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["detector"] for row in rows] == names
    # One architecture, once with random weights and once from a file.
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert all(row["size"] == "448x128" and float(row["median_ms"]) > 0 for row in rows)
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["runs"] for row in rows} == {"eager"}


def test_scenes_fit_into_every_named_detector() -> None:
    detectors = [SimpleNamespace(config=DETECTORS[name]) for name in ("tiny", "kitti-r18", "waymo-r18")]
    assert scene_size(detectors[:2]) == (1242, 375)
    width, height = scene_size(detectors)
    assert resized_width((width, height), 512) <= 768 and (width, height) == (562, 375)


def test_latency_takes_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["latency", "tiny", "--repeats", "1", "--device", "cpu"]) == 2
    assert "expected one process, got one of several that torchrun started" in capsys.readouterr().err


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
        "--weight": ["0.5", "--weight", "rakd=2", "--weight=pkd=3"],
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
    assert settings.weights == {**dict.fromkeys(METHODS, 0.5), "rakd": 2.0, "pkd": 3.0}
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight", "rakd=x"], "--weight: expected a number or METHOD=number, got 'rakd=x'"),
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


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device: .*torch finds no CUDA device; got cuda"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("fault", ["image", "cut", "label", "calib", "wide"])
def test_broken_files_are_one_line_from_any_process(
    fault: str, workers: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(scenes, tmp_path / "data")
    folder = data / "training"
    image, label, calib = (folder / name for name in ("image_2/000006.png", "label_2/000006.txt", "calib/000006.txt"))
    message = f"{image}: cannot be read as an image"
    if fault == "image":
        image.write_text("no image")
    elif fault == "cut":
        image.write_bytes(image.read_bytes()[:3000])
    elif fault == "label":
        label.write_text("Car 0 0\n")
        message = f"{label}:1: expected 15 columns, got 3"
    elif fault == "calib":
        calib.write_text("P3: 1\n")
        message = f"{calib}: expected a line 'P2: <12 numbers>'"
    else:
        Image.new("RGB", (1000, 100)).save(image)
        message = f"{image}: too wide for the detector: resized from 1000 x 100 pixels to its height, 128, it is 1280"
    options = ["--workers", workers, "--batch-size", "8", "--warm-up", "0"]
    before = set(multiprocessing.active_children())
    assert main([*train(data, tmp_path / "run"), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rakd: ")]
    assert line.startswith(f"rakd: error: {message}")
    assert len(line) < 400 and "Traceback" not in line
    # Processes that load have ended with the command: the garbage collector would wait ten seconds for them.
    assert set(multiprocessing.active_children()) <= before


def test_train_stops_where_nothing_can_be_learned(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(scenes, tmp_path / "data")
    for path in (data / "training" / "label_2").iterdir():
        path.write_text(path.read_text().replace("Car", "automobile").replace("Cyclist", "bike").replace("Ped", "Qed"))
    assert main([*train(data, tmp_path / "run"), "--steps", "1000000", "--warm-up", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the 8 frames holds an object to learn (Car, Pedestrian or Cyclist with a 3D box" in line
    assert "automobile (" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_trained_detectors_can_be_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.split()[0] == "run"
    assert "AP 3D Car, IoU 0.7/0.5" in text and "AP BEV Car, IoU 0.5/0.25" in text and "recall all, %" in text
