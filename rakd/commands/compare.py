"""``rakd compare``: the metrics of finished runs, side by side."""

import os
import re
import warnings
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rakd.commands.config import read_options
from rakd.errors import UserError
from rakd.study.metrics import IOU_NAMES, Metric, summarise
from rakd.study.results import RunResult, read_run
from rakd.study.tables import Cell

_SEED = re.compile(r"-seed\d+$")
_MAY_DIFFER = ("data", "out", "seed", "device", "workers", "init", "validate_every", "checkpoint_every", "log_every")
"""Settings that runs of one column need not share."""


@dataclass(frozen=True)
class Compare:
    """Print the metrics of finished runs side by side: means, and standard deviations over seeds.

    Reads result.json of each trained model. Folders that differ only in -seedN share a column.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...", help_behavior_hint="(required)")]
    """Folders: of rakd train, of rakd distill (all of its models), or of one of its models."""

    def run(self) -> None:
        """Read the runs and print the table."""
        paths: dict[Path, list[Path]] = {}
        for path in dict.fromkeys(path for folder in self.runs for path in _find_results(folder)):
            paths.setdefault(path.parent.with_name(_SEED.sub("", path.parent.name)), []).append(path)
        if not paths:
            raise UserError("RUN: expected at least one folder of a run, got none")
        columns = {name: [read_run(path) for path in found] for name, found in paths.items()}
        for name, runs in columns.items():
            unlike = _unlike(paths[name], runs) if len(runs) > 1 else ""
            if unlike:
                warnings.warn(f"{name.name}: the runs that are averaged are no repetitions: {unlike}", stacklevel=1)
        objects = {run.depth["all"].objects for runs in columns.values() for run in runs if "all" in run.depth}
        if len(objects) > 1:
            counts = ", ".join(map(str, sorted(objects)))
            warnings.warn(f"the runs were evaluated on different frames: objects to find are {counts}", stacklevel=1)
        print(format_runs(_short_names(columns)))


def format_runs(columns: dict[str, list[RunResult]]) -> str:
    """Table of metrics, one down a line; runs across.

    Args:
        columns: Runs by the name of their column. Each shows the mean of its runs, and the sample standard deviation
            if there are several.
    """
    figures = {name: [_figures(run) for run in runs] for name, runs in columns.items()}
    rows = [["", *columns], ["seeds", *(", ".join(str(run.seed) for run in runs) for runs in columns.values())]]
    for metric in dict.fromkeys(key for column in figures.values() for run in column for key in run):
        cells = []
        for runs in figures.values():
            values = [run[metric] for run in runs if isfinite(run.get(metric, float("nan")))]
            cells.append(Cell(Metric(metric), summarise(values), 2).text(len(runs)))
        rows.append([metric, *cells])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = (
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    )
    note = "AP: R40, percent, moderate; IoU of Car / of the other classes. Recall: at 2D IoU 0.5."
    return "\n".join([*lines, note])


def _figures(run: RunResult) -> dict[str, float]:
    """The metrics of one run, by their names in the table."""
    figures = {
        f"AP {metric.upper()} {name}, {IOU_NAMES[overlaps]}": values[1]
        for overlaps, metrics in run.precisions.items()
        for metric, classes in metrics.items()
        for name, values in classes.items()
        if (metric, overlaps) != ("bbox", "loose")  # boxes in the image have one overlap, the official
    }
    for name, depth in run.depth.items():
        figures[f"AbsRel {name}, %"] = 100 * depth.abs_rel
        figures[f"recall {name}, %"] = 100 * depth.recall
    if run.seconds is not None:
        figures["training, minutes"] = run.seconds / 60
    return figures


def _unlike(paths: list[Path], runs: list[RunResult]) -> str:
    """What runs of one column differ in beside their seeds, in words.

    Reads the options of ``rakd train`` or the settings of a study's run; where neither is there, the method alone.
    """
    files = [path.with_name(name) for path in paths for name in ("config.json", "settings.json")]
    told = [read_options(file) for file in files if file.exists()]
    found = {"method": {run.method for run in runs}}
    for name in dict.fromkeys(name for own in told for name in own if name not in _MAY_DIFFER):
        found[name] = {str(own.get(name, "its own")) for own in told}
    texts = [f"{name} {' and '.join(sorted(values))}" for name, values in found.items() if len(values) > 1]
    if len({run.seed for run in runs}) < len(runs):
        texts.append(f"seeds are not all different: {', '.join(str(run.seed) for run in runs)}")
    return ", ".join(texts)


def _find_results(folder: Path) -> list[Path]:
    """The result files of a run, or of all runs in a folder."""
    paths = [path.resolve() for path in sorted([*folder.glob("result.json"), *folder.glob("*/result.json")])]
    if not paths:
        raise UserError(f"RUN: {folder} holds no finished run: expected result.json in it or in its folders")
    return paths


def _short_names(columns: dict[Path, list[RunResult]]) -> dict[str, list[RunResult]]:
    """Columns by their paths, without what all paths have in common."""
    common = os.path.commonpath([path.parent for path in columns])
    return {os.path.relpath(path, common): runs for path, runs in columns.items()}
