"""``python -m benchmarks.framework_cost``: milliseconds that distillation adds to a step of each framework's trainer.

Every trainer runs its own loop in a thread and is let through one step at a time, so that steps of all kinds take
turns. Loading the batch is not in the time. The kinds:

- ``plain``: the apprentice trains alone;
- ``expert``: the expert runs as well, and its features are dropped;
- ``loss``: RAKD, normalised, with adapters where channels differ;
- ``cached``: the same with the expert's features from memory (the same images come again and again).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from benchmarks.frameworks import FRAMEWORKS, Gate
from benchmarks.results import Machine, describe_machine, exit_with_errors, read_rows, write_rows
from benchmarks.timing import time_interleaved

KINDS = ("plain", "expert", "loss", "cached")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameworkRow(Machine):
    """One kind of step in one framework.

    Attributes:
        framework: Its name.
        version: Its version.
        expert: The network that teaches.
        apprentice: The network that learns.
        batch: Images.
        size: Height and width of the images, pixels.
        kind: See the module.
        median_ms: Median time of a step.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        repeats: Steps these come from.
        ratio: This median over that of ``plain``.
        over_expert: Median over the rounds of (this - ``expert``) / ``expert``; None for ``plain`` and ``expert``.
        threads: Of torch.
    """

    framework: str
    version: str
    expert: str
    apprentice: str
    batch: int
    size: int
    kind: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    ratio: float
    over_expert: float | None
    threads: int


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.framework_cost", description=__doc__)
    parser.add_argument("--frameworks", nargs="+", choices=list(FRAMEWORKS), default=list(FRAMEWORKS))
    parser.add_argument("--repeats", type=int, default=21, help="rounds after the warm-up")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=320, help="height and width of the images, a multiple of 32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/framework_cost.csv"))
    return parser.parse_args(arguments)


def measure(name: str, options: argparse.Namespace, machine: Machine) -> list[FrameworkRow]:
    """Measure the kinds of step of one framework, interleaved."""
    train, package, expert, apprentice = FRAMEWORKS[name]
    gates: dict[str, Gate] = {}
    for kind in KINDS:
        gates[kind] = Gate(lambda gate, kind=kind: train(gate, kind, options.batch, options.size))  # type: ignore[misc]
        # One after the other, since some frameworks set global state up. The first steps make checks, adapters, caches
        # and buffers.
        gates[kind].sample()
        gates[kind].sample()
    samplers = {kind: gate.sample for kind, gate in gates.items()}
    with tqdm(total=len(KINDS) * (1 + options.repeats), desc=name, unit="step", file=sys.stderr, leave=False) as bar:
        timings = time_interleaved(samplers, options.repeats, math.inf, bar.update)
    rows = []
    for kind, timing in timings.items():
        pairs = zip(timing.samples, timings["expert"].samples, strict=True)
        over = sorted((mine - theirs) / theirs for mine, theirs in pairs)
        rows.append(
            FrameworkRow(
                framework=name,
                version=importlib.metadata.version(package),
                expert=expert,
                apprentice=apprentice,
                batch=options.batch,
                size=options.size,
                kind=kind,
                median_ms=timing.median,
                p20_ms=timing.p20,
                p80_ms=timing.p80,
                repeats=timing.repeats,
                ratio=timing.median / timings["plain"].median,
                over_expert=None if kind in ("plain", "expert") else over[len(over) // 2],
                threads=torch.get_num_threads(),
                **dataclasses.asdict(machine),
            )
        )
    return rows


def measure_apart(name: str, options: argparse.Namespace) -> list[FrameworkRow]:
    """Measure one framework in a process of its own: they change global settings, and leave threads behind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.csv"
        given = {"repeats": options.repeats, "batch": options.batch, "size": options.size, "threads": options.threads}
        arguments = [f"--{key}={value}" for key, value in {**given, "frameworks": name, "out": path}.items()]
        subprocess.run([sys.executable, "-m", __spec__.name, *arguments], check=True, stdout=subprocess.DEVNULL)
        return read_rows(path, FrameworkRow)


def format_rows(rows: list[FrameworkRow]) -> str:
    """Lay out the rows for the terminal."""
    lines = [f"{'framework':14} {'kind':8} {'ms':>8} {'20-80 %':>17} {'ratio':>6} {'beside expert':>14}"]
    for row in rows:
        spread = f"{row.p20_ms:.1f}-{row.p80_ms:.1f}"
        over = "" if row.over_expert is None else f"{100 * row.over_expert:+.1f} %"
        lines.append(f"{row.framework:14} {row.kind:8} {row.median_ms:8.1f} {spread:>17} {row.ratio:6.2f} {over:>14}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    if options.repeats < 1 or options.batch < 2 or options.size % 32 or options.size < 64:
        raise ValueError("expected --repeats of 1 or more, --batch of 2 or more, --size a multiple of 32 from 64")
    if len(options.frameworks) == 1:
        torch.set_num_threads(options.threads)
        os.environ.setdefault("YOLO_VERBOSE", "False")
        for name in ("ultralytics", "lightning.pytorch", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        rows = measure(options.frameworks[0], options, describe_machine("cpu"))
    else:
        rows = [row for name in options.frameworks for row in measure_apart(name, options)]
    write_rows(options.out, FrameworkRow, rows)
    print(format_rows(rows))
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    exit_with_errors(main)
