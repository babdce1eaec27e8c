"""``python -m benchmarks.detector_cost``: time and memory of a training step of each detector, alone.

A step is forward, losses, backward and optimiser on one batch of rendered scenes that is in memory. Every detector
trains in a process of its own; they take turns, so that a slow minute of the machine does not fall on one of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.timing import Timing, status_mib, summarise, wall_sampler
from rakd.data.kitti import KittiDataset, collate
from rakd.detector.configs import DETECTORS
from rakd.scenes import make_scenes
from rakd.training.optim import make_optimizer
from rakd.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class DetectorRow(results.Machine):
    """The training step of one detector."""

    detector: str  # one of rakd.detector.configs.DETECTORS
    family: str  # "two stages" or "MonoDETR"
    backbone: str
    parameters: float  # millions
    batch: int  # images a step
    height: int  # of the images, pixels
    width: int
    images_per_second: float  # at the median time
    median_ms: float  # of a step
    p20_ms: float  # 20th percentile
    p80_ms: float  # 80th percentile
    steps: int  # these come from
    added_mib: float  # peak memory of the process less what it had before the first step; median over the turns
    threads: int  # of torch


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = results.Parser("benchmarks.detector_cost", __doc__, out="benchmarks/results/detector_cost.csv")
    names = ("tiny", "tiny-lite0", "monodetr-tiny", "monodetr-small")
    parser.add_names("--detectors", list(DETECTORS), default=names)
    parser.add_number("--batch", 4)
    parser.add_number("--steps", 8, text="in each turn, after two that are not timed")
    parser.add_number("--turns", 3)
    parser.add_threads()
    return parser.parse_args(arguments)


def train(name: str, root: str, batch_size: int, steps: int, threads: int) -> None:
    """Print milliseconds of the steps, and then MiB: of this process before the first step, and at most."""
    torch.set_num_threads(threads)
    config = DETECTORS[name].without_download()
    detector = config.build(0).train()
    dataset = KittiDataset(root, "trainval", height=config.height, rules=config.rules)
    batch = collate([dataset[i] for i in range(batch_size)], size=config.image_size)
    targets = batch.targets("cpu")
    optimizer = make_optimizer(detector, TrainSettings(optimizer="adamw", learning_rate=1e-4))

    def step() -> None:
        optimizer.zero_grad()
        losses, _ = detector.losses(detector.extract_features(batch.images), batch.sizes, targets, range(len(targets)))
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    before = status_mib("VmRSS")
    sample = wall_sampler(step)
    times = [sample() for _ in range(steps + 2)]
    print(*times[2:])  # the first ones make buffers
    print(before, status_mib("VmHWM"))


_TRAIN = """
import sys
from benchmarks.detector_cost import train
train(*sys.argv[1:3], *map(int, sys.argv[3:]))
"""


def measure(options: argparse.Namespace) -> list[DetectorRow]:
    """Let the detectors train in turns."""
    times: dict[str, list[float]] = {name: [] for name in options.detectors}
    added: dict[str, list[float]] = {name: [] for name in options.detectors}
    with tempfile.TemporaryDirectory() as folder:
        make_scenes(Path(folder) / "scenes", max(2, options.batch))
        for _ in range(options.turns):
            for name in options.detectors:
                words = (name, f"{folder}/scenes", options.batch, options.steps, options.threads)
                taken, (before, highest) = results.run_apart(_TRAIN, *words)
                times[name] += taken
                added[name].append(highest - before)
    return [_make_row(name, summarise(times[name]), statistics.median(added[name]), options) for name in times]


def _make_row(name: str, timing: Timing, added_mib: float, options: argparse.Namespace) -> DetectorRow:
    config = DETECTORS[name]
    return DetectorRow(
        detector=name,
        family="MonoDETR" if name.startswith("monodetr") else "two stages",
        backbone=config.backbone.name,
        parameters=sum(p.numel() for p in config.without_download().build().parameters()) / 1e6,
        batch=options.batch,
        height=config.height,
        width=config.width or 0,
        images_per_second=1e3 * options.batch / timing.median,
        **timing.columns(),
        steps=timing.repeats,
        added_mib=added_mib,
        threads=options.threads,
        **asdict(results.describe_machine("cpu")),
    )


def format_rows(rows: Sequence[DetectorRow]) -> str:
    """Lay out the rows for the terminal."""
    lines = [["detector", "params, M", "images/s", "ms a step", "20-80 %", "added MiB"]]
    for row in rows:
        times = results.time_cells(row.median_ms, row.p20_ms, row.p80_ms)
        numbers = f"{row.parameters:.2f}", f"{row.images_per_second:.2f}"
        lines.append([row.detector, *numbers, *times, f"{row.added_mib:.0f}"])
    return results.format_table(lines)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    rows = measure(options)
    results.report(options.out, DetectorRow, rows, format_rows(rows))


if __name__ == "__main__":
    results.exit_with_errors(main)
