"""The evaluation rule by rule, with answers by hand, and what it says about bad input."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rakd.evaluation.curves import POINTS, precision_curves, recall_thresholds
from rakd.evaluation.kitti import evaluate
from rakd.evaluation.matching import Counts

CAR = "Car 0 0 0.5 100 100 200 200 1.5 1.6 4 1 1.7 20 0.6"

DONTCARE = "DontCare -1 -1 -10 {:.2f} {:.2f} {:.2f} {:.2f} -1 -1 -1 -1000 -1000 -1000 -10"


def write(folder, frames):
    folder.mkdir()
    for i, rows in enumerate(frames):
        (folder / f"{i:06d}.txt").write_text("".join(f"{row}\n" for row in rows))
    return folder


def score(tmp_path, truth, detections):
    return evaluate(write(tmp_path / "gt", truth), write(tmp_path / "pred", detections), progress=False)


def test_perfect_results(tmp_path):
    # With n <= 41 objects perfect results give (n - 1) / 40: the first point does not count.
    result = score(tmp_path, [[CAR]] * 5, [[f"{CAR} 0.{i + 1}"] for i in range(5)])
    for metric in ("bbox", "aos", "bev", "3d"):
        assert result["Car"][metric]["R40"] == pytest.approx([10.0] * 3)
        assert result["Car"][metric]["objects"] == [5, 5, 5]
    assert result["Cyclist"]["3d"] == {
        "evaluated": False,
        "R40": [0.0] * 3,
        "R11": [0.0] * 3,
        "precision": [[0.0] * 41] * 3,
        "objects": [0] * 3,
    }


def test_loose_overlaps_loosen_3d_and_above_but_not_2d(tmp_path):
    # Moved by 1 of 4 metres along its length: overlap 3 / 5 from above and in space; 2D: 70 / 130.
    truth = CAR.replace("20 0.6", "20 0")
    moved = truth.replace("1 1.7 20", "2 1.7 20").replace("100 100 200 200", "130 100 230 200")
    gt, pred = write(tmp_path / "gt", [[truth]] * 5), write(tmp_path / "pred", [[f"{moved} 0.5"]] * 5)
    official, loose = (evaluate(gt, pred, overlaps=name, progress=False)["Car"] for name in ("official", "loose"))
    assert [official[metric]["R40"][0] for metric in ("bbox", "bev", "3d")] == [0, 0, 0]
    assert [loose[metric]["R40"][0] for metric in ("bbox", "bev", "3d")] == pytest.approx([0, 10, 10])
    with pytest.raises(ValueError, match="overlaps must be one of official, loose, got 'tight'"):
        evaluate(gt, pred, overlaps="tight")


def test_precision_without_detections_is_nan(tmp_path):
    # Recall pass: the van, ignored, takes the row of score 0.9, so the car takes the one of 0.8. Precision
    # pass at 0.8: the van takes the row that fits it better, the other one does not reach the car and lies in
    # the DontCare region. Neither hits nor false alarms: 0/0.
    truth = [
        "Van 0 0 0 100 100 200 200 1.5 1.6 4 1 1.7 20 0.6",
        CAR.replace("100 100 200 200", "110 100 210 200"),
        DONTCARE.format(0, 0, 195, 300),
    ]
    detections = [CAR.replace("100 100 200 200", "90 100 190 200") + " 0.9", f"{CAR} 0.8"]
    figures = score(tmp_path, [truth], [detections])["Car"]["bbox"]
    np.testing.assert_array_equal(figures["precision"][1], [math.nan] + [0.0] * 40)
    assert figures["R40"] == [0.0] * 3
    assert all(math.isnan(value) for value in figures["R11"])


def test_threshold_curve_and_nan_stay_in_place():
    counts = Counts(np.array([1.0, 0, 2, 1]), np.array([0.0, 0, 2, 2]), np.array([0.5, 0, 1, 1]))
    precision, similarity = precision_curves(counts)
    np.testing.assert_allclose(precision[:5], [1, np.nan, 0.5, 1 / 3, 0])
    np.testing.assert_allclose(similarity[:5], [0.5, np.nan, 1 / 3, 1 / 3, 0])
    assert len(precision) == POINTS


@given(st.lists(st.floats(-5, 5), max_size=200), st.integers(0, 300))
def test_thresholds_are_scores_in_descending_order(scores, more):
    objects = len(scores) + more
    thresholds = recall_thresholds(np.array(scores), objects) if objects else np.zeros(0)
    assert len(thresholds) <= 41
    assert (np.diff(thresholds) <= 0).all()
    assert set(thresholds) <= set(scores)
    if scores and len(scores) <= 41:
        assert thresholds[-1] == min(scores)


@pytest.mark.parametrize("kind", ["gt", "pred"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Car 0 0", "expected 1. columns"),
        (CAR.replace("20", "nan") + " 0.5", "must be"),
        ("x" + CAR[3:-8], "expected"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, kind, row, message):
    rows = {"gt": [[CAR], [CAR, row]], "pred": [[], [f"{CAR} 0.5", row]]}
    if kind == "gt":
        rows["pred"][1].pop()
    else:
        rows["gt"][1].pop()
    with pytest.raises(ValueError, match=rf"{kind}/000001\.txt:2: .*{message}"):
        score(tmp_path, rows["gt"], rows["pred"])


def test_one_sided_box_names_file_and_line(tmp_path):
    with pytest.raises(ValueError, match=r"pred/000000\.txt:1: width and length must both be positive"):
        score(tmp_path, [[CAR]], [[CAR.replace("1.6", "-1") + " 0.5"]])


def test_rows_without_score_warn_once_a_file(tmp_path):
    with pytest.warns(UserWarning) as caught:
        result = score(tmp_path, [[CAR]] * 3, [[CAR, CAR, f"{CAR} 0.5"], [CAR], [f"{CAR} 1"]])
    assert sorted(str(warning.message).split(":")[0][-10:] for warning in caught) == [
        "000000.txt",
        "000001.txt",
    ]
    assert result["Car"]["3d"]["R40"] == pytest.approx([2.5] * 3)


def test_missing_files_and_folders(tmp_path):
    gt, pred = write(tmp_path / "gt", [[CAR]] * 3), write(tmp_path / "pred", [[f"{CAR} 1"]] * 2)
    with pytest.raises(FileNotFoundError, match=r"pred_dir: .*000002\.txt is not there \(1 of 3 frames"):
        evaluate(gt, pred)
    with pytest.raises(FileNotFoundError, match=r"gt_dir: .* is not there"):
        evaluate(tmp_path / "no", pred)
    with pytest.raises(NotADirectoryError, match=r"pred_dir: .* is not a folder"):
        evaluate(gt, gt / "000000.txt")
    empty = write(tmp_path / "empty", [])
    (empty / "readme.txt").write_text("not a frame")
    with pytest.raises(ValueError, match=r"holds no label files NNNNNN\.txt"):
        evaluate(empty, pred)
    with pytest.raises(ValueError, match="frames must list at least one"):
        evaluate(gt, pred, frames=[])
    with pytest.raises(ValueError, match="frames must list each frame once, 000000 stands"):
        evaluate(gt, pred, frames=["000000", "000000"])


def test_frames_choose_a_split(tmp_path):
    gt, pred = write(tmp_path / "gt", [[CAR]] * 3), write(tmp_path / "pred", [[f"{CAR} 1"]] * 2)
    result = evaluate(gt, pred, frames=["000000", "000001"])
    assert result["Car"]["3d"]["objects"] == [2, 2, 2]
    with pytest.raises(FileNotFoundError, match=r"gt_dir: .*000009\.txt"):
        evaluate(gt, pred, frames=["000009"])


def test_frames_without_any_objects(tmp_path):
    result = score(tmp_path, [[], []], [[], [f"{CAR} 0.5"]])
    assert result["Car"]["3d"]["evaluated"]
    assert result["Car"]["3d"]["R40"] == [0.0] * 3
