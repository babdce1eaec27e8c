"""``rakd evaluate`` and ``compare``: what they print, what they write, what they refuse."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from rakd.cli import main
from rakd.data.frames import find_frames
from rakd.evaluation.depth import DepthFigures
from rakd.study.results import RunResult, read_run, write_run


def test_evaluate(scenes, results, tmp_path, capsys):
    assert main(["evaluate", str(scenes / "training" / "label_2"), str(results), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.count("Pedestrian (0.5)") == 2
    assert "R40" in text and "R11" in text
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    count = figures["Car"]["3d"]["objects"][1]
    assert figures["Car"]["3d"]["R40"][1] == pytest.approx(min(100, 100 * (count - 1) / 40))
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_curves_of_an_earlier_evaluation_do_not_stay(scenes, results, tmp_path, monkeypatch):
    arguments = ["evaluate", str(scenes / "training" / "label_2"), str(results), "--out", str(tmp_path)]
    assert main(arguments) == 0 and (tmp_path / "curves.png").exists()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rakd.evaluation.report.write_json", killed)
    assert main(arguments) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]  # the earlier one, whole


def test_a_row_of_results_that_is_too_short_is_told_by_its_line(scenes, tmp_path, capsys):
    for text in ("Car -1 -1 0 1 1 9\n", "Car,-1,-1,0,1,1,9,9,1,1,1,1,1,9,0,0.5\n"):
        for path in (scenes / "training" / "label_2").iterdir():
            (tmp_path / path.name).write_text(text)
        assert main(["evaluate", str(scenes / "training" / "label_2"), str(tmp_path)]) == 2
        assert "000000.txt:1: expected 16 columns" in capsys.readouterr().err


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
    "text",
    [
        "{",
        "[]",
        '{"depth": {"all": {}}}',
        '{"precisions": {"official": 3}}',
        '{"method": "none", "seed": 1, "precisions": {"official": {"3d": {"Car": [1, "2", 3]}}}}',
        '{"seed": 1}',
    ],
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
