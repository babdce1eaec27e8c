"""Waymo's metric against brute force: all matchings of small frames, polygons cut point by point, sums in a loop."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="scipy is not installed: it comes with the extra waymo")
from waymo_objects import draw

from rakd.evaluation.waymo import IOU
from rakd.evaluation.waymo.objects import LEVELS, TYPES
from rakd.evaluation.waymo.overlaps import box_overlap, overlap_bound
from rakd.evaluation.waymo.scoring import ALL, RANGES, evaluate_objects


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


@given(
    st.integers(0, 10**6),
    st.integers(1, 2),
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from(["official", "papers"]),
)
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
    a, b = (
        np.column_stack([rng.normal(0, 1, (200, 3)), rng.uniform(0.005, 4, (200, 3)), rng.uniform(-9, 9, 200)])
        for _ in "ab"
    )
    b[:20] = a[:20]
    overlap = box_overlap(a, b)
    assert (overlap_bound(a, b) >= overlap - 1e-12)[overlap > 0].all()
    assert (overlap > 0.3).sum() >= 19
    sized = np.flatnonzero((np.minimum(a, b)[:, 3:6] > 0.01).all(axis=1))
    slow = [slow_overlap(a[i], b[i]) for i in sized]
    np.testing.assert_allclose(overlap[sized], slow, atol=1e-9)
    assert not overlap[(np.minimum(a, b)[:, 3:6] <= 0.01).any(axis=1)].any()
