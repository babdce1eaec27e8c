"""Waymo's parquet files as a folder in KITTI's layout: what is written, goes on, and is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: it comes with the extra waymo")
from waymo_files import extrinsic, points_of

from rakd.data.frames import find_frames
from rakd.data.kitti import KittiDataset
from rakd.data.labels import read_labels
from rakd.data.waymo_convert import WaymoConversion, convert_waymo, read_names
from rakd.data.waymo_geometry import optical_from_vehicle
from rakd.evaluation.waymo.folders import read_transform
from rakd.files import locked

ALL_POINTS = WaymoConversion(every=(1, 1), min_points=(0, 0))


@pytest.fixture(scope="module")
def converted(waymo, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "kitti"
    assert convert_waymo(waymo[0], out, ALL_POINTS) == 9
    return out


def test_conversion_is_a_kitti_folder(converted, waymo):
    _, written = waymo
    assert [frame.id for frame in find_frames(converted, "train")] == [
        f"{s:03d}{f:03d}" for s in (0, 1) for f in range(3)
    ]
    assert [frame.id for frame in find_frames(converted, "val")] == ["798000", "798001", "798002"]
    assert len(find_frames(converted, "trainval")) == 9
    for frame in find_frames(converted, "val"):
        objects = written["30_c"][int(frame.id[3:])]
        kept = points_of(6 + int(frame.id[3:]), len(objects)) > 0
        np.testing.assert_allclose(frame.read_labels().location, objects.location[kept], atol=1e-8)
        np.testing.assert_allclose(read_transform(frame.calib), optical_from_vehicle(extrinsic()), atol=1e-12)
    sample = KittiDataset(converted, "train", height=64)[0]
    assert sample.targets is not None
    names = read_names(converted, "training")
    assert names["001002"].segment == "20_b"
    assert (names["001002"].time, names["001002"].camera) == (1_200_000, 1)


def test_training_ignores_what_few_points_fell_on(waymo, tmp_path):
    convert_waymo(waymo[0], tmp_path, WaymoConversion(every=(1, 1)))
    seen = set()
    for split, limit in (("train", True), ("val", False)):
        for frame in find_frames(tmp_path, split):
            first = {"000": 0, "001": 3, "798": 6}[frame.id[:3]] + int(frame.id[3:])
            objects = waymo[1][{"000": "10_a", "001": "20_b", "798": "30_c"}[frame.id[:3]]][int(frame.id[3:])]
            points = points_of(first, len(objects))
            ignored = points <= np.where(objects.types == "Car", 100, 50) if limit else points < 0
            labels = read_labels(frame.label)
            assert (labels.types == "DontCare").sum() == (ignored & (points > 0)).sum()
            assert (labels.types != "DontCare").sum() == (~ignored & (points > 0)).sum()
            np.testing.assert_allclose(
                labels.boxes[labels.types == "DontCare"], objects.boxes[ignored & (points > 0)], atol=1e-7
            )
            seen |= set(labels.types.tolist())
    assert "DontCare" in seen and "Car" in seen


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_files_from_any_number_of_processes_and_after_an_interruption(waymo, converted, tmp_path):
    root, _ = waymo
    expected = digest(converted)
    parallel = tmp_path / "parallel"
    convert_waymo(root, parallel, ALL_POINTS, workers=2)
    assert digest(parallel) == expected
    # As a killed run leaves it: a segment is incomplete, a temporary file lies about, the lists are missing.
    index = parallel / "waymo" / "training" / "20_b.csv"
    index.write_text(index.read_text() + "000,20_b\n")
    with pytest.raises(ValueError, match=r"20_b\.csv: expected the columns frame, "):
        read_names(parallel, "training")
    index.unlink()
    (parallel / "training" / "label_2" / "001001.txt").unlink()
    folder = parallel / "training" / "image_2"
    killed, young = (folder / f".001001-{name}.jpg" for name in ("0123456789abcdef", "fedcba9876543210"))
    mine = parallel / "ImageSets" / ".notes.md"
    for path in (killed, young, mine):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    for path in (killed, mine):
        os.utime(path, (0, 0))
    (parallel / "ImageSets" / ".ipynb_checkpoints").mkdir()
    for path in (parallel / "ImageSets").glob("[!.]*"):
        path.unlink()
    untouched = (parallel / "training" / "image_2" / "000000.jpg").stat().st_mtime_ns
    convert_waymo(root, parallel, ALL_POINTS)
    assert not killed.exists() and young.exists() and mine.exists()  # others' files, or another process's
    young.unlink()
    mine.unlink()
    (parallel / "ImageSets" / ".ipynb_checkpoints").rmdir()
    assert digest(parallel) == expected
    assert (parallel / "training" / "image_2" / "000000.jpg").stat().st_mtime_ns == untouched


def test_a_killed_run_is_completed(waymo, converted, tmp_path):
    """Killed for good in the middle; each file that is there then is a whole one."""
    out = tmp_path / "out"
    code = (
        "import sys, time\nfrom rakd.data import waymo_convert as w\n"
        "write = w.write_text\n"
        "def slow(*arguments):\n    write(*arguments); time.sleep(0.2)\n"
        "w.write_text = slow\n"
        f"w.convert_waymo({str(waymo[0])!r}, {str(out)!r}, w.WaymoConversion(every=(1, 1), min_points=(0, 0)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (out / "training" / "label_2" / "000001.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    expected = digest(converted)
    for name, content in digest(out).items():
        if not Path(name).name.startswith("."):
            assert content == expected[name]
    assert len(digest(out)) < len(expected)
    convert_waymo(waymo[0], out, ALL_POINTS)
    assert digest(out) == expected


def test_splits_can_follow_one_another(waymo, converted, tmp_path):
    convert_waymo(waymo[0], tmp_path, ALL_POINTS, splits=["validation"])
    assert not (tmp_path / "ImageSets" / "train.txt").exists()
    convert_waymo(waymo[0], tmp_path, ALL_POINTS, splits=["training"])
    files = digest(tmp_path)
    manifest = json.loads(files.pop("waymo.json"))
    expected = digest(converted)
    assert manifest["segments"] == json.loads(expected.pop("waymo.json"))["segments"]
    assert files == expected


def test_other_settings_need_another_folder(waymo, converted):
    with pytest.raises(ValueError, match="holds a conversion with other every, min_points"):
        convert_waymo(waymo[0], converted)
    with pytest.raises(ValueError, match="holds a conversion with other segments of training"):
        convert_waymo(waymo[0], converted, ALL_POINTS, segments={"training": ["20_b"]})


def test_a_folder_of_something_else_is_left_alone(waymo, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"not an empty folder and holds no waymo\.json"):
        convert_waymo(waymo[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"out: expected a folder to write to, .*thesis\.txt is a file"):
        convert_waymo(waymo[0], tmp_path / "thesis.txt")


def test_what_a_killed_conversion_left_is_no_obstacle(waymo, tmp_path):
    (tmp_path / ".waymo-0123456789abcdef.json").touch()
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by another command"):
        convert_waymo(waymo[0], tmp_path, splits=["validation"])
    assert convert_waymo(waymo[0], tmp_path, splits=["validation"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"splits": []}, "splits must be some of training, validation, testing, each once, got none"),
        ({"splits": ["train"]}, "got train"),
    ],
)
def test_wrong_arguments_of_the_conversion(waymo, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_waymo(waymo[0], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
