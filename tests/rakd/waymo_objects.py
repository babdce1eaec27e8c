"""Truths and predictions for tests of Waymo's metric: by hand, drawn, and as folders of text files."""

import numpy as np

from rakd.data.frames import write_calibration
from rakd.data.waymo_geometry import optical_from_vehicle, to_optical
from rakd.evaluation.waymo import IOU, WaymoObjects
from rakd.evaluation.waymo.scoring import evaluate_objects
from rakd.geometry import Calibration

CAR = [20.0, 0.0, 0.9, 4.8, 2.0, 1.8, 0.0]
"""A typical car: 4.8 m long, 1.8 m high, 20 m ahead."""

_SCORES = (0.0, 0.004, 0.3, 0.5, 0.995, 1.0)


def draw(seed, frames, truths, predictions):
    """Crowded frames: predictions are noisy copies, several of one truth."""
    rng = np.random.default_rng(seed)
    keys = [("segment", i, 0) for i in range(frames)]

    def objects(rows, types, boxes, scores, zones, points, difficulty):
        return WaymoObjects(
            keys,
            rows,
            types.astype(np.int8),
            boxes,
            scores.astype(np.float32),
            zones,
            points,
            difficulty.astype(np.int8),
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
    write_calibration(root / "calib" / "000000.txt", camera, transform)
    return root / name


def table(rows):
    """AP and APH by type, range and level, with the digits that the devkit prints."""
    return {(row.type, row.range, row.level): (f"{row.ap:.6g}", f"{row.aph:.6g}") for row in rows}
