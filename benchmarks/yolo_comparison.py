"""``python -m benchmarks.yolo_comparison``: one YOLO apprentice, taught in four ways, on rendered scenes.

The same apprentice, data, expert, epochs and augmentation, for several seeds:

- ``alone``: no distillation;
- ``ultralytics``: ultralytics' own (``distill_model=``), with its own default weight;
- ``rakd``: RAKD's soft loss with its default weight of 1;
- ``rakd-normalized``: the same as a share of the expert's energy, weight 1.

No weight is tuned. Scenes are in YOLO's format, with three classes; every fifth is validated on. A run that is in the
CSV already is not done again, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Machine, describe_machine, exit_with_errors, read_rows, write_rows
from rakd.data.boxes2d import write_yolo
from rakd.scenes import make_scenes

WAYS = ("alone", "ultralytics", "rakd", "rakd-normalized")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow(Machine):
    """One run.

    Attributes:
        way: See the module; ``"expert"`` for the expert itself.
        seed: Of the apprentice's weights and the order and augmentation of images.
        map: mAP50-95 on the scenes for validation, of the checkpoint that ultralytics calls best.
        map50: Average precision at IoU 0.5.
        network: The network that was trained.
        epochs: Their number.
        frames: Scenes, a fifth of them for validation.
        size: Height and width of the images, pixels.
        batch: Images a step.
        seconds: That the run took.
        ultralytics: Version.
    """

    way: str
    seed: int
    map: float
    map50: float
    network: str
    epochs: int
    frames: int
    size: int
    batch: int
    seconds: float
    ultralytics: str


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yolo_comparison", description=__doc__)
    parser.add_argument("--expert", default="yolo11s.yaml")
    parser.add_argument("--apprentice", default="yolo11n.yaml")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images, a multiple of 32")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/yolo_comparison"), help="scenes and ultralytics' runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/yolo_comparison.csv"))
    return parser.parse_args(arguments)


class Comparison:
    """The runs, their data and what they found.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = options.work.absolute()
        self.rows = read_rows(options.out, ComparisonRow) if options.out.exists() else []
        wanted = self._settings()
        for row in self.rows:
            found = {name: getattr(row, name) for name in wanted}
            if found != wanted:
                raise ValueError(f"out: {options.out} holds runs with {found}, not {wanted}; choose another file")
        make_scenes(self.work / "kitti", options.frames, size=(options.size, options.size))
        self.data = write_yolo(self.work / "kitti", self.work / "yolo")

    def run(self) -> list[ComparisonRow]:
        """Do what is missing, the expert first."""
        expert = self.work / "expert-0" / "weights" / "best.pt"
        if not self._done("expert", 0) or not expert.exists():
            self._train("expert", 0, expert)
        for seed in range(self.options.seeds):
            for way in self.options.ways:
                if not self._done(way, seed):
                    self._train(way, seed, expert)
        return self.rows

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("epochs", "frames", "size", "batch")}

    def _done(self, way: str, seed: int) -> bool:
        return any((row.way, row.seed) == (way, seed) for row in self.rows)

    def _train(self, way: str, seed: int, expert: Path) -> None:
        from ultralytics import YOLO

        from rakd.integrations.ultralytics import distill

        options = self.options
        network = options.expert if way == "expert" else options.apprentice
        torch.manual_seed(seed)
        model: Any = YOLO(network)
        arguments: dict[str, Any] = {"data": str(self.data), "epochs": options.epochs, "imgsz": options.size}
        arguments |= {"batch": options.batch, "seed": seed, "device": options.device, "plots": False, "verbose": False}
        arguments |= {"project": str(self.work), "name": f"{way}-{seed}", "exist_ok": True}
        if way == "ultralytics":
            arguments["distill_model"] = str(expert)
        elif way.startswith("rakd"):
            model = distill(model, YOLO(expert), weight=1.0, normalize=way == "rakd-normalized")
        begun = time.time()
        metrics = model.train(**arguments)
        row = ComparisonRow(
            way=way,
            seed=seed,
            map=float(metrics.box.map),
            map50=float(metrics.box.map50),
            network=Path(network).stem,
            seconds=time.time() - begun,
            ultralytics=importlib.metadata.version("ultralytics"),
            **self._settings(),
            **dataclasses.asdict(describe_machine(options.device)),
        )
        self.rows = [*(old for old in self.rows if (old.way, old.seed) != (way, seed)), row]
        write_rows(options.out, ComparisonRow, self.rows)


def format_rows(rows: Sequence[ComparisonRow]) -> str:
    """Lay out mean and standard deviation over the seeds, and the difference to ``alone`` seed by seed."""
    alone = {row.seed: row.map for row in rows if row.way == "alone"}
    lines = [f"{'way':16} {'seeds':>5} {'mAP50-95':>16} {'mAP50':>16} {'beside alone':>16} {'min/run':>8}"]
    for way in ("expert", *WAYS):
        runs = [row for row in rows if row.way == way]
        if runs:
            gains = [row.map - alone[row.seed] for row in runs if row.seed in alone]
            gain = "" if way in ("expert", "alone") or not gains else _spread(gains, "+")
            minutes = statistics.mean(row.seconds for row in runs) / 60
            cells = f"{_spread([r.map for r in runs]):>16} {_spread([r.map50 for r in runs]):>16} {gain:>16}"
            lines.append(f"{way:16} {len(runs):5} {cells} {minutes:8.1f}")
    return "\n".join(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):{sign}.2f} ± {100 * deviation:.2f}"


def main() -> None:
    """Train, print and write."""
    options = parse()
    if options.size % 32 or min(options.frames, options.epochs, options.seeds) < 1 or options.frames < 10:
        raise ValueError("expected --size a multiple of 32, --frames of 10 or more, --epochs and --seeds of 1 or more")
    rows = Comparison(options).run()
    print(format_rows(rows))
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    exit_with_errors(main)
