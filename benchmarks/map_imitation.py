"""``python -m benchmarks.map_imitation RUN --data SCENES``: how well apprentices imitate their expert's maps, by level.

Of a finished study (``rakd distill``) whose apprentices imitated the expert's maps, as they are or rescaled. Two
figures for each map: the share of the variance of the expert's features in objects' boxes that the apprentice's
explain, and the expert's AP after this map has been replaced by the apprentice's, while the expert's own heads look at
it (left out where the expert sees larger images, since its maps then have more cells).
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import results
from rakd.data.kitti import Batch, KittiDataset, collate
from rakd.data.targets import pooling_boxes
from rakd.detector.base import BaseDetector
from rakd.detector.files import load_detector
from rakd.detector.inference import write_detections
from rakd.distill.scale import UnitScale
from rakd.evaluation.kitti import evaluate
from rakd.study.results import read_study
from rakd.training.model import expert_size, expert_strides
from rakd_ops import level_weights, multilevel_roi_align

_BATCH = 4

Maps = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ImitationRow(results.Machine):
    """One map, or all of them, of one apprentice."""

    method: str
    seed: int
    stride: int  # of the map; 0: all of them
    weight: float | None  # of this level in RAKD, mean over the objects
    explained: float | None  # 1 - error / variance, over channels, bins and objects, which count by that weight
    expert_ap: float | None  # Car 3D moderate, IoU 0.7, R40, percent
    swapped_ap: float | None  # the same with the map replaced


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    out = "runs/benchmarks/map_imitation.csv"
    parser = results.Parser("benchmarks.map_imitation", __doc__, out=out)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the study")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="frames that it was trained on")
    known = ("rakd", "hfa", "l_roi", "box_l2")
    parser.add_names("--methods", known, "which imitate the maps' values", default=["rakd"])
    parser.add_argument("--seeds", type=results.at_least(0), nargs="+", default=[0], metavar="N", help="default: 0")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> list[ImitationRow]:
    """Measure each apprentice beside the expert of its seed.

    Raises:
        ValueError: The study is not finished, its apprentices imitated rescaled maps with rescaled maps of their own,
            or their images do not fit the expert's.
    """
    if not (options.run / "study.json").is_file():
        raise ValueError(f"{options.run / 'study.json'}: no such file; is the study finished?")
    rescale = read_study(options.run / "study.json").config.get("rescale", False)
    if not isinstance(rescale, bool):
        raise ValueError(f"{options.run}: expected apprentices whose own maps were not rescaled, got {rescale!r}")
    machine = asdict(results.describe_machine("cpu"))
    truth = options.data / "training" / "label_2"
    rows = []
    for seed in options.seeds:
        expert = _load(options.run / f"expert-seed{seed}")
        train, val = (
            KittiDataset(options.data, split, height=expert.config.height, rules=expert.config.rules)
            for split in ("train", "val")
        )
        factors = unit_factors(expert, train)
        if not rescale:
            factors = dict.fromkeys(factors, 1.0)
        expert_ap = None
        for method in options.methods:
            apprentice = _load(options.run / f"{method}-seed{seed}")
            larger = expert_size(apprentice.config, expert.config)
            seen = KittiDataset(
                options.data,
                "val",
                height=apprentice.config.height,
                rules=apprentice.config.rules,
                expert_size=larger,
            )
            shares = explained(expert, apprentice, factors, seen)
            maps: list[tuple[int, Sequence[str], float | None, float | None]] = [
                (stride, [name], *figures)
                for stride, name, figures in zip(expert.strides, factors, shares, strict=True)
            ]
            if larger is None:
                maps.insert(0, (0, list(factors), None, None))
                expert_ap = _precision(expert, val, truth) if expert_ap is None else expert_ap
            for stride, names, weight, share in maps:
                swapped_ap = None
                if larger is None:
                    with swapped(expert, apprentice, factors, names):
                        swapped_ap = _precision(expert, val, truth)
                row = ImitationRow(
                    method=method,
                    seed=seed,
                    stride=stride,
                    weight=weight,
                    explained=share,
                    expert_ap=expert_ap,
                    swapped_ap=swapped_ap,
                    **machine,
                )
                rows.append(row)
    return rows


@torch.no_grad()
def unit_factors(expert: BaseDetector, frames: KittiDataset) -> dict[str, float]:
    """Factors that bring the expert's maps to a root mean square of 1, over as many batches as distillation takes."""
    scale = UnitScale()
    maps: Maps = {}
    for batch in _batches(expert, frames, UnitScale.CALLS * _BATCH):
        maps = expert.extract_features(batch.images)
        scale.update(list(maps.values()))
    return dict(zip(maps, scale.factors(list(maps.values())).tolist(), strict=True))


@contextlib.contextmanager
def swapped(
    expert: BaseDetector, apprentice: BaseDetector, factors: dict[str, float], names: Sequence[str]
) -> Iterator[None]:
    """Let the expert's heads see the apprentice's maps of these names, brought back to the expert's scale."""

    def swap(_: nn.Module, inputs: tuple[Tensor], own: Maps) -> Maps:
        theirs = apprentice.extract_features(inputs[0])
        return {name: theirs[name] / factors[name] if name in names else value for name, value in own.items()}

    handle = expert.pyramid.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def explained(
    expert: BaseDetector, apprentice: BaseDetector, factors: dict[str, float], frames: KittiDataset
) -> list[tuple[float, float]]:
    """For each map the mean weight of its level, and the share of the expert's variance that is explained."""
    sums = torch.zeros(len(factors), 4, expert.channels, dtype=torch.float64)
    weights, objects = torch.zeros(len(factors), dtype=torch.float64), 0
    larger = expert_strides(apprentice, expert)
    for batch in _batches(apprentice, frames, len(frames)):
        boxes = pooling_boxes([targets.boxes for targets in batch.targets("cpu")])
        rows = level_weights(boxes, strides=apprentice.strides, canonical_size=apprentice.canonical_size).double()
        weights += rows.sum(dim=0)
        objects += len(rows)
        theirs = expert.extract_features(batch.images if batch.expert_images is None else batch.expert_images)
        ours = apprentice.extract_features(batch.images)
        for level, (name, factor) in enumerate(factors.items()):
            target, imitation = (
                multilevel_roi_align([maps], boxes, strides=[strides[level]], assignment="uniform").double()
                for maps, strides in ((factor * theirs[name], larger), (ours[name], apprentice.strides))
            )
            terms = torch.stack([torch.ones_like(target), target, target**2, (target - imitation) ** 2])
            sums[level] += (rows[:, level, None, None, None] * terms).sum(dim=(1, 3, 4))
    count, first, second, error = sums.unbind(dim=1)
    variance = (second / count - (first / count) ** 2).sum(dim=1)
    shares = 1 - (error / count).sum(dim=1) / variance
    return list(zip((weights / objects).tolist(), shares.tolist(), strict=True))


def _batches(detector: BaseDetector, frames: KittiDataset, count: int) -> Iterator[Batch]:
    for start in range(0, min(count, len(frames)), _BATCH):
        chosen = range(start, min(start + _BATCH, len(frames)))
        yield collate([frames[i] for i in chosen], size=detector.config.image_size)


def _precision(detector: BaseDetector, frames: KittiDataset, truth: Path) -> float:
    """AP of cars, as in a row."""
    with tempfile.TemporaryDirectory() as folder:
        write_detections(detector, frames, Path(folder), torch.device("cpu"))
        names = [frame.id for frame in frames.frames]
        found = evaluate(truth, Path(folder), frames=names, progress=False)
    return float(found["Car"]["3d"]["R40"][1])


def _load(folder: Path) -> BaseDetector:
    if not (folder / "detector.pt").is_file():
        raise ValueError(f"{folder / 'detector.pt'}: no such file")
    return load_detector(folder / "detector.pt").eval()


def format_rows(rows: Sequence[ImitationRow]) -> str:
    """Lay out the rows for the terminal."""
    lines = [["method, seed", "stride", "weight", "explained", "AP swapped", "AP of the expert"]]
    for row in rows:
        shares = ["" if value is None else f"{value:.3f}" for value in (row.weight, row.explained)]
        precisions = ["" if value is None else f"{value:.2f}" for value in (row.swapped_ap, row.expert_ap)]
        lines.append([f"{row.method}, {row.seed}", str(row.stride or "all"), *shares, *precisions])
    return results.format_table(lines)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    rows = measure(options)
    results.report(options.out, ImitationRow, rows, format_rows(rows))


if __name__ == "__main__":
    results.exit_with_errors(main)
