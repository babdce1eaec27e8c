"""``python -m benchmarks.yolo_comparison``: a YOLO apprentice, taught in several ways by an expert of more scenes.

The expert, a YOLO11s, learns from 70 % of the scenes, the apprentice, a YOLO11n, from the first ``--learned`` of these,
with the same expert, epochs and augmentation for all ways and several seeds:

- ``alone``: no distillation;
- ``ultralytics=6``: ultralytics' own (``distill_model=``), with a weight; 6 is its default;
- ``rakd=auto:10``, ``hfa@22=auto:3``, ``pkd=1``...: a method of `rakd.distill` with a weight, the expert's maps
  rescaled; after the ``@`` its ``canonical_size``, 224 without. 22 is the median side of the boxes, in pixels.

Scenes are in YOLO's format, with three classes; every fifth is validated on. ``--tune`` validates on the split ``tune``
instead, which nobody learns from: there weights are chosen, with ``--expert``, the one of the table. The last epoch
counts, not the best. A run that is in the CSV already is not done again, so that the command goes on where it was
stopped; another expert needs another CSV, and each of several processes a CSV and ``--work`` of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from rakd.data.boxes2d import write_yolo
from rakd.data.frames import find_frames
from rakd.distill.registry import METHODS
from rakd.files import write_text
from rakd.scenes import make_scenes
from rakd.study.metrics import interval_of_mean, summarise

NETWORKS = {"expert": "yolo11s.yaml", "apprentice": "yolo11n.yaml"}
WAYS = ("alone", "ultralytics=6", "rakd=auto:10")
_NUMBER = r"\d+\.?\d*(?:e-?\d+)?"
_WAY = re.compile(
    rf"alone|ultralytics=(?P<own>{_NUMBER})"
    rf"|(?:(?P<method>{'|'.join(METHODS)})|(?P<sized>rakd|hfa)@(?P<side>[1-9]\d*))=(?P<weight>(?:auto:)?{_NUMBER})"
)


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(results.Machine):
    """One run."""

    way: str  # see the module; "expert" for the expert itself
    seed: int  # of the apprentice's weights and the order and augmentation of images
    map: float  # mAP50-95 after the last epoch
    map50: float  # average precision at IoU 0.5
    network: str  # that was trained
    learned: int  # scenes that it learned from
    validated: int  # scenes that it was validated on
    split: str  # theirs: "val" or "tune"
    epochs: int
    expert_epochs: int
    size: int  # height and width of the images, pixels
    batch: int  # images a step
    seconds: float  # that the run took
    ultralytics: str  # version


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = results.Parser("benchmarks.yolo_comparison", __doc__, out="benchmarks/results/yolo_comparison.csv")
    parser.add_number(
        "--frames", 1500, 10, "scenes in all: 70 %% to learn from, 10 %% to tune on, 20 %% to validate on"
    )
    parser.add_number("--learned", 240, 1, "scenes that the apprentice learns from")
    parser.add_number("--size", 160, 32, "height and width of the images", multiple=32)
    parser.add_number("--epochs", 30)
    parser.add_number("--expert-epochs", 30)
    parser.add_number("--batch", 16)
    seeds = [0, 1, 2, 3, 4]
    parser.add_argument("--seeds", type=results.at_least(0), nargs="+", default=seeds, help="default: 0 to 4")
    ways = f"see above (default: {' '.join(WAYS)})"
    parser.add_argument("--ways", type=_way, nargs="+", default=WAYS, metavar="WAY", help=ways)
    parser.add_argument("--tune", action="store_true", help="validate on the split tune")
    parser.add_argument("--expert", type=_file, metavar="FILE", help="checkpoint; default: one that is trained here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/yolo_comparison"), help="scenes and ultralytics' runs")
    return parser.parse_args(arguments)


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text}")
    return Path(text)


def _way(text: str) -> str:
    if _WAY.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(
            f"expected alone, ultralytics=WEIGHT, METHOD=WEIGHT, rakd@SIZE=... or hfa@SIZE=..., got {text}"
        )
    return text


class Comparison:
    """The runs that a command line asks for, their data and what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = options.work.absolute()
        scenes = self.work / "kitti"
        make_scenes(scenes, options.frames, size=(options.size, options.size))
        data = write_yolo(scenes, self.work / "yolo")
        fit = find_frames(scenes, "fit")
        if len(fit) < options.learned:
            raise ValueError(f"learned: expected at most {len(fit)} of {options.frames} scenes, got {options.learned}")
        self.split = "tune" if options.tune else "val"
        self.learned = {"expert": fit, "apprentice": fit[: options.learned]}
        self.validated = find_frames(scenes, self.split)
        lists = {**self.learned, self.split: self.validated}
        for name, frames in lists.items():
            # YOLO's own form of a path beside the list.
            folder = "val" if name == "val" else "train"
            write_text(data.with_name(f"{name}.txt"), "".join(f"./images/{folder}/{f.image.name}\n" for f in frames))
        for role in self.learned:
            text = data.read_text(encoding="utf-8").replace("train: images/train\n", f"train: {role}.txt\n")
            text = text.replace("val: images/val\n", f"val: {self.split}.txt\n")
            write_text(data.with_name(f"{role}-{self.split}.yaml"), text)
        self.rows = results.read_rows(options.out, ComparisonRow) if options.out.exists() else []
        for row in self.rows:
            wanted = self._settings(row.way)
            found = {name: getattr(row, name) for name in wanted}
            if found != wanted:
                raise ValueError(f"out: {options.out} holds runs with {found}, not {wanted}; choose another file")

    def run(self) -> list[ComparisonRow]:
        """Do what is missing, the expert first."""
        own = self.work / "expert-0" / "weights" / "last.pt"
        expert = self.options.expert or own
        taught = any(way != "alone" for way in self.options.ways)
        if taught and self.options.expert is None:
            if self.options.tune:
                raise ValueError("tune: needs --expert, the expert whose apprentices are to be tuned")
            if not (self._done("expert", 0) and own.exists()):
                self._train("expert", 0, own)
        for seed in self.options.seeds:
            for way in self.options.ways:
                if not self._done(way, seed):
                    self._train(way, seed, expert)
        return self.rows

    def _settings(self, way: str) -> dict[str, Any]:
        """What a run of this way has to share with those of its kind in the same file."""
        role, options = _role(way), self.options
        settings = {name: getattr(options, name) for name in ("expert_epochs", "size", "batch")}
        settings |= {"epochs": options.expert_epochs if role == "expert" else options.epochs}
        return settings | {"learned": len(self.learned[role]), "validated": len(self.validated), "split": self.split}

    def _done(self, way: str, seed: int) -> bool:
        return any((row.way, row.seed) == (way, seed) for row in self.rows)

    def _train(self, way: str, seed: int, expert: Path) -> None:
        from ultralytics import YOLO

        from rakd.integrations.ultralytics import distill

        options, settings = self.options, self._settings(way)
        role = _role(way)
        network = NETWORKS[role]
        torch.manual_seed(seed)
        model: Any = YOLO(network)
        data = self.work / "yolo" / f"{role}-{self.split}.yaml"
        arguments: dict[str, Any] = {"data": str(data), "epochs": settings["epochs"], "imgsz": options.size}
        arguments |= {"batch": options.batch, "seed": seed, "device": options.device, "plots": False, "verbose": False}
        arguments |= {"project": str(self.work), "name": f"{way}-{seed}", "exist_ok": True, "val": False}
        given = _WAY.fullmatch(way)
        if given is not None and given["own"]:
            arguments |= {"distill_model": str(expert), "dis": float(given["own"])}
        elif given is not None and given["weight"]:
            weight = given["weight"] if given["weight"].startswith("auto") else float(given["weight"])
            extra: dict[str, Any] = {"canonical_size": float(given["side"])} if given["side"] else {}
            model = distill(
                model, YOLO(expert), weight, method=given["method"] or given["sized"], rescale=True, **extra
            )
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
            **settings,
            **asdict(results.describe_machine(options.device)),
        )
        before = next((old for old in self.rows if (old.way, old.seed) == (way, seed)), None)
        # The file has six digits.
        if before is not None and not math.isclose(before.map, row.map, rel_tol=1e-5):
            raise ValueError(f"out: {options.out} has {before.map} for {way}, made anew it has {row.map}")
        self.rows = [*(old for old in self.rows if (old.way, old.seed) != (way, seed)), row]
        results.write_rows(options.out, ComparisonRow, self.rows)


def _role(way: str) -> str:
    return "expert" if way == "expert" else "apprentice"


def format_rows(rows: Sequence[ComparisonRow]) -> str:
    """Lay out mean and standard deviation over the seeds, and paired differences of mAP50-95 with their intervals.

    Differences are those of all ways from ``alone``, and of RAKD from the others. Intervals are of 95 %, over the
    apprentices' seeds (Student's t), simultaneous for the differences of a table (Bonferroni). The expert is the same
    for all: what another one would change is not in them.
    """
    ways = list(dict.fromkeys(("expert", *(row.way for row in rows))))
    lines = [["way", "seeds", "mAP50-95", "mAP50", "min/run"]]
    for way in ways:
        runs = [row for row in rows if row.way == way]
        if runs:
            minutes = statistics.mean(row.seconds for row in runs) / 60
            found = _spread([row.map for row in runs]), _spread([row.map50 for row in runs])
            lines.append([way, str(len(runs)), *found, f"{minutes:.1f}"])
    taught = [way for way in ways if way not in ("expert", "alone")]
    proposed = [way for way in taught if re.match("rakd[@=]", way)]
    pairs = [[(way, "alone") for way in taught]]
    # Each pair once.
    pairs += [[(way, o) for o in taught if o not in proposed[: i + 1]] for i, way in enumerate(proposed)]
    tables = [lines, *(table for family in pairs if len(table := _differences(rows, family)) > 1)]
    return "\n\n".join(map(results.format_table, tables))


def _differences(rows: Sequence[ComparisonRow], pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """A table of the first's mAP50-95 less the second's, of those pairs that have two seeds or more in common."""
    maps = {(row.way, row.seed): row.map for row in rows}
    found: dict[str, list[float]] = {}
    for way, other in pairs:
        values = [
            value - maps[other, seed] for (name, seed), value in maps.items() if name == way and (other, seed) in maps
        ]
        if len(values) > 1:
            found[f"{way} - {other}"] = values
    lines = [["difference", "seeds", "mAP50-95", "95 % interval"]]
    for name, values in found.items():
        mean, variance = statistics.mean(values), statistics.variance(values) / len(values)
        low, high = interval_of_mean(mean, variance, len(values), len(found))
        lines.append([name, str(len(values)), f"{100 * mean:+.2f}", f"[{100 * low:+.2f}, {100 * high:+.2f}]"])
    return lines


def _spread(values: Sequence[float]) -> str:
    found = summarise(values)
    return f"{100 * found.mean:.2f}" + (f" ± {100 * found.std:.2f}" if found.count > 1 else "")


def main() -> None:
    """Train, print and write."""
    options = parse()
    rows = Comparison(options).run()
    results.report(options.out, ComparisonRow, rows, format_rows(rows))


if __name__ == "__main__":
    results.exit_with_errors(main)
