"""``python -m benchmarks.detector_cost``: time and memory of a training step of each detector, alone.

A step is forward, losses, backward and optimiser on one batch of rendered scenes that is in memory. Every detector
trains in a process of its own; they take turns, so that a slow minute of the machine does not fall on one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Machine, describe_machine, exit_with_errors, write_rows
from benchmarks.timing import summarise
from rakd.detector.configs import DETECTORS
from rakd.scenes import make_scenes

# Prints milliseconds of the steps, and then MiB: of the process before the first step, and at most.
_CODE = """
import sys, time, torch
from rakd.data.kitti import KittiDataset, collate
from rakd.detector.configs import DETECTORS
from rakd.training.optim import make_optimizer
from rakd.training.settings import TrainSettings

def mib(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))) / 1024

name, root, batch, steps, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
config = DETECTORS[name].without_download()
detector = config.build(0).train()
dataset = KittiDataset(root, "trainval", height=config.height, rules=config.rules)
batch = collate([dataset[i] for i in range(batch)], size=config.image_size)
targets = batch.targets("cpu")
optimizer = make_optimizer(detector, TrainSettings(optimizer="adamw", learning_rate=1e-4))
before, times = mib("VmRSS"), []
for step in range(steps + 2):
    start = time.perf_counter()
    optimizer.zero_grad()
    losses, _ = detector.losses(detector.extract_features(batch.images), batch.sizes, targets, range(len(targets)))
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    times.append(1e3 * (time.perf_counter() - start))
print(*times[2:])  # the first ones make buffers
print(before, mib("VmHWM"))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorRow(Machine):
    """The training step of one detector.

    Attributes:
        detector: One of `rakd.detector.configs.DETECTORS`.
        family: "two stages" or "MonoDETR".
        backbone: Its name.
        parameters: Their number, millions.
        batch: Images a step.
        height: Of the images, pixels.
        width: Same.
        images_per_second: At the median time.
        median_ms: Of a step.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        steps: These come from.
        added_mib: Peak memory of the process less what it had before the first step; median over the turns.
        threads: Of torch.
    """

    detector: str
    family: str
    backbone: str
    parameters: float
    batch: int
    height: int
    width: int
    images_per_second: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    steps: int
    added_mib: float
    threads: int


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector_cost", description=__doc__)
    names = ["tiny", "tiny-lite0", "monodetr-tiny", "monodetr-small"]
    parser.add_argument("--detectors", nargs="+", choices=list(DETECTORS), default=names)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="in each turn, after two that are not timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detector_cost.csv"))
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> list[DetectorRow]:
    """Let the detectors train in turns."""
    times: dict[str, list[float]] = {name: [] for name in options.detectors}
    added: dict[str, list[float]] = {name: [] for name in options.detectors}
    with tempfile.TemporaryDirectory() as folder:
        make_scenes(Path(folder) / "scenes", max(2, options.batch))
        for _ in range(options.turns):
            for name in options.detectors:
                words = [name, f"{folder}/scenes", *map(str, (options.batch, options.steps, options.threads))]
                done = subprocess.run([sys.executable, "-c", _CODE, *words], check=True, capture_output=True, text=True)
                taken, memory = (list(map(float, line.split())) for line in done.stdout.splitlines())
                times[name] += taken
                added[name].append(memory[1] - memory[0])
    return [_row(name, times[name], added[name], options) for name in options.detectors]


def _row(name: str, times: list[float], added: list[float], options: argparse.Namespace) -> DetectorRow:
    config = DETECTORS[name]
    timing = summarise(times)
    return DetectorRow(
        detector=name,
        family="MonoDETR" if name.startswith("monodetr") else "two stages",
        backbone=config.backbone.name,
        parameters=sum(p.numel() for p in config.without_download().build().parameters()) / 1e6,
        batch=options.batch,
        height=config.height,
        width=config.width or 0,
        images_per_second=1e3 * options.batch / timing.median,
        median_ms=timing.median,
        p20_ms=timing.p20,
        p80_ms=timing.p80,
        steps=timing.repeats,
        added_mib=statistics.median(added),
        threads=options.threads,
        **dataclasses.asdict(describe_machine("cpu")),
    )


def format_rows(rows: Sequence[DetectorRow]) -> str:
    """Lay out the rows for the terminal."""
    lines = [f"{'detector':22} {'params, M':>9} {'images/s':>9} {'ms a step':>9} {'20-80 %':>13} {'added MiB':>9}"]
    for row in rows:
        spread = f"{row.p20_ms:.0f}-{row.p80_ms:.0f}"
        cells = f"{row.parameters:9.2f} {row.images_per_second:9.2f} {row.median_ms:9.0f} {spread:>13}"
        lines.append(f"{row.detector:22} {cells} {row.added_mib:9.0f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    if min(options.batch, options.steps, options.turns, options.threads) < 1:
        raise ValueError("expected --batch, --steps, --turns and --threads of 1 or more")
    rows = measure(options)
    write_rows(options.out, DetectorRow, rows)
    print(format_rows(rows))
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    exit_with_errors(main)
