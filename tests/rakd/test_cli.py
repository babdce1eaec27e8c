"""The command line as a whole: help, wrong options, and errors in one line."""

import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import rakd
import rakd_ops
from rakd import cli
from rakd.cli import main
from rakd.errors import MissingFileError, UserError
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
        (["latency", "tiny", "--out", "."], "--out: expected a file, . is a folder"),
        (["export-waymo", "pred", "--data", "data", "--out", "."], "--out: expected a file, . is a folder"),
        (["export-waymo", "pred", "--data", "data", "--out", f"{__file__}/a"], "--out: expected a folder to write to"),
        (["export", "tiny", "--out", f"{__file__}/a.onnx"], "--out: expected a folder to write to"),
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


def test_warnings_are_one_line(scenes, results, tmp_path, capsys):
    for path in results.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    row = "Car 0 0 0 1 1 9 9 1 1 1 1 1 9 0"
    (tmp_path / "000003.txt").write_text(f"{row}\n{row}\n")
    assert main(["evaluate", str(scenes / "training" / "label_2"), str(tmp_path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rakd: warning: ")
    assert "000003.txt:1: result rows without a score" in line


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
