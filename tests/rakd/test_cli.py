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
from rakd import cli
from rakd.cli import main
from rakd.data.frames import find_frames
from rakd.data.labels import write_objects

COMMANDS = ("distill", "train", "predict", "evaluate", "show", "latency", "inspect", "make-scenes", "distill-features")


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
        ([], "Expected one of"),
        (["nonsense"], "nonsense"),
        (["make-scenes"], "--out"),
        (["make-scenes", "--out", "x", "--frames", "many"], "--frames"),
        (["make-scenes", "--out", "x", "--frames", "1"], "frames must be at least 2, got 1"),
        (["make-scenes", "--out", "x", "--workers", "-1"], "workers must be 0 or more, got -1"),
        (["evaluate", "nowhere", "there"], "gt_dir: nowhere is not there"),
        (["evaluate", "nowhere"], "PRED"),
        (["evaluate", "a", "b", "--split", "c.txt"], "c.txt is not there"),
        (["inspect", "--data", "nowhere"], "expected a KITTI folder"),
        (["show", "--data", "nowhere"], "expected a KITTI folder"),
        (["show", "--data", "nowhere", "--count", "0"], "count must be at least 1"),
        (["show", "--data", "nowhere", "--reach", "-1"], "reach must be positive"),
        (["show", "--data", "nowhere", "--part", "moon"], "moon"),
        (["distill", "--methods", "magic"], "magic"),
        (["distill", "--methods", "none", "none"], "methods must hold at least one and none twice"),
        (["distill", "--seeds", "1", "-1"], "seeds and expert_seed must be 0 or more, got (1, -1)"),
        (["distill", "--steps", "0"], "steps must be 1 or more, got 0"),
        (["distill", "--data", "nowhere"], "expected a KITTI folder"),
        (["train", "--out", "x"], "--data"),
        (["train", "--data", "nowhere", "--out", "x", "--steps", "-1"], "steps must be 1 or more, got -1"),
        (["train", "--data", "nowhere", "--out", "x", "--detector", "huge"], "huge"),
        (["train", "--data", "nowhere", "--out", "x"], "expected a KITTI folder"),
        (
            ["predict", "a.png", "--calib", "b.txt", "--checkpoint", "c.pt"],
            "c.pt is not there: expected a file of weights",
        ),
        (["predict", "a.png"], "--calib"),
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
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("rakd: error: ")
    assert message in line
    assert not any(character in line for character in "╭│─")


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
    assert main(arguments) == 0
    assert capsys.readouterr().out != part


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
    assert "000000.txt" in capsys.readouterr().err


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


def test_interrupt(monkeypatch, capsys):
    class Endless:
        def run(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", lambda argv: Endless())
    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


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
    assert done.stderr == "rakd: error: gt_dir: no is not there\n"


def test_options_evaluation_and_scenes_do_not_load_pytorch():
    program = (
        "import sys; import rakd.cli, rakd.evaluation.kitti, rakd.evaluation.report, rakd.scenes; "
        "import rakd.visualize; rakd.cli._commands(); sys.exit('torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(rakd.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=env).returncode == 0
