"""The two modes of Waymo's metric, their tables, and what cannot be evaluated."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: it comes with the extra waymo")
from waymo_objects import CAR, draw, objects, table, write_folder

from rakd.data.waymo_geometry import optical_from_vehicle
from rakd.evaluation.waymo import evaluate, write_bin
from rakd.evaluation.waymo.objects import TYPES
from rakd.evaluation.waymo.report import format_table, to_json
from rakd.evaluation.waymo.scoring import ALL

# The two modes


def allowed(axis, mode, root):
    """The largest shift of a typical car along an axis of the vehicle that still counts as found, to a millimetre."""
    truth = write_folder(root, "label_2", [CAR])
    low, high = 0.0, 4.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        moved = np.array(CAR) + middle * np.eye(7)[axis]
        pred = write_folder(root, "pred", [moved], scores=[0.5])
        (row,) = [r for r in evaluate(truth, pred, mode=mode) if (r.type, r.range, r.level) == ("VEHICLE", "all", 1)]
        low, high = (middle, high) if row.ap > 0.99 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("mode", "depth", "vertical"),
    [("official", 4.8 * 0.3 / 1.7, 1.8 * 0.3 / 1.7), ("pct", 1.8 * 0.3 / 1.7, 4.8 * 0.3 / 1.7)],
)
def test_the_error_in_depth_that_each_mode_allows(mode, depth, vertical, tmp_path):
    """A car on the axis, 1.8 m high and 4.8 m long, at an overlap of 0.7: 0.85 m of depth, or 0.32 m."""
    assert round(depth, 2) == {"official": 0.85, "pct": 0.32}[mode]
    assert allowed(0, mode, tmp_path) == pytest.approx(depth, abs=2e-3)
    assert allowed(2, mode, tmp_path) == pytest.approx(vertical, abs=2e-3)


def test_pct_of_bin_files_is_that_of_an_untilted_camera(tmp_path):
    from rakd.evaluation.waymo.overlaps import LET_CAMERA

    truth, predictions = draw(1, 2, 3, 4)
    known = truth.types > 0
    truth = replace(truth.select(known), difficulty=np.zeros(known.sum(), np.int8))
    write_bin(tmp_path / "gt.bin", truth)
    write_bin(tmp_path / "pred.bin", predictions)
    with pytest.warns(UserWarning, match="an untilted one at"):
        ours = evaluate(tmp_path / "gt.bin", tmp_path / "pred.bin", mode="pct", iou="papers")
    extrinsic = np.eye(4)
    extrinsic[:3, 3] = LET_CAMERA
    names = {1: "Car", 2: "Pedestrian"}
    transform = optical_from_vehicle(extrinsic)
    folders = {}
    for name, these, scores in (("label_2", truth, None), ("pred", predictions, predictions.scores)):
        for frame in range(2):
            rows = these.frames == frame
            folder = write_folder(
                tmp_path / f"frame{frame}",
                name,
                these.boxes[rows],
                scores=None if scores is None else scores[rows],
                types=[names[int(t)] for t in these.types[rows]],
                transform=transform,
            )
            (tmp_path / name).mkdir(exist_ok=True)
            text = (folder / "000000.txt").read_text()
            if scores is None:
                text = "".join(
                    f"{line.rsplit(' ', 1)[0]} {count}\n"
                    for line, count in zip(text.splitlines(), these.points[rows], strict=True)
                )
            (tmp_path / name / f"{frame:06d}.txt").write_text(text)
            folders[name] = tmp_path / name
    theirs = evaluate(folders["label_2"], folders["pred"], mode="pct", iou="papers")
    assert [row.ap for row in ours] == pytest.approx([row.ap for row in theirs], abs=1e-6)
    assert max(row.ap for row in ours) > 0.1


def test_scores_above_1(tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR, [30, 5, 1, 4, 2, 1.5, 0.3]])
    boxes = [CAR, [30, 5, 1, 4, 2, 1.5, 0.3], [40, -9, 1, 4, 2, 1.5, 0.3]]
    pred = write_folder(tmp_path, "pred", boxes, scores=[7.0, 3.0, 0.5])
    with pytest.raises(
        ValueError, match=r"scores must lie in 0\.\.1, they reach from 0\.5 to 7: the metric cuts at"
    ) as caught:
        evaluate(truth, pred)
    assert str(pred) in str(caught.value)
    rescaled = write_folder(tmp_path, "rescaled", boxes, scores=[1.0, 2.5 / 6.5, 0.0])
    assert table(evaluate(truth, pred, mode="pct")) == table(evaluate(truth, rescaled, mode="pct"))
    best = {(r.type, r.range, r.level): r.ap for r in evaluate(truth, pred, mode="pct")}
    assert best["VEHICLE", "all", 1] == pytest.approx(1, abs=1e-6)
    equal = write_folder(tmp_path, "equal", boxes[:2], scores=[7.0, 7.0])
    assert max(r.ap for r in evaluate(truth, equal, mode="pct")) == pytest.approx(1, abs=1e-6)
    negative = write_folder(tmp_path, "negative", boxes, scores=[0.5, 0.4, -0.5])
    with pytest.raises(ValueError, match=r"they reach from -0\.5 to 0\.5"):
        evaluate(truth, negative)


def test_every_row_and_table_says_its_mode(tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR])
    pred = write_folder(tmp_path, "pred", [CAR], scores=[0.5])
    for mode, note in (("official", "101 score cut-offs"), ("pct", "11 score cut-offs")):
        rows = evaluate(truth, pred, mode=mode)
        assert {row.mode for row in rows} == {mode}
        text = format_table(rows)
        assert note in text and f"AP [{mode}]" in text and f"APH [{mode}]" in text
        assert rows[0]["ap"] == rows[0].ap == 1
        assert [(row.type, row.range, row.level) for row in rows] == list(
            itertools.product(TYPES, (ALL, "0-30", "30-50", "50-inf"), (1, 2))
        )
        assert f'"mode": "{mode}"' in to_json([rows])
    assert "LET-3D-APL" in format_table(evaluate(truth, pred, let=True))


def test_overlaps(tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR])
    pred = write_folder(tmp_path, "pred", [[*CAR[:3], 4.8 * 0.6, *CAR[4:]]], scores=[0.5])

    def ap(**options):
        return evaluate(truth, pred, **options)[0].ap

    assert (ap(), ap(iou="official"), ap(iou=0.61)) == (0, 0, 0)
    assert ap(iou="papers") == ap(iou=0.59) == ap(iou=dict.fromkeys(TYPES, 0.5)) == 1
    assert {row.iou for row in evaluate(truth, pred, let=True)} == {0.5, 0.3}


# What cannot be evaluated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "kitti"}, "mode must be one of official, pct, got 'kitti'"),
        ({"iou": "loose"}, "iou must be one of official, papers, a number or a mapping, got 'loose'"),
        ({"iou": 0}, "iou must lie above 0 and not above 1, got 0"),
        ({"iou": float("nan")}, "got nan"),
        (
            {"iou": {"VEHICLE": 0.5}},
            "iou must have a number for each of VEHICLE, PEDESTRIAN, SIGN, CYCLIST, got VEHICLE",
        ),
        ({"mode": "pct", "let": True}, "let must be False in mode pct"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR])
    with pytest.raises(ValueError, match=message):
        evaluate(truth, truth, **options)


def test_files_that_do_not_fit(tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR])
    pred = write_folder(tmp_path, "pred", [CAR], scores=[0.5])
    write_bin(tmp_path / "a.bin", objects([CAR]))
    with pytest.raises(FileNotFoundError, match=r"pred: .*nowhere is not there"):
        evaluate(truth, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"both be folders or both \.bin files"):
        evaluate(truth, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"frames must be None for \.bin files"):
        evaluate(tmp_path / "a.bin", tmp_path / "a.bin", frames=["000000"])
    with pytest.raises(
        ValueError,
        match=r"a\.bin: expected truths that have camera-synced boxes with points of the top lidar, no object has",
    ):
        evaluate(tmp_path / "a.bin", tmp_path / "a.bin", let=True)
    write_bin(tmp_path / "b.bin", replace(objects([CAR]), scores=np.array([0.5], np.float32)))
    with pytest.raises(ValueError, match=r"b\.bin: truths have no scores, object 1 has 0\.5: .*each other's place"):
        evaluate(tmp_path / "b.bin", tmp_path / "a.bin")
    write_bin(tmp_path / "b.bin", replace(objects([CAR]), points=np.array([0])))
    with pytest.raises(ValueError, match=r"b\.bin: expected truths that have lidar points, without which none counts"):
        evaluate(tmp_path / "b.bin", tmp_path / "a.bin")
    write_bin(tmp_path / "b.bin", replace(objects([CAR]), keys=[("s", 0, 1)]))
    with pytest.raises(ValueError, match=r"frames in common, they have none.*\('s', 0, 0\).*\('s', 0, 1\)"):
        evaluate(tmp_path / "a.bin", tmp_path / "b.bin")
    calib = tmp_path / "calib" / "000000.txt"
    text = calib.read_text()
    for content, message in (
        ("P2: 1", "expected a line 'Tr_velo_to_cam: <12 numbers>', found none"),
        ("Tr_velo_to_cam: 1 2 3", "000000.txt: "),
        ("Tr_velo_to_cam: 1 0 0 0 0 1 0 0 0 0 1 0", "must turn a vehicle's axes"),
    ):
        calib.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            evaluate(truth, pred)
        assert str(calib) in str(caught.value)
    calib.unlink()
    with pytest.raises(FileNotFoundError, match="official numbers need each frame's calibration"):
        evaluate(truth, pred)
    assert evaluate(truth, pred, mode="pct")[0].ap == 1  # needs none
    calib.write_text(text)
    label = truth / "000000.txt"
    good = label.read_text()
    for content, message in (
        (good.replace("Car", "Tram"), "types must be Car, Pedestrian, Sign, Cyclist, got 'Tram'"),
        (good.rsplit(" ", 1)[0] + "\n", "expected the number of lidar points in column 16.*got 'no column 16'"),
        (good.rsplit(" ", 1)[0] + " -1\n", "got '-1'"),
        (good.rsplit(" ", 1)[0] + " 1e30\n", "got '1e30'"),
        (good.rstrip() + " 3\n", "a difficulty of 0, 1 or 2 there, got '50 3'"),
    ):
        label.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            evaluate(truth, pred)
        assert str(label) in str(caught.value)
    label.write_text(good)
    result = pred / "000000.txt"
    words = result.read_text().split()
    words[11:14] = ["-1000"] * 3
    result.write_text(" ".join(words) + "\n")
    with pytest.raises(ValueError, match="object 1 has no 3D box"):
        evaluate(truth, pred)


def test_dont_care_rows_are_skipped_and_a_17th_column_is_the_difficulty(tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR])
    pred = write_folder(tmp_path, "pred", [CAR], scores=[0.5])
    label = truth / "000000.txt"
    label.write_text(label.read_text().rstrip() + " 2\nDontCare -1 -1 -10 1 1 9 9 -1 -1 -1 -1000 -1000 -1000 -10\n")
    # The papers' script knows difficulties by the lidar points alone, of which this car has enough for level 1.
    for mode, level_1 in (("official", 0), ("pct", 1)):
        rows = [row for row in evaluate(truth, pred, mode=mode) if (row.type, row.range) == ("VEHICLE", "all")]
        assert {row.level: row.objects for row in rows} == {1: level_1, 2: 1}


def test_pct_drops_truths_without_an_image_box(tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR])
    pred = write_folder(tmp_path, "pred", [CAR], scores=[0.5])
    label = truth / "000000.txt"
    label.write_text(label.read_text().replace(" 60.000000000 60.000000000", " 10.000000000 60.000000000"))
    assert evaluate(truth, pred)[0].objects == 1
    assert evaluate(truth, pred, mode="pct")[0].objects == 0
