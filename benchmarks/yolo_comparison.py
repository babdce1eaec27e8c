"""``python -m benchmarks.yolo_comparison``: one YOLO apprentice, taught in several ways, on rendered scenes.

The same apprentice, data, expert, epochs and augmentation, for several seeds:

- ``alone``: no distillation;
- ``ultralytics``: ultralytics' own (``distill_model=``), with its own default weight;
- ``rakd``: RAKD's soft loss with its default weight of 1;
- ``rakd-normalized``: the same as a share of the expert's energy, weight 1;
- ``rakd-advised``: ten times the task loss, as README advises to begin, with the expert's maps rescaled.

No weight is tuned. Scenes are in YOLO's format, with three classes; every fifth is validated on. A run that is in the
CSV already is not done again, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from rakd.data.boxes2d import write_yolo
from rakd.scenes import make_scenes

EXPERT, APPRENTICE = "yolo11s.yaml", "yolo11n.yaml"
RAKD: dict[str, dict[str, Any]] = {
    "rakd": {"weight": 1.0},
    "rakd-normalized": {"weight": 1.0, "normalize": True},
    "rakd-advised": {"weight": "auto:10", "rescale": True},
}
"""Ways that distil with RAKD: the arguments of `rakd.integrations.ultralytics.distill`."""
WAYS = ("alone", "ultralytics", *RAKD)


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(results.Machine):
    """One run."""

    way: str  # see the module; "expert" for the expert itself
    seed: int  # of the apprentice's weights and the order and augmentation of images
    map: float  # mAP50-95 on the scenes for validation, of the checkpoint that ultralytics calls best
    map50: float  # average precision at IoU 0.5
    network: str  # that was trained
    epochs: int
    frames: int  # scenes, a fifth of them for validation
    size: int  # height and width of the images, pixels
    batch: int  # images a step
    seconds: float  # that the run took
    ultralytics: str  # version


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = results.Parser("benchmarks.yolo_comparison", __doc__, out="benchmarks/results/yolo_comparison.csv")
    parser.add_number("--frames", 400, minimum=10)
    parser.add_number("--size", 224, 32, "height and width of the images", multiple=32)
    parser.add_number("--epochs", 40)
    parser.add_number("--batch", 16)
    parser.add_number("--seeds", 3, text="how many")
    parser.add_names("--ways", WAYS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/yolo_comparison"), help="scenes and ultralytics' runs")
    return parser.parse_args(arguments)


class Comparison:
    """The runs that a command line asks for, their data and what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = options.work.absolute()
        self.rows = results.read_rows(options.out, ComparisonRow) if options.out.exists() else []
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
        network = EXPERT if way == "expert" else APPRENTICE
        torch.manual_seed(seed)
        model: Any = YOLO(network)
        arguments: dict[str, Any] = {"data": str(self.data), "epochs": options.epochs, "imgsz": options.size}
        arguments |= {"batch": options.batch, "seed": seed, "device": options.device, "plots": False, "verbose": False}
        arguments |= {"project": str(self.work), "name": f"{way}-{seed}", "exist_ok": True}
        if way == "ultralytics":
            arguments["distill_model"] = str(expert)
        elif way in RAKD:
            model = distill(model, YOLO(expert), **RAKD[way])
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
            **asdict(results.describe_machine(options.device)),
        )
        before = next((old for old in self.rows if (old.way, old.seed) == (way, seed)), None)
        if before is not None and before.map != row.map:
            raise ValueError(f"out: {options.out} has {before.map} for {way}, made anew it has {row.map}")
        self.rows = [*(old for old in self.rows if (old.way, old.seed) != (way, seed)), row]
        results.write_rows(options.out, ComparisonRow, self.rows)


def format_rows(rows: Sequence[ComparisonRow]) -> str:
    """Lay out mean and standard deviation over the seeds, and the difference to ``alone`` seed by seed."""
    alone = {row.seed: row.map for row in rows if row.way == "alone"}
    lines = [["way", "seeds", "mAP50-95", "mAP50", "beside alone", "min/run"]]
    for way in ("expert", *WAYS):
        runs = [row for row in rows if row.way == way]
        if runs:
            gains = [row.map - alone[row.seed] for row in runs if row.seed in alone]
            gain = "" if way in ("expert", "alone") or not gains else _spread(gains, "+")
            minutes = statistics.mean(row.seconds for row in runs) / 60
            found = _spread([row.map for row in runs]), _spread([row.map50 for row in runs])
            lines.append([way, str(len(runs)), *found, gain, f"{minutes:.1f}"])
    return results.format_table(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):{sign}.2f} ± {100 * deviation:.2f}"


def main() -> None:
    """Train, print and write."""
    options = parse()
    rows = Comparison(options).run()
    results.report(options.out, ComparisonRow, rows, format_rows(rows))


if __name__ == "__main__":
    results.exit_with_errors(main)
