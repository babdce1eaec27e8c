"""``rakd train``, ``predict`` and ``latency``: what they do with their options, and what they write."""

import csv
import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import rakd.distributed
import rakd.study.experiment
from rakd.cli import main
from rakd.commands.models import scene_size
from rakd.data.frames import find_frames
from rakd.data.kitti import resized_width
from rakd.data.labels import read_results
from rakd.detector import inference
from rakd.detector.configs import DETECTORS
from rakd.detector.files import load_detector
from rakd.distributed import Processes, choose_device


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
    assert "which is an input, would be overwritten" in capsys.readouterr().err
    assert [Path(path).read_bytes() for path in (image, calib)] == before
    labels = shutil.copytree(scenes / "training" / "label_2", tmp_path / "labels")
    options = ["--checkpoint", str(run / "detector.pt"), "--calib", str(frame.calib), "--out", str(labels)]
    assert main(["predict", str(frame.image), *options, "--no-pictures"]) == 2
    assert f"{frame.id}.txt, which holds labels, would be overwritten" in capsys.readouterr().err
    assert (labels / f"{frame.id}.txt").read_bytes() == frame.label.read_bytes()
    with_points = (
        "Car 0.00 0 0 10 10 50 35 1.5 1.6 4 1 1.5 20 0.1 90\n"  # as some converters of Waymo's data count them
    )
    (labels / f"{frame.id}.txt").write_text(with_points)
    assert main(["predict", str(frame.image), *options, "--no-pictures"]) == 2
    assert (labels / f"{frame.id}.txt").read_text() == with_points


def test_results_of_an_earlier_detector_do_not_stay(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = find_frames(scenes)[:3]
    options = ["--checkpoint", str(run / "detector.pt"), "--calib", str(frames[0].calib.parent), "--device", "cpu"]
    words = ["predict", *(str(frame.image) for frame in frames), *options, "--out", str(tmp_path / "out")]
    assert main([*words, "--no-pictures"]) == 0
    others = tmp_path / "out" / f"{frames[0].id}.png"
    others.touch()
    left = [frames[0].id]

    def killed(*arguments: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return original(*arguments)

    original = inference.detect
    with monkeypatch.context() as patch:
        patch.setattr(inference, "detect", killed)
        assert main([*words, "--no-pictures"]) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{frames[0].id}.txt", others.name}
    # An image that was cut off is told before anything is detected or removed.
    cut = tmp_path / "cut.png"
    cut.write_bytes(frames[0].image.read_bytes()[:-100])
    calib = ["--calib", str(frames[0].calib), "--checkpoint", str(run / "detector.pt"), "--device", "cpu"]
    assert main(["predict", str(frames[0].image), str(cut), *calib, "--out", str(tmp_path / "out")]) == 2
    assert "cut.png" in capsys.readouterr().err
    assert (tmp_path / "out" / f"{frames[0].id}.txt").exists()


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
