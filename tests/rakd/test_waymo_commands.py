"""Waymo from parquet files to numbers by the commands: convert, train, evaluate, export."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: it comes with the extra waymo")
pytest.importorskip("scipy", reason="scipy is not installed: it comes with the extra waymo")
from waymo_files import write_waymo

from rakd.cli import main
from rakd.commands import distill as distill_module
from rakd.commands.convert_waymo import _read_list
from rakd.commands.show import _read_predictions
from rakd.commands.waymo_data import format_waymo_tables
from rakd.data.frames import find_frames
from rakd.data.labels import read_labels, read_results, write_objects
from rakd.detector.configs import DETECTORS
from rakd.errors import UserError
from rakd.evaluation.waymo import evaluate, read_bin
from rakd.study.experiment import Experiment
from rakd.study.settings import STUDIES


@pytest.fixture(scope="module")
def waymo(scenes, tmp_path_factory):
    """Rendered scenes as Waymo's files."""
    root = tmp_path_factory.mktemp("waymo")
    write_waymo(scenes, root)
    return root


@pytest.fixture(scope="module")
def converted(waymo, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "kitti"
    assert main(["convert-waymo", str(waymo), "--out", str(out), "--every", "1", "1", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def perfect(converted, tmp_path_factory):
    """The truths of validation as predictions."""
    out = tmp_path_factory.mktemp("perfect")
    for frame in find_frames(converted, "val"):
        objects = read_labels(frame.label)
        write_objects(out / f"{frame.id}.txt", replace(objects, scores=np.linspace(1, 0.2, len(objects))), decimals=8)
    return out


@pytest.fixture
def quick(small_config, monkeypatch):
    """Detectors that train in a second stand in for the small ones."""
    for name in ("tiny", "tiny-expert"):
        monkeypatch.setitem(DETECTORS, name, replace(small_config, width=224))


def train(data, out):
    options = {"data": data, "out": out, "detector": "tiny", "steps": 20, "batch-size": 2, "device": "cpu"}
    options |= {"optimizer": "adamw", "learning-rate": 0.001, "warm-up": 1}
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_truth_as_prediction_is_100_in_both_modes(converted, perfect):
    frames = [frame.id for frame in find_frames(converted, "val")]
    truth = converted / "training" / "label_2"
    for options in ({}, {"mode": "pct"}, {"iou": "papers"}, {"mode": "pct", "iou": "papers"}):
        rows = evaluate(truth, perfect, frames=frames, **options)
        seen = [row for row in rows if row.objects]
        assert len(seen) >= 8 and len({row.type for row in seen}) >= 2
        for row in seen:
            assert (row.ap, row.aph) == pytest.approx((1, 1), abs=1e-6)


def test_scores_above_1_cost_the_official_tables_alone(converted, perfect, tmp_path):
    # MonoDETR's may be.
    frames = [frame.id for frame in find_frames(converted, "val")]
    for name in frames:
        objects = read_results(perfect / f"{name}.txt")
        write_objects(tmp_path / f"{name}.txt", replace(objects, scores=objects.scores + 0.5), decimals=8)
    text = format_waymo_tables(converted, tmp_path, frames)
    assert text.count("mode official, IoU ") == text.count("scores must lie in 0..1, they reach from 0.7 to 1.5") == 2
    assert text.count("AP [pct]") == 2 and "AP [official]" not in text
    (tmp_path / f"{frames[0]}.txt").write_text("no result\n")
    with pytest.raises(UserError, match=f"{frames[0]}.txt"):  # costs all tables, and is no table
        format_waymo_tables(converted, tmp_path, frames)


def test_train_reads_parquet_files(waymo, quick, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(train(waymo, out)) == 0
    printed = capsys.readouterr().out
    with (out / "log.csv").open() as file:
        losses = [float(row["total"]) for row in csv.DictReader(file)]
    assert all(np.isfinite(losses))
    assert (out / "detector.pt").is_file()
    # Every third training frame, and all of validation.
    assert [frame.id for frame in find_frames(out / "data", "train")] == ["000000", "001000"]
    frames = [frame.id for frame in find_frames(out / "data", "val")]
    assert frames == ["798000", "798001", "798002"]
    assert sorted(path.stem for path in (out / "detections").iterdir()) == frames
    assert "converting them into" in printed
    for text in ("AP [official]", "AP [pct]", "VEHICLE     0.7", "VEHICLE     0.5"):
        assert text in printed
    assert "R40" not in printed
    rows = evaluate(out / "data" / "training" / "label_2", out / "detections", frames=frames)
    assert all(0 <= row.ap <= 1 for row in rows)


def test_inspect_doubts_nothing_of_converted_frames(converted, tmp_path, capsys):
    assert main(["inspect", "--data", str(converted), "--out", str(tmp_path / "sheet.png"), "--count", "1"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_train_reads_what_convert_wrote(converted, quick, tmp_path, capsys):
    assert main(train(converted, tmp_path / "run")) == 0
    assert not (tmp_path / "run" / "data").exists()
    assert "AP [official]" in capsys.readouterr().out


def test_evaluate(converted, perfect, tmp_path, capsys):
    truth = str(converted / "training" / "label_2")
    words = ["evaluate", "--waymo", truth, str(perfect), "--split", "val"]
    (tmp_path / "curves.png").touch()  # of KITTI's metric: Waymo's has none
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "curves.png").exists()
    printed = capsys.readouterr().out
    assert printed.count("AP [official]") == 2
    assert "100.00" in printed
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(rows) == 2 * 32
    assert {row["mode"] for row in rows} == {"official"}
    assert main([*words, "--mode", "pct", "--iou", "papers"]) == 0
    assert capsys.readouterr().out.count("AP [pct]") == 1
    assert main([*words, "--json", "-", "--iou", "papers"]) == 0
    assert {row["iou"] for row in json.loads(capsys.readouterr().out)} == {0.5, 0.3}
    assert main([*words, "--let"]) == 0
    captured = capsys.readouterr()
    assert "LET-3D-APL [official]" in captured.out
    assert "these are lidar boxes" in captured.err
    for wrong, message in (
        (["evaluate", truth, str(perfect), "--mode", "pct"], "--mode: only with --waymo"),
        (["evaluate", truth, str(perfect), "--let"], "--let: only with --waymo"),
        (
            ["evaluate", truth, str(perfect), "--iou", "papers"],
            "--iou: only with --waymo; looser overlaps of KITTI",
        ),
        ([*words, "--let", "--iou", "official"], "--iou: not with --let, which has overlaps of its own"),
        ([*words, "--overlaps", "loose"], "with --waymo take --iou"),
        ([*words, "--iou", "papers", "papers"], "--iou: expected one or more names, each once"),
        (["evaluate", "--waymo", truth, truth, "--split", "val"], "are GT and PRED in each other's place?"),
        (["evaluate", "--waymo", truth, str(tmp_path / "no.bin")], "no.bin is not there"),
        (["evaluate", "--waymo", __file__, __file__, "--split", "val"], "--split: expected folders as GT and PRED"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_folders_are_found_from_within_them(converted, perfect, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(converted / "training" / "label_2")
    assert main(["evaluate", "--waymo", ".", str(perfect), "--split", "val", "--let"]) == 0
    captured = capsys.readouterr()
    assert "LET-3D-APL [official]" in captured.out and "these are lidar boxes" in captured.err
    assert "DontCare" not in captured.err


def test_labels_in_the_place_of_results(converted, perfect, tmp_path, capsys):
    """The 16th column of Waymo's labels is a number of points, no score."""
    truth = str(converted / "training" / "label_2")
    assert main(["evaluate", str(perfect), truth]) == 2
    assert "holds labels of convert-waymo; are GT and PRED in each other's place?" in capsys.readouterr().err
    name = find_frames(converted, "val")[0].id
    shown = _read_predictions(Path(truth), name)
    assert shown.scores is None and len(shown) == len(read_labels(Path(truth) / f"{name}.txt"))


def test_regions_of_few_points_are_told(converted, tmp_path):
    """Of training: objects are missing from the truths, and who finds them is counted wrong."""
    label = converted / "training" / "label_2" / f"{find_frames(converted, 'val')[0].id}.txt"
    data = shutil.copytree(converted, tmp_path / "data")
    copy = data / "training" / "label_2" / label.name
    copy.write_text(label.read_text() + "DontCare -1 -1 -10 1 1 9 9 -1 -1 -1 -1000 -1000 -1000 -10\n")
    pred = tmp_path / "pred"
    write_objects(pred / label.name, replace(read_labels(label), scores=np.ones(len(read_labels(label)))), decimals=8)
    with pytest.warns(UserWarning, match="1 objects with few lidar points are DontCare regions"):
        evaluate(copy.parent, pred, frames=[label.stem])


def test_let_of_synced_boxes(waymo, tmp_path, capsys):
    out = tmp_path / "synced"
    words = [
        "convert-waymo",
        str(waymo),
        "--out",
        str(out),
        "--boxes",
        "synced",
        "--splits",
        "validation",
        "--workers",
        "1",
    ]
    assert main(words) == 0
    for frame in find_frames(out, "val"):
        objects = read_labels(frame.label)
        # 6 % too far along the ray, of the 10 % that are tolerated; too far for an overlap of 0.8.
        moved = replace(objects, location=objects.location * 1.06, scores=np.full(len(objects), 0.5))
        write_objects(tmp_path / "pred" / f"{frame.id}.txt", moved, decimals=8)
    plain = evaluate(out / "training" / "label_2", tmp_path / "pred", iou=0.8)[0]
    let = evaluate(out / "training" / "label_2", tmp_path / "pred", iou=0.8, let=True)[0]
    assert plain.ap < 0.3 < 0.9 < let.ap
    assert let.apl == pytest.approx(0.4, abs=0.1)
    assert "lidar boxes" not in capsys.readouterr().err


def test_export(converted, perfect, waymo, tmp_path, capsys):
    """Packed results are those files, in the vehicle frame, with the frames' segments and times."""
    path = tmp_path / "results.bin"
    assert main(["export-waymo", str(perfect), "--data", str(converted), "--out", str(path)]) == 0
    assert "of 3 frames are in" in capsys.readouterr().out
    objects = read_bin(path)
    assert set(objects.keys) == {("30_c", 1_000_000 + 100_000 * i, 0) for i in range(3)}
    from rakd.data.waymo import read_segment

    found = 0
    for frame in read_segment(waymo, "validation", "30_c", images=False):
        own = objects.boxes[objects.frames == objects.keys.index(("30_c", frame.time, 0))]
        boxes = frame.labels.boxes[frame.visible()]
        np.testing.assert_allclose(own[:, :6], boxes[:, :6], atol=1e-7)
        np.testing.assert_allclose(np.sin(own[:, 6] - boxes[:, 6]), 0, atol=1e-7)
        found += len(own)
    assert found == len(objects) > 5
    # A second export of what was read gives the same bytes.
    from rakd.evaluation.waymo import write_bin

    write_bin(tmp_path / "again.bin", objects)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def test_export_tells_of_frames_without_results(converted, perfect, tmp_path, capsys):
    words = ["export-waymo", str(tmp_path / "pred"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "a.bin")]
    shutil.copytree(perfect, tmp_path / "pred")
    shutil.copytree(converted, tmp_path / "data")
    missing = sorted((tmp_path / "pred").glob("*.txt"))[1]
    missing.unlink()
    # Of a training split whose conversion was interrupted there is no result: it does not matter.
    index = tmp_path / "data" / "waymo" / "training" / "20_b.csv"
    index.unlink()
    assert main(words) == 0
    text = capsys.readouterr().err
    assert f"1 of 3 frames of validation have no result file, such as {missing.name}" in text
    (tmp_path / "pred" / "000000.txt").touch()
    assert main(words) == 2
    assert f"{index} is not there: this segment is not converted" in capsys.readouterr().err


def test_export_refuses_what_waymo_would(converted, perfect, tmp_path, capsys):
    def error(message, pred, data=converted):
        assert main(["export-waymo", str(pred), "--data", str(data), "--out", str(tmp_path / "a.bin")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "a.bin").exists()

    error("is not there: expected a folder of result files", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    error("holds no result files", tmp_path / "empty")
    error("expected a folder that rakd convert-waymo wrote", perfect, tmp_path)
    text = (perfect / "798000.txt").read_text()
    (tmp_path / "empty" / "123456.txt").write_text(text)
    error("has no frame 123456", tmp_path / "empty")
    (tmp_path / "empty" / "123456.txt").unlink()
    (tmp_path / "empty" / "798000.txt").write_text(text.replace(" 1.000000\n", " 2.000000\n"))
    error("scores must lie in 0..1 for Waymo's metric, they reach from 0.2 to 2", tmp_path / "empty")


def test_convert_takes_lists(waymo, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("segment\n")
    words = ["convert-waymo", str(waymo), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*words, "--train-list", str(tmp_path / "train.txt")]) == 2
    assert "segment.parquet is not there" in capsys.readouterr().err
    (tmp_path / "train.txt").write_text("20_b.tfrecord\n\n")
    assert main([*words, "--train-list", str(tmp_path / "train.txt")]) == 0
    assert [frame.id for frame in find_frames(tmp_path / "out", "train")] == ["000000"]
    assert main([*words, "--train-list", str(tmp_path / "no.txt")]) == 2
    assert main([*words, "--splits", "validation", "--train-list", str(tmp_path / "train.txt")]) == 2
    assert "there is a list for training, which is not among splits, validation" in capsys.readouterr().err
    (tmp_path / "train.txt").write_text("segment-20_b_with_camera_labels.tfrecord\n")
    assert _read_list(tmp_path / "train.txt") == ["20_b"]
    assert main([*words, "--workers", "-1"]) == 2


def test_the_study_has_the_predecessors_settings():
    study = STUDIES["waymo"]
    for name in (study.expert, study.apprentice):
        assert DETECTORS[name].image_size == (768, 512)
    assert study.training.steps * study.training.batch_size == pytest.approx(30 * 52_386, rel=1e-4)


def test_distill_on_waymo(waymo, quick, tmp_path, monkeypatch, capsys):
    """From parquet files to Waymo's tables of expert and apprentice; with the small detectors, for a few steps."""
    tiny = STUDIES["tiny"]
    short = replace(tiny.training, steps=2, warm_up=1, batch_size=2)
    study = replace(tiny, training=short, expert_training=short)
    monkeypatch.setattr(distill_module, "STUDIES", {"waymo": study})
    monkeypatch.setattr(Experiment, "_models", lambda self: ())  # latency, for which two detectors would be exported
    words = f"distill --study waymo --data {waymo} --out {tmp_path} --methods none rakd --device cpu"
    assert main(words.split()) == 0
    tables = (tmp_path / "waymo.md").read_text()
    for run in ("expert-seed0", "none-seed0", "rakd-seed0"):
        assert f"## {run}\n" in tables
    assert tables.count("AP [official]") == tables.count("AP [pct]") == 3 * 2
    # A copy may lack some runs' detections, which are large.
    shutil.rmtree(tmp_path / "none-seed0" / "detections")
    assert "Waymo's metrics of all runs" in capsys.readouterr().out
    assert main(words.split()) == 0
    assert "Waymo's metrics are not made anew: no detections of none-seed0" in capsys.readouterr().err
    assert (tmp_path / "waymo.md").read_text() == tables


def test_distill_needs_data(tmp_path, capsys):
    assert main(["distill", "--study", "waymo", "--out", str(tmp_path)]) == 2
    assert "--study waymo needs a folder in KITTI's layout or of Waymo's parquet files" in capsys.readouterr().err
