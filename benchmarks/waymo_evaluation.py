"""``python -m benchmarks.waymo_evaluation``: time and memory of Waymo's evaluation over the number of frames.

Each measurement runs in a process of its own and includes reading the files. Writes a CSV. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.results import Parser, at_least, describe_machine, exit_with_errors, progress, run_apart, write_rows
from rakd.data.frames import write_calibration
from rakd.data.labels import Objects, write_objects
from rakd.data.waymo_convert import label_text
from rakd.data.waymo_geometry import optical_from_vehicle, to_optical
from rakd.evaluation.waymo import WaymoObjects, write_bin
from rakd.evaluation.waymo.objects import KITTI_TYPES, TYPES
from rakd.files import write_text
from rakd.geometry import Calibration

_SIZES = np.array([[0, 0, 0], [4.8, 2.1, 1.8], [0.9, 0.9, 1.75], [0.2, 0.6, 0.7], [1.8, 0.8, 1.75]])
_SHARES = (0.6, 0.25, 0.1, 0.05)
# Loads nothing but what a user of the function loads.
_CODE = """
import sys, time
from rakd.evaluation.waymo import evaluate
start, before = time.perf_counter(), time.process_time()
evaluate(sys.argv[1], sys.argv[2], mode=sys.argv[3], progress=False)
print(time.perf_counter() - start, time.process_time() - before)
# Not ru_maxrss, which a process has from its parent.
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


@dataclass(frozen=True)
class WaymoRun:
    """One measurement."""

    files: str  # "bin" or "folders"
    mode: str  # "official" or "pct"
    frames: int
    truths: int  # a frame
    predictions: int  # a frame
    seconds: float  # of evaluate by the clock, reading included
    processor_seconds: float  # the same by the processor, all threads together
    peak_mib: float  # memory of its process, Python and libraries included
    cpu: str  # the processor's model
    cores: int  # of the machine
    load: float  # the machine's load average over the minute before: 0 where nothing else ran
    commit: str  # of the sources
    dirty: bool  # whether tracked files differed from it
    date: str  # when it was measured (UTC)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("benchmarks.waymo_evaluation", __doc__, out="runs/benchmarks/waymo_evaluation.csv")
    frames = [1000, 5000, 10_000, 20_000, 40_000]
    parser.add_argument("--frames", type=at_least(1), nargs="+", default=frames, help="default: 1000 to 40,000")
    parser.add_number("--objects", 20, text="truths, and as many predictions, a frame")
    parser.add_names("--files", ("bin", "folders"))
    parser.add_names("--modes", ("official", "pct"))
    return parser.parse_args(arguments)


def draw_objects(frames: int, count: int) -> tuple[WaymoObjects, WaymoObjects]:
    """Draw ``count`` truths and predictions a frame; three of four predictions are noisy copies, most along depth."""
    rng = np.random.default_rng(0)
    total = frames * count
    types = rng.choice([1, 2, 3, 4], total, p=_SHARES).astype(np.int8)
    boxes = np.empty((total, 7))
    boxes[:, 0], boxes[:, 1] = rng.uniform(4, 75, total), rng.uniform(-25, 25, total)
    boxes[:, 3:6] = _SIZES[types] * rng.uniform(0.85, 1.15, (total, 3))
    boxes[:, 2], boxes[:, 6] = boxes[:, 5] / 2, rng.uniform(-np.pi, np.pi, total)
    found = boxes.copy()
    found[:, :3] *= 1 + rng.normal(0, 0.02, (total, 1))
    found[:, 3:6] *= rng.uniform(0.93, 1.07, (total, 3))
    found[:, 6] += rng.normal(0, 0.1, total)
    false = rng.random(total) < 0.25
    found[false, 0], found[false, 1] = rng.uniform(4, 75, false.sum()), rng.uniform(-25, 25, false.sum())
    keys = [(f"segment-{i // 200:04d}", 100_000 * i, 1) for i in range(frames)]
    rows = np.repeat(np.arange(frames), count)
    nothing = np.zeros(total, dtype=np.int64)
    scores = np.where(false, rng.beta(2, 4, total), rng.beta(4, 2, total)).astype(np.float32)
    zones = np.zeros(total, dtype=np.bool_)
    points = rng.integers(1, 200, total)
    ones, easy = np.ones(total, np.float32), nothing.astype(np.int8)
    truth = WaymoObjects(keys, rows, types, boxes, ones, zones, points, easy)
    return truth, WaymoObjects(keys, rows, types, found, scores, zones, nothing, easy)


def write_folders(root: Path, truth: WaymoObjects, predictions: WaymoObjects) -> tuple[Path, Path]:
    """Write objects as label, result and calibration files of KITTI's form; gives the two folders to compare."""
    extrinsic = np.eye(4)
    extrinsic[:3, 3] = (1.5, 0.0, 2.1)
    transform = optical_from_vehicle(extrinsic)
    camera = Calibration(np.array([[2060.0, 0, 950, 0], [0, 2060, 640, 0], [0, 0, 1, 0]]))
    names = {number: name for name, kind in KITTI_TYPES.items() for number in [TYPES[kind]]}
    for kind, objects in (("label_2", truth), ("pred", predictions)):
        location, dimensions, rotation = to_optical(objects.boxes, transform)
        bounds = np.searchsorted(objects.frames, np.arange(len(objects.keys) + 1))
        for i in range(len(objects.keys)):
            rows = slice(int(bounds[i]), int(bounds[i + 1]))
            count = rows.stop - rows.start
            drawn = Objects(
                np.array([names[int(t)] for t in objects.types[rows]], np.str_),
                np.zeros(count),
                np.zeros(count, np.int64),
                np.zeros(count),
                np.tile([0.0, 0.0, 50.0, 50.0], (count, 1)),
                dimensions[rows],
                location[rows],
                rotation[rows],
                None if kind == "label_2" else objects.scores[rows].astype(np.float64),
            )
            path = root / kind / f"{i:06d}.txt"
            if kind == "pred":
                write_objects(path, drawn)
                continue
            write_text(path, label_text(drawn, objects.points[rows], objects.difficulty[rows].astype(np.int64)))
            write_calibration(root / "calib" / f"{i:06d}.txt", camera, transform)
    return root / "label_2", root / "pred"


def main() -> None:
    """Draw objects, measure, write."""
    options = parse()
    machine = describe_machine("cpu")
    rows: list[WaymoRun] = []
    cases = [(frames, files) for frames in options.frames for files in options.files]
    with progress(len(cases) * len(options.modes), "run") as bar:
        for frames, files in cases:
            truth, predictions = draw_objects(frames, options.objects)
            with tempfile.TemporaryDirectory() as folder:
                gt, pred = Path(folder) / "gt.bin", Path(folder) / "pred.bin"
                if files == "bin":
                    write_bin(gt, truth)
                    write_bin(pred, predictions)
                else:
                    gt, pred = write_folders(Path(folder), truth, predictions)
                del truth, predictions
                for mode in options.modes:
                    load = os.getloadavg()[0]
                    (seconds, processor_seconds), (peak_kib,) = run_apart(_CODE, gt, pred, mode)
                    text = f"{frames} frames, {files}, {mode}: {seconds:.1f} s, {peak_kib / 1024:.0f} MiB"
                    bar.write(text, file=sys.stdout)
                    row = WaymoRun(
                        files=files,
                        mode=mode,
                        frames=frames,
                        truths=options.objects,
                        predictions=options.objects,
                        seconds=round(seconds, 3),
                        processor_seconds=round(processor_seconds, 3),
                        peak_mib=round(peak_kib / 1024, 1),
                        cpu=machine.cpu,
                        cores=os.cpu_count() or 1,
                        load=round(load, 2),
                        commit=machine.commit,
                        dirty=machine.dirty,
                        date=machine.date,
                    )
                    rows.append(row)
                    write_rows(options.out, WaymoRun, rows)
                    bar.update()
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    exit_with_errors(main)
