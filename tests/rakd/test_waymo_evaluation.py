"""Waymo's metric against the devkit's own numbers, and rule by rule."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: it comes with the extra waymo")
from waymo_objects import CAR, objects, scored, table

from rakd.evaluation.waymo import IOU, evaluate, read_bin, write_bin
from rakd.evaluation.waymo.curves import Counts, average_precision, quantile_cutoffs
from rakd.evaluation.waymo.objects import LEVELS, TYPES
from rakd.evaluation.waymo.overlaps import box_overlap
from rakd.evaluation.waymo.scoring import ALL, RANGES, evaluate_objects

# The header comment of compute_detection_let_metrics_main.cc in the devkit, commit 99a4cb3: APL, AP, APH at LEVEL_2.
LET = {
    ("VEHICLE", "all"): ("0.211287", "0.23023", "0.181574"),
    ("VEHICLE", "0-30"): ("0.158502", "0.200029", "0.163429"),
    ("VEHICLE", "30-50"): ("0.231184", "0.244745", "0.205553"),
    ("VEHICLE", "50-inf"): ("0.232808", "0.241251", "0.175992"),
    ("PEDESTRIAN", "all"): ("0.213379", "0.224676", "0.170878"),
    ("PEDESTRIAN", "0-30"): ("0.214398", "0.228197", "0.17427"),
    ("PEDESTRIAN", "30-50"): ("0.202346", "0.21114", "0.158337"),
    ("PEDESTRIAN", "50-inf"): ("0.193137", "0.201656", "0.158395"),
    ("SIGN", "all"): ("0.0989853", "0.100288", "0.0797784"),
    ("SIGN", "0-30"): ("0.0196413", "0.0196586", "0.018337"),
    ("SIGN", "30-50"): ("0.191365", "0.191489", "0.150585"),
    ("SIGN", "50-inf"): ("0.149141", "0.151854", "0.125403"),
    **{("CYCLIST", name): ("0", "0", "0") for name in (ALL, *RANGES)},
}


@pytest.fixture(scope="module")
def fakes():
    """The devkit's fake boxes, where RAKD_WAYMO_FAKES says."""
    root = os.environ.get("RAKD_WAYMO_FAKES")
    if not root:
        pytest.skip("RAKD_WAYMO_FAKES is not set: it names a folder with the devkit's fake boxes")
    return Path(root)


def expected(fakes):
    with (fakes / "expected.csv").open() as file:
        rows = {(row["type"], row["range"], int(row["level"])): (row["AP"], row["APH"]) for row in csv.DictReader(file)}
    # All zeros, which the file leaves out.
    return rows | {("CYCLIST", name, level): ("0", "0") for name in RANGES for level in LEVELS}


def turned_pair(predictions):
    """The prediction that is a truth turned by π, whose overlap of 1 the devkit's polygons lose."""
    x, y, heading = predictions.boxes[:, 0], predictions.boxes[:, 1], predictions.boxes[:, 6]
    found = (np.abs(x - 34.4048) < 5e-5) & (np.abs(y + 0.635) < 5e-4) & (np.abs(heading + 0.96856) < 5e-6)
    assert found.sum() == 1
    return int(found.argmax())


# The devkit's own numbers


def test_every_printed_value_without_the_turned_pair(fakes, tmp_path):
    """All 32 pairs, digit by digit, once the prediction of that pair cannot match: it stands across there."""
    predictions = read_bin(fakes / "fake_predictions.bin")
    predictions.boxes[turned_pair(predictions), 6] += np.pi / 2
    write_bin(tmp_path / "pred.bin", predictions)
    assert table(evaluate(fakes / "fake_ground_truths.bin", tmp_path / "pred.bin")) == expected(fakes)


def test_only_four_rows_differ_with_the_turned_pair(fakes):
    rows = table(evaluate(fakes / "fake_ground_truths.bin", fakes / "fake_predictions.bin"))
    own = {
        ("VEHICLE", "all", 1): ("0.209682", "0.16354"),
        ("VEHICLE", "all", 2): ("0.206809", "0.16123"),
        ("VEHICLE", "30-50", 1): ("0.276636", "0.233326"),
        ("VEHICLE", "30-50", 2): ("0.274075", "0.231166"),
    }
    assert rows == expected(fakes) | own


def test_the_turned_pair_is_one_box(fakes):
    truth, predictions = read_bin(fakes / "fake_ground_truths.bin"), read_bin(fakes / "fake_predictions.bin")
    assert (truth.points > 0).sum() == 905
    assert len(predictions) == 2263
    row = turned_pair(predictions)
    assert predictions.scores[row] == pytest.approx(0.145, abs=5e-4)
    key = predictions.keys[predictions.frames[row]]
    own = truth.boxes[(truth.frames == truth.keys.index(key)) & (truth.types == 1)]
    overlap = box_overlap(own, np.repeat(predictions.boxes[[row]], len(own), axis=0))
    assert overlap.max() == pytest.approx(1, abs=1e-6)
    assert np.abs(own[overlap.argmax(), 6] - predictions.boxes[row, 6]) == pytest.approx(np.pi, abs=1e-6)


def test_let_agrees_in_every_printed_digit(fakes):
    rows = evaluate(fakes / "fake_ground_truths.bin", fakes / "fake_predictions.bin", let=True)
    assert {(r.type, r.range): tuple(f"{v:.6g}" for v in (r.apl, r.ap, r.aph)) for r in rows if r.level == 2} == LET


# The rules one by one


def box(length, x=0.0, heading=0.0):
    """As `detection_metrics_test.cc` builds them: overlaps with the box of length 100 are length / 100."""
    return [x, 0, 0, length, 1, 1, heading]


def test_devkit_one_shard():
    """detection_metrics_test.cc, OneShard: precision 1/2 and 1 at recall 1."""
    truth = objects([box(100), box(100)], frames=[0, 1])
    predictions = objects([box(90), box(60)] * 2, scores=[0, 0.5] * 2, frames=[0, 0, 1, 1])
    row = scored(truth, predictions, thresholds=dict.fromkeys(TYPES, 0.5))["VEHICLE", "all", 2]
    assert (row.ap, row.aph) == pytest.approx((1, 1), abs=1e-6)
    assert row.objects == 2


def test_devkit_multiple_types():
    """detection_metrics_test.cc, MultipleTypes, type by type: both vehicles' and both pedestrians' scores are low."""
    truth = objects([box(100), box(100)], types=[1, 2])
    predictions = objects([box(90), box(60), box(60), box(80)], types=[1, 1, 2, 2], scores=[0, 0.25, 0.5, 0.75])
    rows = scored(truth, predictions, thresholds=dict.fromkeys(TYPES, 0.5))
    for name in ("VEHICLE", "PEDESTRIAN"):
        assert rows[name, "all", 2].ap == pytest.approx(1, abs=1e-6)
        assert rows[name, "0-30", 1].ap == pytest.approx(1, abs=1e-6)
        assert rows[name, "30-50", 1].ap == 0


def test_the_matching_changes_with_the_cutoff():
    """At cut-off 0 the better overlap matches and the other is false; above its score, the other matches."""
    from rakd.evaluation.waymo.matching import match

    found = match(np.zeros(2, int), np.arange(2), np.array([900_000, 600_000]), np.array([1, 2]))
    assert sorted(zip(found.pair.tolist(), found.start.tolist(), found.stop.tolist(), strict=True)) == [
        (0, 0, 1),
        (1, 1, 2),
    ]


def test_levels():
    from rakd.evaluation.waymo.objects import levels

    truth = objects([box(1)] * 7, points=[0, 1, 5, 6, 5, 9, 0], difficulty=[0, 0, 0, 0, 1, 2, 1])
    assert levels(truth).tolist() == [0, 2, 2, 1, 1, 2, 0]


def test_level_1_credits_level_2_hits():
    """A found LEVEL_2 object and a missed LEVEL_1 object: LEVEL_1 has recall 1/2 of 'two', and so has LEVEL_2."""
    truth = objects([box(4), box(4, x=10)], points=[3, 50])
    predictions = objects([box(4)], scores=0.5)
    rows = scored(truth, predictions)
    assert rows["VEHICLE", "all", 1].ap == rows["VEHICLE", "all", 2].ap == pytest.approx(0.5, abs=1e-6)
    assert rows["VEHICLE", "all", 1].objects == 1
    # A missed LEVEL_2 object is not missed at LEVEL_1.
    rows = scored(truth, objects([box(4, x=10)], scores=0.5))
    assert rows["VEHICLE", "all", 1].ap == pytest.approx(1, abs=1e-6)
    assert rows["VEHICLE", "all", 2].ap == pytest.approx(0.5, abs=1e-6)


def test_a_prediction_falls_in_its_own_range():
    """Truth at 29.9 m, prediction at 30.1 m: together they match, in ranges neither finds the other."""
    rows = scored(objects([box(4, x=29.9)]), objects([box(4, x=30.1)], scores=0.5))
    assert rows["VEHICLE", "all", 1].ap == pytest.approx(1, abs=1e-6)
    assert rows["VEHICLE", "0-30", 1].ap == 0
    assert (rows["VEHICLE", "0-30", 1].objects, rows["VEHICLE", "30-50", 1].objects) == (1, 0)
    rows = scored(objects([box(4, x=30)]), objects([box(4, x=30)], scores=0.5))
    assert rows["VEHICLE", "30-50", 1].ap == pytest.approx(1, abs=1e-6)


def test_no_label_zones_forgive_false_positives_but_keep_hits():
    truth = objects([box(4)])
    false = objects([box(4), box(4, x=50)], scores=[0.2, 0.9])
    assert scored(truth, false)["VEHICLE", "all", 1].ap == pytest.approx(0.5, abs=1e-6)
    forgiven = replace(false, in_no_label_zone=np.array([False, True]))
    assert scored(truth, forgiven)["VEHICLE", "all", 1].ap == pytest.approx(1, abs=1e-6)
    inside = objects([box(4)], scores=0.5, zones=True)
    assert scored(truth, inside)["VEHICLE", "all", 1].ap == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("turn", "agreement"), [(0, 1), (np.pi / 2, 0.5), (np.pi, 0), (-np.pi, 0), (2 * np.pi, 1)])
def test_heading(turn, agreement):
    square = [5, 0, 0, 2, 2, 2, 3.0]
    row = scored(objects([square]), objects([[*square[:6], 3.0 + turn]], scores=0.5))["VEHICLE", "all", 1]
    assert (row.ap, row.aph) == pytest.approx((1, agreement), abs=1e-6)


def test_thin_boxes_overlap_nothing():
    thin = [5, 0, 0, 4, 0.01, 2, 0]
    assert scored(objects([thin]), objects([thin], scores=0.5))["VEHICLE", "all", 1].ap == 0


def test_score_cutoffs_are_hundredths():
    """A false positive that scores a little more than the hit, but within one hundredth, cannot be cut off."""
    truth = objects([box(4)])
    for score, ap in ((0.505, 0.5), (0.51, 0.5), (0.495, 1.0)):
        predictions = objects([box(4), box(4, x=50)], scores=[0.501, score])
        assert scored(truth, predictions)["VEHICLE", "all", 1].ap == pytest.approx(ap, abs=1e-6), score


def test_quantile_cutoffs():
    scores = np.linspace(0.9, 0, 23).astype(np.float32)  # 10 buckets: the devkit makes sizes 2, 2, ..., 3, 3, 3
    ordered = np.sort(scores)
    sizes = [2] * 7 + [3] * 3
    expected_ = [ordered[0], *(ordered[sum(sizes[: i + 1])] for i in range(9)), 1]
    np.testing.assert_array_equal(quantile_cutoffs(scores, 11), np.array(expected_, np.float32))
    np.testing.assert_allclose(quantile_cutoffs(scores[:11], 11), np.linspace(0, 1, 11), atol=1e-7)
    over = quantile_cutoffs(np.arange(100).astype(np.float32), 11)
    assert over.tolist() == [0] + [1] * 10  # held to 1: the collapse that rescaling avoids


def test_average_precision_by_hand():
    """Recall 0.5 with precision 0.8, recall 0.2 with precision 0.4: the better one holds for both."""
    counts = Counts(*(np.array(values, dtype=np.float64) for values in ((4, 2), (4, 2), (4, 2), (1, 3), (6, 8))))
    # 4 / 10 = 0.4 recall at precision 0.8; 2 / 10 = 0.2 at 0.4, raised to 0.8.
    assert average_precision(counts, counts.hits) == pytest.approx(0.4 * 0.8, abs=1e-6)


def test_average_precision_ends_early():
    """Precision falls between points a step of 0.05 apart, not over the whole gap in recall."""
    counts = Counts(*(np.array(values, dtype=np.float64) for values in ((10, 5), (10, 5), (10, 5), (10, 0), (0, 5))))
    # Recall 1 at precision 1/2, recall 1/2 at precision 1: 1/2 holds down to 0.55, then rises to 1 at 0.5.
    assert average_precision(counts, counts.hits) == pytest.approx(0.5 + 0.05 * 0.75 + 0.45 * 0.5, abs=1e-5)


def test_nothing_found_and_nothing_to_find():
    nothing = objects(np.zeros((0, 7)))
    something = objects([CAR], scores=0.5)
    for truth, predictions in ((nothing, something), (something, nothing), (nothing, nothing)):
        for mode in ("official", "pct"):
            assert {row.ap for row in evaluate_objects(truth, predictions, mode=mode, thresholds=IOU["official"])} == {
                0.0
            }


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.sparse.csgraph", None)
    with pytest.raises(ModuleNotFoundError, match=r"scipy is not installed; run: pip install 'rakd\[waymo\]'"):
        scored(objects([CAR]), objects([CAR], scores=0.5))
