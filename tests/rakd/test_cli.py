import builtins
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import rakd
import rakd_ops
from rakd import cli
from rakd.cli import main
from rakd.commands.inspect import doubtful
from rakd.commands.show import _read_predictions
from rakd.data.frames import find_frames, write_calibration
from rakd.data.labels import write_objects
from rakd.errors import MissingFileError, UserError
from rakd.evaluation.depth import DepthFigures
from rakd.geometry import box_corners, project_boxes
from rakd.study.results import RunResult, read_run, write_run
from rakd.training.loading import each_of

COMMANDS = (
    "distill",
    "train",
    "predict",
    "evaluate",
    "compare",
    "show",
    "export",
    "latency",
    "inspect",
    "make-scenes",
    "convert-waymo",
    "export-waymo",
)


@pytest.fixture(scope="module")
def results(scenes, tmp_path_factory):
    """Perfect result files for the scenes."""
    folder = tmp_path_factory.mktemp("results")
    for frame in find_frames(scenes):
        objects = frame.read_labels()
        objects = objects.select(objects.has_box_3d)
        scores = np.linspace(0.9, 0.1, len(objects))
        write_objects(folder / f"{frame.id}.txt", dataclasses.replace(objects, scores=scores), decimals=2)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: rakd {command}" in text
    assert "{None}" not in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command, one of distill, train"),
        (["nonsense"], "export-waymo; got 'nonsense'"),
        (["--nonsense"], "--nonsense"),
        (["make-scenes"], "--out"),
        (["make-scenes", "--out", "x", "--frames", "many"], "--frames"),
        (["make-scenes", "--out", "x", "--frames", "1"], "frames must be at least 2, got 1"),
        (["make-scenes", "--out", "x", "--workers", "-1"], "workers must be 0 or more, got -1"),
        (["evaluate", "nowhere", "there"], "GT: expected a folder of files NNNNNN.txt, nowhere is not there"),
        (["evaluate", "nowhere"], "PRED"),
        (["evaluate", ".", "file"], "PRED: expected a folder of files NNNNNN.txt, file is a file"),
        (["evaluate", ".", ".", "--split", "c.txt"], "c.txt is not there"),
        (["evaluate", ".", ".", "--out", "file"], "--out: expected a folder to write to, file is a file"),
        (["inspect", "--data", "nowhere"], "expected a KITTI folder"),
        (["show", "--data", "nowhere"], "expected a KITTI folder"),
        (["show", "--data", "nowhere", "--count", "0"], "count must be at least 1"),
        (["show", "--data", "nowhere", "--reach", "-1"], "reach must be positive"),
        (["show", "--data", "nowhere", "--reach", "inf"], "reach must be positive and finite, got inf"),
        (["show", "--data", "nowhere", "--min-score", "nan"], "min_score must be a finite number, got nan"),
        (["show", "--data", "nowhere", "--out", "file/a"], "--out: expected a folder to write to, file is a file"),
        (
            ["inspect", "--data", "nowhere", "--out", "a.xyz"],
            "--out: expected a picture file (.png, .pdf, .svg, ...), got",
        ),
        (["inspect", "--data", "nowhere", "--out", "file/a.png"], "--out: expected a folder to write to, file is"),
        (["show", "--data", "nowhere", "--part", "moon"], "moon"),
        (["distill", "--methods", "magic"], "magic"),
        (["distill", "--methods", "none", "none"], "methods must hold at least one and none twice"),
        (["distill", "--seeds", "1", "-1"], "seeds must be 0 or more, got (1, -1)"),
        (["distill", "--steps", "0"], "steps must be 1 or more, got 0"),
        (["distill", "--data", "nowhere"], "expected a KITTI folder"),
        (["distill", "--study", "kitti"], "--data: --study kitti needs a folder in KITTI's layout"),
        (["distill", "--out", "file"], "--out: expected a folder to write to, file is a file"),
        (["train", "--data", "nowhere", "--out", "file"], "--out: expected a folder to write to, file is a file"),
        (["train", "--out", "x"], "--data"),
        (["train", "--data", "nowhere", "--out", "x", "--steps", "-1"], "steps must be 1 or more, got -1"),
        (["train", "--data", "nowhere", "--out", "x", "--detector", "huge"], "huge"),
        (["train", "--data", "nowhere", "--out", "x"], "expected a KITTI folder"),
        (
            ["predict", "a.png", "--calib", "b.txt", "--checkpoint", "c.pt"],
            "c.pt is not there: expected a file of weights",
        ),
        (["predict", "a.png"], "--calib"),
        (["predict", ".", "--calib", "b", "--checkpoint", "c"], "IMAGE: the folder . holds no PNG or JPEG files"),
        (
            ["predict", "a.png", "--out", "file", "--calib", "b", "--checkpoint", "c"],
            "--out: expected a folder to write",
        ),
        (["predict", "a.png", "--min-score", "inf", "--calib", "b", "--checkpoint", "c"], "min_score must be a finite"),
        (["predict", "--calib", "b", "--checkpoint", "c"], "expected at least one image, got none"),
        (
            ["predict", "a.png", "b/a.jpg", "--calib", "b", "--checkpoint", "c"],
            "images must have different names, a stands",
        ),
        (["predict", "a.png", "--out", ".", "--calib", "b", "--checkpoint", "c"], "a.png, which is an input"),
        (["predict", "a.png", "--out", "b", "--calib", "b/a.txt", "--checkpoint", "c"], "a.txt, which is an input"),
        (["evaluate", ".", ".", "--json", "file/a"], "--json: expected a folder to write to, file is a file"),
        (["compare"], "expected at least one folder of a run, got none"),
        (["compare", "nowhere"], "RUN: nowhere holds no finished run: expected result.json in it or in its folders"),
        (["latency", "huge"], "DETECTOR must be one of tiny"),
        (["latency", "tiny", "--repeats", "0"], "repeats must be 1 or more, got 0"),
        (["latency", "tiny", "--forms"], "--forms: expected one or more"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("rakd: error: ")
    assert message in line
    assert not any(character in line for character in "╭│─")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"rakd {rakd_ops.__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("make_scenes.make_scenes", True), ("evaluate.evaluate", False)])
def test_interrupted_commands_say_whether_they_go_on(name, hint, scenes, results, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"rakd.commands.{name}", interrupted)
    labels = str(scenes / "training" / "label_2")
    arguments = ["make-scenes", "--out", str(tmp_path)] if hint else ["evaluate", labels, str(results)]
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"rakd: interrupted{'; repeat the command to go on' if hint else ''}\n"


def test_evaluate(scenes, results, tmp_path, capsys):
    assert main(["evaluate", str(scenes / "training" / "label_2"), str(results), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.count("Pedestrian (0.5)") == 2
    assert "R40" in text and "R11" in text
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    count = figures["Car"]["3d"]["objects"][1]
    assert figures["Car"]["3d"]["R40"][1] == pytest.approx(min(100, 100 * (count - 1) / 40))
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_evaluate_wants_labels_as_truth(results, tmp_path, capsys):
    message = "000000.txt holds results (columns 2 and 3 are -1, 16 a score), expected labels"
    truth = tmp_path / "truth"
    truth.mkdir()
    for path in results.iterdir():
        rows = [line.split() for line in path.read_text().splitlines()]
        lines = [" ".join([row[0], "-1", "-1.00", *row[3:]]) for row in rows]  # as detectors write them
        (truth / path.name).write_text("\n".join(lines) + "\n")
    for options in ([], ["--waymo"]):
        assert main(["evaluate", str(truth), str(results), *options]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_writes_json(scenes, results, tmp_path, capsys):
    arguments = ["evaluate", str(scenes / "training" / "label_2"), str(results)]
    file = tmp_path / "new" / "figures.txt"
    assert main([*arguments, "--json", str(file), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "AP R40" in text and str(file) in text
    figures = json.loads(file.read_text())
    assert figures == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert main([*arguments, "--json", "-", "--overlaps", "loose"]) == 0
    loose = json.loads(capsys.readouterr().out)
    assert (figures["overlaps"], loose["overlaps"]) == ("official", "loose")
    assert loose["Car"]["3d"]["objects"] == figures["Car"]["3d"]["objects"]
    for waymo in ([], ["--waymo"]):
        assert main([*arguments, "--json", str(tmp_path / "out"), *waymo]) == 2
        assert f"--json: expected a file, {tmp_path / 'out'} is a folder" in capsys.readouterr().err


def test_evaluate_says_when_nothing_counts(tmp_path, capsys):
    row = "{} 0 0 0.5 {} 1.5 1.6 4 1 1.7 20 0.6"
    cases = {
        "unknown": ("-1 -1 -1 -1", "10 10 90 90", "no labelled Car or Pedestrian or Cyclist counts", ""),
        "low": ("10 10 90 35", "10 10 90 90", "no labelled Car or Pedestrian or Cyclist counts", ""),
        "detections": ("10 10 90 90", "-1 -1 -1 -1", "no labelled Pedestrian or Cyclist counts", "Car counts"),
        "good": ("10 10 90 90", "10 10 90 90", "no labelled Pedestrian or Cyclist counts", ""),
    }
    for name, (truth, detection, nothing, warning) in cases.items():
        for folder, text in (("gt", row.format("Car", truth)), ("pred", row.format("Car", detection) + " 0.9")):
            (tmp_path / name / folder).mkdir(parents=True)
            (tmp_path / name / folder / "000000.txt").write_text(f"{text}\n")
        assert main(["evaluate", str(tmp_path / name / "gt"), str(tmp_path / name / "pred")]) == 0
        captured = capsys.readouterr()
        (line,) = [line for line in captured.out.splitlines() if line.startswith("Nothing to find")]
        assert f"{nothing}, so a 0 is no verdict on the detections" in line
        assert "over 25 pixels high, with occlusion 0 to 2 and truncation up to 0.5" in line
        assert ("none of the 1 detections of Car counts" in captured.err) == bool(warning), name


@pytest.fixture
def finished(tmp_path):
    """Folders of finished runs: two methods with two seeds, and one run alone."""

    def write(folder, method, seed, car, objects=7, **more):
        official = {"3d": {"Car": (0.0, car, 0.0), "Cyclist": (math.nan,) * 3}}
        image = {"bbox": {"Car": (1.0, 2.0, 3.0)}}
        depth = {"all": DepthFigures(0.125, 0.5, objects)}
        figures = RunResult(method, seed, {"official": official | image, "loose": image}, depth, **more)
        write_run(tmp_path / folder / "result.json", figures)

    write("study/rakd-seed0", "rakd", 0, 10.0, seconds=120.0)
    write("study/rakd-seed1", "rakd", 1, 13.0, seconds=240.0)
    write("study/none-seed0", "none", 0, 4.0, seconds=60.0)
    write("study/none-seed1", "none", 1, math.nan)
    write("alone", "none", 5, 30.0)
    write("other", "none", 5, 30.0, objects=8)
    return tmp_path


def test_compare(finished, capsys):
    assert (
        main(["compare", str(finished / "study"), str(finished / "alone"), str(finished / "study" / "rakd-seed1")]) == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    head, *rows, note = captured.out.splitlines()
    assert head.split() == ["study/none", "study/rakd", "alone"]
    table = {row[:27].strip(): [c for c in re.split(r"  +", row[27:].strip()) if c] for row in rows}
    assert table == {
        "seeds": ["0, 1", "0, 1", "5"],
        "AP 3D Car, IoU 0.7/0.5": ["4.00 (of 1)", "11.50 ± 2.12", "30.00"],
        "AP 3D Cyclist, IoU 0.7/0.5": table["AP 3D Cyclist, IoU 0.7/0.5"],
        # Once: boxes in the image have the official overlap alone.
        "AP BBOX Car, IoU 0.7/0.5": ["2.00 ± 0.00", "2.00 ± 0.00", "2.00"],
        "AbsRel all, %": ["12.50 ± 0.00", "12.50 ± 0.00", "12.50"],
        "recall all, %": ["50.00 ± 0.00", "50.00 ± 0.00", "50.00"],
        "training, minutes": ["1.00 (of 1)", "3.00 ± 1.41", "–"],
    }
    assert table["AP 3D Cyclist, IoU 0.7/0.5"][-3:] == ["–"] * 3
    assert "R40, percent, moderate" in note
    assert main(["compare", str(finished / "study" / "rakd-seed1")]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["rakd"]


def test_compare_says_when_runs_have_other_frames(finished, capsys):
    assert main(["compare", str(finished / "alone"), str(finished / "other")]) == 0
    assert (
        "rakd: warning: the runs were evaluated on different frames: objects to find are 7, 8"
        in capsys.readouterr().err
    )


def test_compare_says_when_runs_of_one_column_were_trained_unlike(finished, capsys):
    def write(seed, **options):
        folder = finished / f"small-seed{seed}"
        write_run(folder / "result.json", dataclasses.replace(read_run(finished / "alone" / "result.json"), seed=seed))
        (folder / "config.json").write_text(json.dumps({"command": "train", "seed": seed, **options}))
        return str(folder)

    def warned():
        assert main(["compare", *folders]) == 0
        captured = capsys.readouterr()
        assert captured.out.splitlines()[0].split() == ["small"]
        return captured.err

    folders = [write(0, steps=100, init="pre-seed0/detector.pt"), write(1, steps=100, init="pre-seed1/detector.pt")]
    assert warned() == ""
    write(1, steps=200, learning_rate=0.1)
    told = "small: the runs that are averaged are no repetitions: steps 100 and 200, learning_rate 0.1 and its own\n"
    assert told in warned()
    folders.append(write(2, steps=200, learning_rate=0.2))
    (finished / "small-seed0" / "config.json").unlink()
    assert "small: the runs that are averaged are no repetitions: learning_rate 0.1 and 0.2\n" in warned()
    folders = [write(0, steps=100), write(1, steps=100)]
    shutil.copy(finished / "study" / "rakd-seed1" / "result.json", finished / "small-seed1")
    (finished / "small-seed1" / "config.json").unlink()
    assert "small: the runs that are averaged are no repetitions: method none and rakd\n" in warned()
    shutil.copy(finished / "small-seed0" / "result.json", finished / "small-seed1")
    assert "no repetitions: seeds are not all different: 0, 0\n" in warned()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"depth": {"all": {}}}', '{"precisions": {"official": 3}}', '{"seed": 1}']
)
def test_compare_names_a_file_that_holds_no_result(text, finished, capsys):
    (finished / "alone" / "result.json").write_text(text)
    assert main(["compare", str(finished / "alone")]) == 2
    assert "alone/result.json: expected the result of a run: " in capsys.readouterr().err


def test_evaluate_a_split(scenes, results, capsys):
    arguments = ["evaluate", str(scenes / "training" / "label_2"), str(results)]
    assert main([*arguments, "--split", str(scenes / "ImageSets" / "val.txt")]) == 0
    part = capsys.readouterr().out
    assert main([*arguments, "--split", "val"]) == 0
    assert capsys.readouterr().out == part
    assert main(arguments) == 0
    assert capsys.readouterr().out != part


def test_a_linked_folder_has_the_lists_beside_the_link(scenes, results, tmp_path, monkeypatch, capsys):
    (tmp_path / "training").symlink_to(scenes / "training")
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "val").mkdir()  # no list, though it has a list's name
    monkeypatch.chdir(tmp_path)
    first = find_frames(scenes, "val")[0].id
    (tmp_path / "ImageSets" / "val.txt").write_text(f"{first}\n")
    (tmp_path / "one.txt").write_text(f"{first}\n")
    whole = str(scenes / "training" / "label_2")
    for truth, split in ((whole, "one.txt"), ("training/label_2", "val"), ("training/image_2/../label_2", "val")):
        assert main(["evaluate", truth, str(results), "--split", split, "--json", f"{split}.json"]) == 0
        assert Path(f"{split}.json").read_text() == Path("one.txt.json").read_text()


def test_other_files_beside_results_are_passed_over(scenes, results, tmp_path, capsys):
    folder = shutil.copytree(results, tmp_path / "results")
    (folder / "._000000.txt").write_bytes(b"\x00\x05\x16\x07\xb0\xff")  # as macOS leaves on other file systems
    truth = str(scenes / "training" / "label_2")
    assert main(["evaluate", truth, str(results)]) == 0
    expected = capsys.readouterr().out
    assert main(["evaluate", truth, str(folder)]) == 0
    assert capsys.readouterr().out == expected


def test_evaluate_wants_results_in_the_place_of_results(scenes, results, capsys):
    assert main(["evaluate", str(results), str(scenes / "training" / "label_2")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a score (16th column): expected results; are GT and PRED in each other's place?" in line


def test_evaluate_takes_a_detector_that_sees_nothing(scenes, tmp_path, capsys):
    for frame in find_frames(scenes):
        (tmp_path / f"{frame.id}.txt").touch()
    assert main(["evaluate", str(scenes / "training" / "label_2"), str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert " - " in text
    assert "Not evaluated (-): no detection with a 2D or 3D box is of class Car or Pedestrian or Cyclist." in text


def test_evaluate_says_where_few_objects_are_the_limit(scenes, results, tmp_path, capsys):
    assert main(["evaluate", str(scenes / "training" / "label_2"), str(results), "--out", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Few objects")]
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    # These results are perfect: what is told as the limit is what they have.
    for name in ("Car", "Pedestrian", "Cyclist"):
        for level, count, reached in zip(
            ("easy", "moderate", "hard"), figures[name]["3d"]["objects"], figures[name]["3d"]["R40"], strict=True
        ):
            part = line.partition(f"{name} ")[2].partition(";")[0]
            if 0 < count < 41:
                assert float(part.partition(f"{level} ")[2].split(",")[0].rstrip(".")) == pytest.approx(reached)
            else:
                assert level not in part


def test_evaluate_with_loose_overlaps(scenes, results, capsys):
    arguments = ["evaluate", str(scenes / "training" / "label_2"), str(results)]
    assert main([*arguments, "--overlaps", "loose"]) == 0
    assert capsys.readouterr().out.count("Pedestrian (0.25)") == 2
    assert main([*arguments, "--overlaps", "tight"]) == 2
    assert "--overlaps" in capsys.readouterr().err


def test_warnings_are_one_line(scenes, results, tmp_path, capsys):
    for path in results.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    row = "Car 0 0 0 1 1 9 9 1 1 1 1 1 9 0"
    (tmp_path / "000003.txt").write_text(f"{row}\n{row}\n")
    assert main(["evaluate", str(scenes / "training" / "label_2"), str(tmp_path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rakd: warning: ")
    assert "000003.txt:1: result rows without a score" in line


def test_show(scenes, results, tmp_path, capsys):
    out = tmp_path / "pictures"
    arguments = ["show", "--data", str(scenes), "--out", str(out), "--frames", "000004", "000002"]
    assert main([*arguments, "--pred", str(results), "--min-score", "0.3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["000002.png", "000004.png"]
    assert str(out) in capsys.readouterr().out
    # Label files serve as predictions too.
    labels = scenes / "training" / "label_2"
    assert main(["show", "--data", str(scenes), "--out", str(out), "--count", "1", "--pred", str(labels)]) == 0
    assert main(["show", "--data", str(scenes), "--out", str(out), "--frames", "000099"]) == 2
    assert "frames: 000099 is not among the 10 frames" in capsys.readouterr().err
    assert main(["show", "--data", str(scenes), "--out", str(out), "--pred", str(tmp_path)]) == 2
    assert f"--pred: {tmp_path} has no 000000.txt, the results of frame 000000" in capsys.readouterr().err
    assert main(["show", "--data", str(scenes), "--out", str(out), "--pred", str(tmp_path / "none")]) == 2
    assert "none is not a folder" in capsys.readouterr().err


def test_result_files_of_other_tools_are_no_labels(tmp_path):
    row = "Car 0 0 0 1 1 9 9 1 1 1 1 1 9 0"
    for text, scores in (
        (f"{row} 0.9 7\n", [0.9]),  # further columns are skipped
        (f"{row}\n{row} 0.5\n", [0.5]),  # a row without a score is skipped
        (f"{row} 120 2\n", None),  # convert-waymo's points and difficulty
        (f"{row}\n", None),
    ):
        (tmp_path / "000000.txt").write_text(text)
        objects = _read_predictions(tmp_path, "000000")
        assert (objects.scores is None) == (scores is None)
        assert scores is None or objects.scores.tolist() == scores


def test_show_says_what_it_leaves_out(scenes, results, tmp_path, capsys):
    arguments = ["show", "--data", str(scenes), "--out", str(tmp_path), "--count", "1", "--pred", str(results)]
    assert main([*arguments, "--min-score", "0.5"]) == 0
    count = sum(float(line.split()[15]) < 0.5 for line in (results / "000000.txt").read_text().splitlines())
    assert f"left out: {count} predictions that score less than 0.5" in capsys.readouterr().out
    assert main([*arguments, "--min-score", "0"]) == 0
    assert "left out" not in capsys.readouterr().out


def test_inspect(scenes, tmp_path, capsys):
    assert main(["inspect", "--data", str(scenes), "--out", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    text, err = capsys.readouterr()
    assert "warning" not in err
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    everything = [str(name) for frame in find_frames(scenes) for name in frame.read_labels().types]
    assert rows["Car"][3] == str(everything.count("Car"))
    assert rows["type"] == ["easy", "moderate", "hard", "all"]
    assert [int(value) for value in rows["Car"]] == sorted(int(value) for value in rows["Car"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[0] > 1500


@pytest.mark.parametrize(("count", "drawn"), [(4, [0, 2, 5, 7]), (10, list(range(10))), (7, [0, 1, 2, 4, 5, 7, 8])])
def test_drawn_frames_are_evenly_spaced(count, drawn, scenes, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr("rakd.visualize.draw_sheet", lambda path, sheet, title: sheets.append(sheet))
    assert main(["inspect", "--data", str(scenes), "--out", str(tmp_path / "a.png"), "--count", str(count)]) == 0
    assert [int(name.split()[1]) for name, *_ in sheets[0]] == drawn


def test_labels_that_cannot_be_meant_are_told(scenes, tmp_path, capsys):
    for name in ("image_2", "calib"):
        (tmp_path / "training").mkdir(exist_ok=True)
        (tmp_path / "training" / name).symlink_to(scenes / "training" / name)
    (tmp_path / "training" / "label_2").mkdir()
    corners = box_corners([[1, 1.6, 9]], [[1.5, 1.6, 4]], [1.57])
    box = project_boxes(find_frames(scenes)[0].read_calibration(), corners, (414, 125))[0]
    good = "Car 0 0 1.46 {:.0f} {:.0f} {:.0f} {:.0f} 1.5 1.6 4 1 1.6 9 1.57".format(*box)
    edges = "{2:.0f} {3:.0f} 1.5".format(*box)
    region = "DontCare -1 -1 -10 5 5 9 9 -1 -1 -1 -1000 -1000 -1000 -10"
    bad = {
        1: (good.replace("1.46", "0"), "an alpha that is not rotation_y - atan2(x, z)"),
        2: (good.replace("1.5 1.6 4 ", "-1.5 0 -4 "), "no 3D box"),
        3: (good.replace("1.57", "-99"), "an angle beyond half a turn"),
        4: (good.replace(" 1 1.6 9 1.57", " 4 1.6 9 1.57").replace("1.46", "-10"), "a 3D box whose image overlaps the"),
        5: (good.replace(edges, "1 1 1.5"), "a 2D box without area"),
        6: (good.replace(edges, "1000000 1000 1.5"), "a 2D box that leaves the image, 414 x 125 pixels"),
        7: (good.replace("1.6 9", "1.6 -9"), "a place behind the camera"),
        8: (good.replace("1.6 4 ", "1.6 4000 "), "a 3D box over 100 m in size or 1000 m away"),
        9: (good.replace("1.6 9", "1.6 1e6"), "a 3D box over 100 m in size or 1000 m away"),
    }
    for i in range(10):
        text = f"{good}\n{bad[i][0]}\n" if i in bad else f"{good}\n{region}\n"
        (tmp_path / "training" / "label_2" / f"{i:06d}.txt").write_text(text)
    assert main(["inspect", "--data", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    captured = capsys.readouterr()
    assert "10 frames, 19 labelled objects, 1 DontCare regions" in captured.out
    lines = captured.err.splitlines()
    assert len(lines) == len(bad)
    for line, (i, (_, fault)) in zip(lines, bad.items(), strict=True):
        assert line.startswith("rakd: warning: ")
        assert f"{i:06d}.txt: 1 of 2 objects: {fault}" in line


def test_objects_that_are_almost_outside_are_no_doubt_of_the_calibration(scenes):
    frame = next(frame for frame in find_frames(scenes) if len(frame.read_labels()))
    labels = frame.read_labels().select(np.arange(1))
    other = frame.read_calibration().resized(0.5, 0.5)
    for truncation, doubts in ((0.5, 1), (0.95, 0)):
        objects = dataclasses.replace(labels, truncation=np.array([truncation]))
        assert len(doubtful(objects, other, (1242, 375))) == doubts


def test_calibrations_of_other_images_are_told(scenes, tmp_path, capsys):
    for name in ("image_2", "label_2"):
        (tmp_path / "training").mkdir(exist_ok=True)
        (tmp_path / "training" / name).symlink_to(scenes / "training" / name)
    for frame in find_frames(scenes):
        file = tmp_path / "training" / "calib" / f"{frame.id}.txt"
        write_calibration(file, frame.read_calibration().resized(0.5, 0.5))
    assert main(["inspect", "--data", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == sum(len(frame.read_labels()) > 0 for frame in find_frames(scenes))
    assert all("overlaps the 2D box by less than 20%; is the calibration this frame's" in line for line in told)


def test_malformed_labels_are_told_with_file_and_line(scenes, tmp_path, capsys):
    for name in ("image_2", "calib"):
        (tmp_path / "training").mkdir(exist_ok=True)
        (tmp_path / "training" / name).symlink_to(scenes / "training" / name)
    (tmp_path / "training" / "label_2").mkdir()
    for i in range(10):
        (tmp_path / "training" / "label_2" / f"{i:06d}.txt").write_text("Car 0 0\n" if i == 7 else "")
    assert main(["inspect", "--data", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "000007.txt:1: expected 15 columns, got 3" in capsys.readouterr().err


def test_make_scenes(tmp_path, capsys):
    arguments = ["make-scenes", "--out", str(tmp_path / "out"), "--frames", "2", "--size", "207", "64"]
    assert main([*arguments, "--workers", "1"]) == 0
    assert "2 frames are in" in capsys.readouterr().out
    assert len(find_frames(tmp_path / "out", "trainval")) == 2
    capsys.readouterr()
    assert main(["make-scenes", "--out", str(tmp_path / "out"), "--frames", "3", "--size", "207", "64"]) == 0
    arguments[4] = "2"
    assert main(arguments) == 2
    assert "frames must be at least 3, which" in capsys.readouterr().err
    assert len(find_frames(tmp_path / "out", "trainval")) == 3


@pytest.mark.parametrize("missing", ["tyro", "matplotlib"])
def test_missing_extras_are_told(missing, scenes, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] in (missing, "rakd") and name != "rakd.cli"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def guarded(name, *rest, **more):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert main(["show", "--data", str(scenes), "--out", str(tmp_path), "--count", "1"]) == 2
    assert capsys.readouterr().err == f"rakd: error: {missing} is not installed; run: pip install '.[train]'\n"


def test_commands_raise_what_is_told_in_one_line():
    for path in sorted(Path(cli.__file__).parent.glob("commands/*.py")):
        names = set(re.findall(r"raise (\w+Error)\(", path.read_text(encoding="utf-8")))
        assert names <= {"UserError", "MissingFileError", "NotAFolderError"}, path.name


def run_broken(error, monkeypatch, **options):
    """The exit code of a command with some options that raises an error."""

    class Broken(SimpleNamespace):
        def run(self):
            raise error

    monkeypatch.setattr(cli, "_parse", lambda argv: Broken(**options))
    return main([])


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        ValueError("Expected more than 1 value per channel when training"),  # torch's
        json.JSONDecodeError("Expecting value", "", 0),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        OSError("could not get source code"),  # inspect's
        FileNotFoundError("of no file"),
        KeyError("a"),
    ],
    ids=repr,
)
def test_errors_of_the_program_itself_are_not_hidden(error, monkeypatch):
    with pytest.raises(type(error)) as caught:
        run_broken(error, monkeypatch)
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a.txt:1: wrong"), "a.txt:1: wrong"),
        (MissingFileError("a.txt is not there"), "a.txt is not there"),
        (PermissionError(13, "Permission denied", "a.txt"), "[Errno 13] Permission denied: 'a.txt'"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
    ids=repr,
)
def test_what_users_can_mend_is_one_line(error, line, monkeypatch, capsys):
    assert run_broken(error, monkeypatch) == 2
    assert capsys.readouterr().err == f"rakd: error: {line}\n"


@pytest.mark.parametrize("error", [UserError, MissingFileError])
def test_errors_of_loading_processes_are_one_line(error, monkeypatch, capsys):
    class Broken(Dataset):
        def __getitem__(self, index):
            raise error(f"frame {index}: wrong") from OSError("the cause")

    class Command:
        def run(self):
            list(each_of(DataLoader(Broken(), sampler=[7], num_workers=1, multiprocessing_context="fork")))

    monkeypatch.setattr(cli, "_parse", lambda argv: Command())
    assert main([]) == 2
    assert capsys.readouterr().err == "rakd: error: frame 7: wrong\n"


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB. See docs",
            {"batch_size": 8, "amp": "off", "device": "auto"},
            "out of memory: lower --batch-size or set --amp bfloat16 or set --device cpu (torch says: CUDA out",
        ),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", {"device": "auto"}, "--device"),
        ("CUDA error: out of memory\nCUDA kernel errors might be", {"batch_size": 1}, "lower --batch-size"),
        ("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.", {}, "smaller images"),
    ],
)
def test_a_lack_of_memory_says_what_to_lower(text, options, line, monkeypatch, capsys):
    for kind in (RuntimeError, torch.OutOfMemoryError):
        assert run_broken(kind(text), monkeypatch, **options) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert line in said
        assert ("--amp" in said) == ("amp" in options) and ("--batch-size" in said) == ("batch_size" in options)


def test_a_loading_process_that_is_killed_is_told_in_one_line(monkeypatch, capsys):
    text = "DataLoader worker (pid 7) is killed by signal: Killed. Details are lost due to multiprocessing."
    assert run_broken(RuntimeError(text), monkeypatch, batch_size=8, workers=2) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "a process that loads frames was killed, as where memory is short: lower --workers (torch says: " in said


def test_a_real_lack_of_memory_is_told_as_one(monkeypatch, capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert run_broken(caught.value, monkeypatch, batch_size=2, device="auto") == 2
    said = capsys.readouterr().err
    assert "out of memory: lower --batch-size (torch says: " in said and "--device" not in said


def test_python_dash_m():
    env = os.environ | {"PYTHONPATH": str(Path(rakd.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "rakd", "evaluate", "no", "no"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "rakd: error: GT: expected a folder of files NNNNNN.txt, no is not there\n"


def test_options_evaluation_and_scenes_do_not_load_pytorch():
    program = (
        "import sys; import rakd.cli, rakd.evaluation.kitti, rakd.evaluation.report, rakd.scenes; "
        "import rakd.visualize; rakd.cli._commands(); sys.exit('torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(rakd.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=env).returncode == 0
