import builtins
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rakd
import rakd_ops
from rakd import cli
from rakd.cli import main
from rakd.data.frames import find_frames
from rakd.data.labels import write_objects

COMMANDS = (
    "distill",
    "train",
    "predict",
    "evaluate",
    "compare",
    "show",
    "latency",
    "inspect",
    "make-scenes",
    "distill-features",
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
        (["nonsense"], "distill-features; got 'nonsense'"),
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
        (["distill", "--seeds", "1", "-1"], "seeds and expert_seed must be 0 or more, got (1, -1)"),
        (["distill", "--steps", "0"], "steps must be 1 or more, got 0"),
        (["distill", "--data", "nowhere"], "expected a KITTI folder"),
        (["distill", "--study", "kitti"], "--data: --study kitti needs a folder in KITTI's layout"),
        (["distill", "--out", "file"], "--out: expected a folder to write to, file is a file"),
        (["distill-features", "--out", "file"], "--out: expected a folder to write to, file is a file"),
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
        (["latency", "huge"], "DETECTOR must be one of tiny"),
        (["latency", "tiny", "--repeats", "0"], "repeats must be 1 or more, got 0"),
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
    arguments = ["make-scenes", "--out", str(tmp_path)] if hint else ["evaluate", str(results), str(results)]
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


def test_evaluate_a_split(scenes, results, capsys):
    arguments = ["evaluate", str(scenes / "training" / "label_2"), str(results)]
    assert main([*arguments, "--split", str(scenes / "ImageSets" / "val.txt")]) == 0
    part = capsys.readouterr().out
    assert main([*arguments, "--split", "val"]) == 0
    assert capsys.readouterr().out == part
    assert main(arguments) == 0
    assert capsys.readouterr().out != part


def test_evaluate_wants_results_in_the_place_of_results(scenes, results, capsys):
    assert main(["evaluate", str(results), str(scenes / "training" / "label_2")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a score (16th column): expected results; are GT and PRED in each other's place?" in line


def test_evaluate_takes_a_detector_that_sees_nothing(scenes, tmp_path, capsys):
    for frame in find_frames(scenes):
        (tmp_path / f"{frame.id}.txt").touch()
    assert main(["evaluate", str(scenes / "training" / "label_2"), str(tmp_path)]) == 0
    assert " - " in capsys.readouterr().out


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


def test_show_says_what_it_leaves_out(scenes, results, tmp_path, capsys):
    arguments = ["show", "--data", str(scenes), "--out", str(tmp_path), "--count", "1", "--pred", str(results)]
    assert main([*arguments, "--min-score", "0.5"]) == 0
    count = sum(float(line.split()[15]) < 0.5 for line in (results / "000000.txt").read_text().splitlines())
    assert f"left out: {count} predictions that score less than 0.5" in capsys.readouterr().out
    assert main([*arguments, "--min-score", "0"]) == 0
    assert "left out" not in capsys.readouterr().out


def test_inspect(scenes, tmp_path, capsys):
    assert main(["inspect", "--data", str(scenes), "--out", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    everything = [str(name) for frame in find_frames(scenes) for name in frame.read_labels().types]
    assert rows["Car"][3] == str(everything.count("Car"))
    assert rows["type"] == ["easy", "moderate", "hard", "all"]
    assert [int(value) for value in rows["Car"]] == sorted(int(value) for value in rows["Car"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[0] > 1500


def test_labels_that_cannot_be_meant_are_told(scenes, tmp_path, capsys):
    for name in ("image_2", "calib"):
        (tmp_path / "training").mkdir(exist_ok=True)
        (tmp_path / "training" / name).symlink_to(scenes / "training" / name)
    (tmp_path / "training" / "label_2").mkdir()
    good = "Car 0 0 1.5 10 20 50 60 1.5 1.6 4 1 1.6 9 1.57"
    region = "DontCare -1 -1 -10 5 5 9 9 -1 -1 -1 -1000 -1000 -1000 -10"
    bad = {
        2: (good.replace("1.5 1.6 4 ", "-1.5 0 -4 "), "no 3D box"),
        3: (good.replace("1.57", "-99"), "an angle beyond half a turn"),
        5: (good.replace("50 60", "10 60"), "a 2D box without area"),
        7: (good.replace("1.6 9", "1.6 -9"), "a place behind the camera"),
    }
    for i in range(10):
        text = f"{good}\n{bad[i][0]}\n" if i in bad else f"{good}\n{region}\n"
        (tmp_path / "training" / "label_2" / f"{i:06d}.txt").write_text(text)
    assert main(["inspect", "--data", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    captured = capsys.readouterr()
    assert "10 frames, 14 labelled objects, 6 DontCare regions" in captured.out
    lines = captured.err.splitlines()
    assert len(lines) == len(bad)
    for line, (i, (_, fault)) in zip(lines, bad.items(), strict=True):
        assert line.startswith("rakd: warning: ")
        assert f"{i:06d}.txt: 1 of 2 objects: {fault}" in line


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


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch):
    class Broken:
        def run(self):
            raise ZeroDivisionError

    monkeypatch.setattr(cli, "_parse", lambda argv: Broken())
    with pytest.raises(ZeroDivisionError):
        main([])


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
