"""Waymo's metric: against the devkit's own numbers, against brute force, and the rules one by one."""

import csv
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="scipy is not installed: it comes with the extra waymo")

from rakd.data.waymo_convert import calibration_text
from rakd.data.waymo_geometry import optical_from_vehicle, to_optical
from rakd.evaluation.waymo import IOU, WaymoObjects, evaluate, read_bin, write_bin
from rakd.evaluation.waymo.curves import Counts, average_precision, quantile_cutoffs
from rakd.evaluation.waymo.objects import LEVELS, TYPES
from rakd.evaluation.waymo.overlaps import box_overlap, overlap_bound
from rakd.evaluation.waymo.report import format_table, write_json
from rakd.evaluation.waymo.scoring import ALL, RANGES, evaluate_objects
from rakd.geometry import Calibration

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


def table(rows):
    """AP and APH by type, range and level, with the digits that the devkit prints."""
    return {(row.type, row.range, row.level): (f"{row.ap:.6g}", f"{row.aph:.6g}") for row in rows}


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


# Brute force

_SCORES = (0.0, 0.004, 0.3, 0.5, 0.995, 1.0)


def draw(seed, frames, truths, predictions):
    """Crowded frames: predictions are noisy copies, several of one truth."""
    rng = np.random.default_rng(seed)
    keys = [("segment", i, 0) for i in range(frames)]

    def objects(rows, types, boxes, scores, zones, points, difficulty):
        return WaymoObjects(
            keys, rows, types.astype(np.int8), boxes, scores.astype(np.float32), zones, points, difficulty.astype(np.int8)
        )

    count = frames * truths
    boxes = np.empty((count, 7))
    centers = np.repeat(rng.choice([20, 29.8, 49.8], (frames, 1)), truths, axis=0)
    boxes[:, :2] = rng.uniform(-0.4, 0.4, (count, 2)) + centers * [1, 0.05]
    boxes[:, 2] = rng.uniform(-0.2, 0.2, count)
    boxes[:, 3:6] = rng.uniform(2, 2.6, (count, 3))
    boxes[:, 6] = rng.uniform(-0.3, 0.3, count) + rng.choice([0, np.pi], count)
    types = rng.choice([1, 2, 0], count, p=[0.7, 0.2, 0.1])
    none = np.zeros(count, dtype=np.bool_)
    rows = np.repeat(np.arange(frames), truths)
    points = rng.choice([0, 4, 5, 6, 90], count)
    truth = objects(rows, types, boxes, np.ones(count), none, points, rng.choice([0, 0, 1, 2], count))
    count = frames * predictions
    rows = np.repeat(np.arange(frames), predictions)
    found = np.empty((count, 7))
    kinds = np.ones(count)
    for i, frame in enumerate(rows):
        source = int(rng.integers(truths)) + frame * truths if truths else -1
        if source >= 0 and rng.random() < 0.85:
            kinds[i] = max(types[source], 1)
            found[i] = boxes[source] + rng.normal(0, 0.15, 7)
            found[i, 3:6] = boxes[source, 3:6] * rng.uniform(0.9, 1.1, 3)
        else:
            found[i] = [30, 0, 0, 2, 2, 2, rng.uniform(-3, 3)]
            found[i, :3] += rng.normal(0, 5, 3)
    scores, zones = rng.choice(_SCORES, count), rng.random(count) < 0.15
    nothing = np.zeros(count, dtype=np.int64)
    return truth, objects(rows, kinds, found, scores, zones, nothing, nothing)


def slow_overlap(a, b):
    """Overlap of two boxes by cutting one rectangle with the sides of the other, point by point."""

    def corners(box):
        x, y, _, length, width, _, heading = box
        ring = ((1, 1), (-1, 1), (-1, -1), (1, -1))
        c, s = np.cos(heading), np.sin(heading)
        return [(x + (u * length * c - v * width * s) / 2, y + (u * length * s + v * width * c) / 2) for u, v in ring]

    polygon, sides = corners(a), corners(b)
    for (x1, y1), (x2, y2) in zip(sides, sides[1:] + sides[:1], strict=True):
        left = [(x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in polygon]
        cut = []
        for i, (p, d) in enumerate(zip(polygon, left, strict=True)):
            q, e = polygon[(i + 1) % len(polygon)], left[(i + 1) % len(polygon)]
            if d >= 0:
                cut.append(p)
            if d * e < 0:
                cut.append(tuple(u + d / (d - e) * (v - u) for u, v in zip(p, q, strict=True)))
        polygon = cut
    area = abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2
    tall = min(a[2] + a[5] / 2, b[2] + b[5] / 2) - max(a[2] - a[5] / 2, b[2] - b[5] / 2)
    shared = area * max(tall, 0)
    return shared / (a[3] * a[4] * a[5] + b[3] * b[4] * b[5] - shared)


def slow_matching(overlaps, threshold):
    """The matching with the largest sum, of all that there are: truth of each prediction, or None."""
    best, chosen = -1, ()
    predictions = range(overlaps.shape[1])
    options = [[None, *(g for g in range(overlaps.shape[0]) if overlaps[g, d] >= threshold)] for d in predictions]
    for matching in itertools.product(*options):
        taken = [g for g in matching if g is not None]
        if len(set(taken)) == len(taken):
            total = sum(round(overlaps[g, d] * 1e6) for d, g in enumerate(matching) if g is not None)
            if total > best:
                best, chosen = total, matching
    return chosen


def slow_average(precision, recall):
    """The devkit's rule, in double precision: best precision from each recall on, steps of at most 0.05."""
    curve = {0.0: 1.0}
    for p, r in zip(precision, recall, strict=True):
        curve[r] = max(curve.get(r, 0.0), 1.0 if r == 0 else p)
    recalls = sorted(curve)
    best = {r: max(curve[s] for s in recalls if s >= r) for r in recalls}
    points = [(recalls[-1], best[recalls[-1]])]
    for low, high in reversed(list(itertools.pairwise(recalls))):
        r = high - 0.05
        while r - low > 1e-6:
            points.append((r, best[high]))
            r -= 0.05
        points.append((low, best[low]))
    if len(points) > 1:
        points[-1] = (points[-1][0], points[-2][1])
    return sum((r1 - r2) * (p1 + p2) / 2 for (r1, p1), (r2, p2) in itertools.pairwise(points))


def slow_evaluate(truth, predictions, thresholds):
    level = [
        0 if points == 0 or kind == 0 else int(given) or (2 if points <= 5 else 1)
        for points, kind, given in zip(truth.points, truth.types, truth.difficulty, strict=True)
    ]
    bounds = {ALL: (0, np.inf), **RANGES}
    rows = {}
    for (name, number), (range_name, (low, high)) in itertools.product(TYPES.items(), bounds.items()):
        def here(objects, i, number=number, low=low, high=high):
            return objects.types[i] == number and low <= np.linalg.norm(objects.boxes[i, :3]) < high

        own = [g for g in range(len(truth)) if level[g] and here(truth, g)]
        found = [d for d in range(len(predictions)) if here(predictions, d)]
        curves = {want: ([], [], []) for want in LEVELS}
        for cutoff in np.array([i * 0.01 for i in range(100)] + [1.0], dtype=np.float32):
            hits, heading, false = 0, 0.0, 0
            missed = dict.fromkeys(LEVELS, 0)
            for frame in range(len(truth.keys)):
                gs = [g for g in own if truth.frames[g] == frame]
                ds = [d for d in found if predictions.frames[d] == frame and predictions.scores[d] >= cutoff]
                overlaps = np.array([[slow_overlap(truth.boxes[g], predictions.boxes[d]) for d in ds] for g in gs])
                matching = slow_matching(overlaps.reshape(len(gs), len(ds)), thresholds[name])
                for d, g in zip(ds, matching, strict=True):
                    if g is None:
                        false += not predictions.in_no_label_zone[d]
                        continue
                    hits += 1
                    turn = predictions.boxes[d, 6] - truth.boxes[gs[g], 6]
                    heading += 1 - abs(np.arctan2(np.sin(turn), np.cos(turn))) / np.pi
                for want in LEVELS:
                    missed[want] += sum(level[g] <= want for i, g in enumerate(gs) if i not in matching)
            for want in LEVELS:
                precision, headed, recall = curves[want]
                precision.append(hits / (hits + false) if hits + false else 0)
                headed.append(heading / (hits + false) if hits + false else 0)
                recall.append(hits / (hits + missed[want]) if hits + missed[want] else 0)
        for want in LEVELS:
            precision, headed, recall = curves[want]
            rows[name, range_name, want] = (slow_average(precision, recall), slow_average(headed, recall))
    return rows


@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(0, 3), st.integers(0, 4), st.sampled_from(["official", "papers"]))
@settings(max_examples=40)
def test_brute_force(seed, frames, truths, predictions, iou):
    truth, predictions = draw(seed, frames, truths, predictions)
    rows = evaluate_objects(truth, predictions, mode="official", thresholds=IOU[iou])
    slow = slow_evaluate(truth, predictions, IOU[iou])
    assert len(rows) == 4 * 4 * 2
    for row in rows:
        assert (row.ap, row.aph) == pytest.approx(slow[row.type, row.range, row.level], abs=2e-6)


def test_brute_force_draws_what_matters():
    """The drawn frames hold groups that need an assignment, hits and misses at both levels, and no-label zones."""
    from rakd.evaluation.waymo import matching

    groups, values = [], []
    original = matching._match_group
    matching._match_group = lambda *arguments: groups.append(len(arguments[0])) or original(*arguments)
    try:
        for seed in range(40):
            truth, predictions = draw(seed, 2, 3, 4)
            rows = evaluate_objects(truth, predictions, mode="official", thresholds=IOU["papers"])
            values += [row.ap for row in rows if row.type == "VEHICLE"]
    finally:
        matching._match_group = original
    assert len(groups) > 10
    assert sum(0.05 < value < 0.95 for value in values) > 100


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_no_pair_is_left_out_by_the_bound(seed):
    rng = np.random.default_rng(seed)
    a, b = (np.column_stack([rng.normal(0, 1, (200, 3)), rng.uniform(0.005, 4, (200, 3)), rng.uniform(-9, 9, 200)]) for _ in "ab")
    b[:20] = a[:20]
    overlap = box_overlap(a, b)
    assert (overlap_bound(a, b) >= overlap - 1e-12)[overlap > 0].all()
    assert (overlap > 0.3).sum() >= 19
    sized = np.flatnonzero((np.minimum(a, b)[:, 3:6] > 0.01).all(axis=1))
    slow = [slow_overlap(a[i], b[i]) for i in sized]
    np.testing.assert_allclose(overlap[sized], slow, atol=1e-9)
    assert not overlap[(np.minimum(a, b)[:, 3:6] <= 0.01).any(axis=1)].any()


# The rules one by one


def objects(boxes, *, scores=None, types=None, points=50, difficulty=0, zones=False, frames=None):
    """Objects of one frame each, or of the frames given."""
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 7)
    count = len(boxes)
    frames = np.zeros(count, dtype=np.int64) if frames is None else np.array(frames, dtype=np.int64)
    fill = lambda value, kind: np.broadcast_to(np.array(value, dtype=kind), count).copy()  # noqa: E731
    return WaymoObjects(
        [("s", i, 0) for i in range(int(frames.max(initial=0)) + 1)],
        frames,
        fill(1 if types is None else types, np.int8),
        boxes,
        fill(1.0 if scores is None else scores, np.float32),
        fill(zones, np.bool_),
        fill(points, np.int64),
        fill(difficulty, np.int8),
    )


def scored(truth, predictions, **options):
    options = {"mode": "official", "thresholds": IOU["official"]} | options
    rows = evaluate_objects(truth, predictions, **options)
    return {(row.type, row.range, row.level): row for row in rows}


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
    assert sorted(zip(found.pair.tolist(), found.start.tolist(), found.stop.tolist(), strict=True)) == [(0, 0, 1), (1, 1, 2)]


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


# The two modes

CAR = [20.0, 0.0, 0.9, 4.8, 2.0, 1.8, 0.0]


def write_folder(root, name, boxes, *, scores=None, transform=None, types=None, points=50):
    """A folder of one frame in KITTI's form, with its calibration."""
    transform = optical_from_vehicle(np.eye(4)) if transform is None else transform
    location, dimensions, rotation = to_optical(np.array(boxes, dtype=np.float64), transform)
    rows = []
    for i in range(len(boxes)):
        numbers = [0, 0, 0, 10, 10, 60, 60, *dimensions[i], *location[i], rotation[i]]
        last = [points] if scores is None else [scores[i]]
        words = [f"{value:.9f}" for value in numbers[2:]]
        rows.append(" ".join(["Car" if types is None else types[i], "0", "0", *words, *map(str, last)]) + "\n")
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "000000.txt").write_text("".join(rows))
    (root / "calib").mkdir(exist_ok=True)
    camera = Calibration(np.array([[2000.0, 0, 960, 0], [0, 2000, 640, 0], [0, 0, 1, 0]]))
    (root / "calib" / "000000.txt").write_text(calibration_text(camera, transform))
    return root / name


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
    ("mode", "depth", "vertical"), [("official", 4.8 * 0.3 / 1.7, 1.8 * 0.3 / 1.7), ("pct", 1.8 * 0.3 / 1.7, 4.8 * 0.3 / 1.7)]
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
    with pytest.raises(ValueError, match=r"scores must lie in 0\.\.1, they reach from 0\.5 to 7: the metric cuts at") as caught:
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
        write_json(tmp_path / "e.json", [rows])
        assert f'"mode": "{mode}"' in (tmp_path / "e.json").read_text()
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
        ({"iou": {"VEHICLE": 0.5}}, "iou must have a number for each of VEHICLE, PEDESTRIAN, SIGN, CYCLIST, got VEHICLE"),
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
    counts = {(row.level, row.range): row.objects for row in evaluate(truth, pred) if row.type == "VEHICLE"}
    assert (counts[1, "all"], counts[2, "all"]) == (0, 1)


def test_pct_drops_truths_without_an_image_box_and_annotated_difficulties_count_in_official_only(tmp_path):
    truth = write_folder(tmp_path, "label_2", [CAR])
    pred = write_folder(tmp_path, "pred", [CAR], scores=[0.5])
    label = truth / "000000.txt"
    label.write_text(label.read_text().replace(" 60.000000000 60.000000000", " 10.000000000 60.000000000"))
    assert evaluate(truth, pred)[0].objects == 1
    assert evaluate(truth, pred, mode="pct")[0].objects == 0


def test_nothing_found_and_nothing_to_find():
    nothing = objects(np.zeros((0, 7)))
    something = objects([CAR], scores=0.5)
    for truth, predictions in ((nothing, something), (something, nothing), (nothing, nothing)):
        for mode in ("official", "pct"):
            assert {row.ap for row in evaluate_objects(truth, predictions, mode=mode, thresholds=IOU["official"])} == {0.0}


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.sparse.csgraph", None)
    with pytest.raises(ModuleNotFoundError, match=r"scipy is not installed; run: pip install 'rakd\[waymo\]'"):
        scored(objects([CAR]), objects([CAR], scores=0.5))
