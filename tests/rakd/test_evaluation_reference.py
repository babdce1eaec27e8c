"""The evaluation against a plain transcription of the rules, on random frames."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rakd.evaluation.kitti import evaluate
from rakd.evaluation.overlaps import clipped_area, rectangle_corners

# ---- The rules, one loop after the other: slow, and as close to their wording as can be. ----

LEVELS = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))
STRICT = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
LOOSE = {"Car": 0.5, "Pedestrian": 0.25, "Cyclist": 0.25}
LIMITS = {
    "official": {"bbox": STRICT, "bev": STRICT, "3d": STRICT},
    "loose": {"bbox": STRICT, "bev": LOOSE, "3d": LOOSE},
}
NEIGHBOURS = {"Car": "van", "Pedestrian": "person_sitting", "Cyclist": ""}


@dataclass
class Row:
    type: str
    trunc: float
    occ: float
    alpha: float
    box: list[float]
    h: float
    w: float
    length: float
    x: float
    y: float
    z: float
    ry: float
    score: float = 0.0

    @classmethod
    def parse(cls, line):
        name, *rest = line.split()
        v = [float(text) for text in rest]
        return cls(name.lower(), v[0], v[1], v[2], v[3:7], *v[7:14], *v[14:15])


def reference_evaluate(truth, detections, limits):
    """``{class: {metric: (evaluated, R40 by level, R11 by level)}}`` of lists of rows by frame."""
    everything = [row for frame in detections for row in frame]
    has_alpha = not any(row.alpha == -10 for row in everything)
    result = {}
    for name in STRICT:
        own = [row for row in everything if row.type == name.lower()]
        flat = [row for row in own if row.x != -1000 and row.z != -1000 and row.w > 0 and row.length > 0]
        gates = {
            "bbox": any(row.box[0] >= 0 for row in own),
            "bev": bool(flat),
            "3d": any(row.y != -1000 and row.h > 0 for row in flat),
        }
        gates["aos"] = gates["bbox"] and has_alpha
        result[name] = {metric: (gate, [], []) for metric, gate in gates.items()}
        for metric in ("bbox", "bev", "3d"):
            for level in LEVELS:
                curves = [[0.0] * 41, [0.0] * 41]
                if gates[metric]:
                    curves = reference_curves(truth, detections, name, metric, level, limits[metric][name])
                names = ("bbox", "aos") if metric == "bbox" else (metric,)
                for output, curve in zip(names, curves, strict=False):
                    evaluated, r40, r11 = result[name][output]
                    curve = curve if evaluated else [0.0] * 41
                    r40.append(100 / 40 * sum(curve[1:]))
                    r11.append(100 / 11 * sum(curve[::4]))
    return result


def reference_curves(truth, detections, name, metric, level, limit):
    frames = list(zip(truth, detections, strict=True))
    scores, n_gt = [], 0
    for gts, dets in frames:
        n_gt += sum(truth_flag(row, name, level) == 0 for row in gts)
        scores += reference_match(gts, dets, name, metric, level, limit, None)[0]
    thresholds = []
    recall = 0.0
    scores.sort(reverse=True)
    for i, score in enumerate(scores):
        left = (i + 1) / n_gt
        right = (i + 2) / n_gt if i < len(scores) - 1 else left
        if i < len(scores) - 1 and right - recall < recall - left:
            continue
        thresholds.append(score)
        recall += 1 / 40
    curves = [[0.0] * 41, [0.0] * 41]
    for k, threshold in enumerate(thresholds):
        tp = fp = similarity = 0
        for gts, dets in frames:
            hits, false, similar = reference_match(gts, dets, name, metric, level, limit, threshold)
            tp, fp, similarity = tp + len(hits), fp + false, similarity + similar
        for curve, value in zip(curves, (tp, similarity), strict=True):
            curve[k] = value / (tp + fp) if tp + fp else math.nan
    for curve in curves:
        for k in range(41):
            best = curve[k]
            for other in curve[k:]:
                if best < other:
                    best = other
            curve[k] = best
    return curves


def truth_flag(row, name, level):
    if row.type == name.lower():
        clear = row.occ <= level[1] and row.trunc <= level[2] and row.box[3] - row.box[1] > level[0]
        return 0 if clear else 1
    return 1 if row.type == NEIGHBOURS[name] else -1


def detection_flag(row, name, level):
    if abs(row.box[1] - row.box[3]) < level[0]:
        return 1
    return 0 if row.type == name.lower() else -1


def reference_match(gts, dets, name, metric, level, limit, threshold):
    """(scores of the true positives, number of false positives, sum of similarities) of one frame."""
    taken = [False] * len(dets)
    flags = [detection_flag(det, name, level) for det in dets]
    hits, similarity = [], 0.0

    def takes_part(j):
        return flags[j] != -1 and not taken[j] and (threshold is None or dets[j].score >= threshold)

    for gt in gts:
        flag = truth_flag(gt, name, level)
        if flag == -1:
            continue
        best = None
        for j, det in enumerate(dets):
            if not takes_part(j):
                continue
            shared = overlap(gt, det, metric, "union")
            if not shared > limit:
                continue
            if threshold is None:
                if det.score > (-1e7 if best is None else dets[best].score):
                    best = j
            elif flags[j] == 0:
                if best is None or flags[best] == 1 or shared > overlap(gt, dets[best], metric, "union"):
                    best = j
            elif best is None:
                best = j
        if best is None:
            continue
        taken[best] = True
        if flag == 0 and flags[best] == 0:
            hits.append(dets[best].score)
            similarity += (1 + math.cos(gt.alpha - dets[best].alpha)) / 2
    false = sum(takes_part(j) and flags[j] == 0 for j in range(len(dets)))
    for gt in gts:
        if gt.type == "dontcare":
            for j, det in enumerate(dets):
                inside = flags[j] == 0 and takes_part(j) and overlap(gt, det, metric, "detection") > limit
                if inside:
                    taken[j] = True
                    false -= 1
    return hits, false, similarity


def overlap(gt, det, metric, over):
    if metric == "bbox":
        (a1, b1, a2, b2), (c1, d1, c2, d2) = gt.box, det.box
        width, height = min(a2, c2) - max(a1, c1), min(b2, d2) - max(b1, d1)
        inter = width * height if width > 0 and height > 0 else 0
        wholes = ((a2 - a1) * (b2 - b1), (c2 - c1) * (d2 - d1))
    else:
        inter = shared_area(ring_of(gt), ring_of(det))
        wholes = (gt.w * gt.length, det.w * det.length)
        if metric == "3d":
            inter *= max(0, min(gt.y, det.y) - max(gt.y - gt.h, det.y - det.h))
            wholes = (wholes[0] * gt.h, wholes[1] * det.h)
    divisor = wholes[1] if over == "detection" else wholes[0] + wholes[1] - inter
    return inter / divisor if divisor else 0.0


def ring_of(row):
    cos, sin = math.cos(row.ry), math.sin(row.ry)
    ring = []
    for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1)):
        a, b = i * row.length / 2, j * row.w / 2
        ring.append((row.x + a * cos + b * sin, row.z - a * sin + b * cos))
    return ring


def shared_area(a, b):
    """Area of the intersection of two rectangles: hull of the corners inside and of the edges' crossings."""
    points = [p for p in a if is_inside(p, b)] + [p for p in b if is_inside(p, a)]
    for p, q in zip(a, a[1:] + a[:1], strict=True):
        for r, s in zip(b, b[1:] + b[:1], strict=True):
            d = (q[0] - p[0]) * (s[1] - r[1]) - (q[1] - p[1]) * (s[0] - r[0])
            if d:
                t = ((r[0] - p[0]) * (s[1] - r[1]) - (r[1] - p[1]) * (s[0] - r[0])) / d
                u = ((r[0] - p[0]) * (q[1] - p[1]) - (r[1] - p[1]) * (q[0] - p[0])) / d
                if 0 <= t <= 1 and 0 <= u <= 1:
                    points.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
    if len(points) < 3:
        return 0.0
    cx, cy = sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)
    points.sort(key=lambda p: math.atan2(p[1] - cy, p[0] - cx))
    rest = points[1:] + points[:1]
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(points, rest, strict=True))) / 2


def is_inside(p, ring):
    sides = [
        (s[0] - r[0]) * (p[1] - r[1]) - (s[1] - r[1]) * (p[0] - r[0])
        for r, s in zip(ring, ring[1:] + ring[:1], strict=True)
    ]
    return all(side >= -1e-9 for side in sides) or all(side <= 1e-9 for side in sides)


# ---- Random frames that meet many rules at once. ----

TYPES = ("Car", "car", "Van", "Pedestrian", "Person_sitting", "Cyclist", "Truck")
DONTCARE = "DontCare -1 -1 -10 {:.2f} {:.2f} {:.2f} {:.2f} -1 -1 -1 -1000 -1000 -1000 -10"


def random_frame(rng, *, unknown_alpha):
    truth, detections = [], []
    for _ in range(rng.integers(0, 7)):
        name = rng.choice(TYPES)
        x1, y1 = rng.uniform(0, 300), 100
        height = rng.choice([24.0, 25.0, 25.5, 39.99, 40.0, 60.0, 90.0])
        box = np.array([x1, y1, x1 + rng.uniform(20, 90), y1 + height])
        space = np.array([1.6, 1.7, rng.uniform(1, 4), rng.uniform(-9, 9), 1.7, rng.uniform(5, 20)])
        ry, alpha = rng.uniform(-3, 3, 2)
        trunc, occ = rng.choice([0, 0.15, 0.2, 0.4]), rng.integers(0, 4)
        truth.append(line(name, trunc, occ, alpha, box, space, ry))
        for _ in range(rng.integers(0, 4)):
            kind = rng.choice([name, name, rng.choice(TYPES)])
            near = space + rng.normal(size=6) * [0.05, 0.05, 0.1, 0.12, 0.05, 0.15]
            place = box + rng.normal(size=4) * rng.choice([0, 2.0])
            row = [kind, -1, -1, alpha + rng.normal(), place, near, ry + 0.1 * rng.normal()]
            style = rng.integers(0, 12)
            if style == 0:
                row[5], row[6] = np.array([-1, -1, -1, -1000, -1000, -1000]), -10
            elif style == 1:
                row[5][[0, 4]] = -1, -1000
            elif style == 2 and unknown_alpha:
                row[3] = -10
            detections.append(line(*row, rng.integers(0, 11) / 10))
            if rng.random() < 0.2:
                detections.append(detections[-1])
    for _ in range(rng.integers(0, 3)):
        x1, y1 = rng.uniform(0, 300), 100
        truth.insert(0, DONTCARE.format(x1, y1 - 5, x1 + 120, y1 + rng.choice([20, 60, 100])))
    order = rng.permutation(len(detections))
    return truth, [detections[i] for i in order]


def line(name, trunc, occ, alpha, box, space, ry, score=None):
    values = [*box, *space, ry, *([] if score is None else [score])]
    return f"{name} {trunc} {occ} {alpha:.6f} " + " ".join(f"{value:.6f}" for value in values)


def write(folder, frames):
    folder.mkdir()
    for i, rows in enumerate(frames):
        (folder / f"{i:06d}.txt").write_text("".join(f"{row}\n" for row in rows))
    return folder


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("overlaps", LIMITS)
def test_agrees_with_the_rules_on_random_frames(overlaps, seed, tmp_path):
    rng = np.random.default_rng(seed)
    frames = [random_frame(rng, unknown_alpha=seed % 4 == 0) for _ in range(30)]
    truth, detections = [list(part) for part in zip(*frames, strict=True)]
    gt, pred = write(tmp_path / "gt", truth), write(tmp_path / "pred", detections)
    result = evaluate(gt, pred, overlaps=overlaps, progress=False)
    expected = reference_evaluate(
        *([[Row.parse(row) for row in frame] for frame in part] for part in (truth, detections)), LIMITS[overlaps]
    )
    found = 0.0
    for name, metrics in expected.items():
        for metric, (evaluated, r40, r11) in metrics.items():
            figures = result[name][metric]
            assert figures["evaluated"] == evaluated, (name, metric)
            np.testing.assert_allclose(figures["R40"], r40, atol=1e-8, err_msg=f"{name} {metric}")
            np.testing.assert_allclose(figures["R11"], r11, atol=1e-8, err_msg=f"{name} {metric}")
            found += np.nansum(r40)
    assert found > 20, "the frames should give something to compare"


# ---- The area that rectangles share. ----

rings = st.tuples(*[st.floats(-5, 5)] * 2, st.floats(0.1, 6), st.floats(0.1, 6), st.floats(-4, 4))


@given(rings, st.floats(0.1, 6), st.floats(0.1, 6))
def test_clipped_area_agrees_with_the_hull_of_crossings(ring, half_x, half_y):
    x, z, width, length, angle = ring
    corners = rectangle_corners(np.array([[x, z]]), np.array([[width, length]]), np.array([angle]))
    area = clipped_area(corners, np.array([[half_x, half_y]]))[0]
    fixed = [(half_x, half_y), (half_x, -half_y), (-half_x, -half_y), (-half_x, half_y)]
    assert area == pytest.approx(shared_area([tuple(p) for p in corners[0]], fixed), abs=1e-6)


def test_clipped_area_of_equal_touching_and_contained_rectangles():
    centers = np.array([[0.0, 0], [2, 0], [0, 0], [9, 9], [1, 0]])
    sizes = np.array([[2.0, 2], [2, 2], [1, 1], [2, 2], [-2, -2]])  # both negative: the same rectangle
    areas = clipped_area(rectangle_corners(centers, sizes, np.zeros(5)), np.ones((5, 2)))
    np.testing.assert_allclose(areas, [4, 0, 1, 0, 2], atol=1e-12)
