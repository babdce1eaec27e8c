"""``rakd show``, ``inspect`` and ``make-scenes``: pictures of frames, doubts about labels, rendered frames."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from rakd.cli import main
from rakd.commands.inspect import doubtful
from rakd.commands.show import _read_predictions
from rakd.data.frames import find_frames, write_calibration
from rakd.geometry import box_corners, project_boxes


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


def test_pictures_take_no_images_place(scenes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    images = data / "training" / "image_2"
    (tmp_path / "link").symlink_to(images)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    for out in (images, tmp_path / "link"):
        assert main(["show", "--data", str(data), "--out", str(out), "--count", "1"]) == 2
        assert "000000.png, which is an input, would be overwritten" in capsys.readouterr().err
        assert main(["inspect", "--data", str(data), "--out", str(out / "000003.png"), "--count", "1"]) == 2
        assert "000003.png, which is an input, would be overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


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
