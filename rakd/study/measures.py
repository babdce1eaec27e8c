"""Single figures of a study: what to look at, its value in each run, mean and spread over seeds."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rakd.distill.registry import METHODS
from rakd.evaluation.depth import ALL
from rakd.evaluation.kitti import CLASSES, LEVELS
from rakd.study.results import RunResult, StudyResult

MEAN = "mean"
"""As a class or level: the average over all of them."""

METHOD_NAMES = {
    "expert": "Expert",
    "none": "No distillation",
    **{name: spec.label for name, spec in METHODS.items()},
}
CLASS_NAMES = {"Car": "Car", "Pedestrian": "Ped.", "Cyclist": "Cyc.", MEAN: "Average", ALL: "All"}
LEVEL_NAMES = {"easy": "easy", "moderate": "mod.", "hard": "hard", MEAN: ""}
_METRIC_NAMES = {"3d": "AP 3D", "bev": "AP BEV", "depth_error": "Depth error", "found": "Found"}


@dataclass(frozen=True)
class Measure:
    """A figure that every run has.

    Attributes:
        metric: "3d" or "bev" (average precision, percent), "depth_error" (relative, percent), "found" (share
            of the objects, percent), "minutes" (of training) or "loss" (at the end of training).
        name: Class, `MEAN` for the average over classes, or "all" objects (depth error and share found); of a
            loss, its own name.
        level: Of average precision: "easy", "moderate", "hard", or `MEAN`.
        overlaps: Of average precision: "official" or "loose".
    """

    metric: str
    name: str = ""
    level: str = ""
    overlaps: str = ""

    @property
    def lower_is_better(self) -> bool:
        """True of errors."""
        return self.metric == "depth_error"

    @property
    def title(self) -> str:
        """The measure in words."""
        whose = {MEAN: "average", ALL: "all classes"}.get(self.name, self.name)
        level = "" if self.level in ("", MEAN) else f", {self.level}"
        overlaps = f" at {self.overlaps} overlaps" if self.overlaps else ""
        return f"{_METRIC_NAMES[self.metric]}, {whose}{level}{overlaps} (%)"


@dataclass(frozen=True)
class Summary:
    """Mean and spread over seeds.

    Attributes:
        mean: NaN if there are no values.
        spread: Sample standard deviation; NaN for fewer than two values.
        count: Number of values.
    """

    mean: float
    spread: float
    count: int


def values_by_seed(study: StudyResult, method: str, measure: Measure) -> dict[int, float]:
    """The measure in each run of a method that has it, by seed in ascending order."""
    runs = sorted((run for run in study.runs if run.method == method), key=lambda run: run.seed)
    values = {run.seed: _value(study, run, measure) for run in runs}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def summarise(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation of finite values."""
    values = list(values)
    return Summary(
        mean=statistics.fmean(values) if values else math.nan,
        spread=statistics.stdev(values) if len(values) > 1 else math.nan,
        count=len(values),
    )


def _value(study: StudyResult, run: RunResult, measure: Measure) -> float:
    if measure.metric in ("depth_error", "found"):
        figures = run.depth.get(measure.name)
        if figures is None:
            return math.nan
        return 100 * (figures.error if measure.metric == "depth_error" else figures.found)
    if measure.metric == "minutes":
        return math.nan if run.seconds is None else run.seconds / 60
    if measure.metric == "loss":
        return run.losses.get(measure.name, math.nan)
    names = CLASSES if measure.name == MEAN else (measure.name,)
    levels = range(len(LEVELS)) if measure.level == MEAN else (LEVELS.index(measure.level),)
    cells = [(name, level) for name in names for level in levels]
    if len(cells) > 1:
        # What no run has is not in the data; what only this run lacks leaves it without an average.
        cells = [cell for cell in cells if any(math.isfinite(_precision(run, measure, *cell)) for run in study.runs)]
    return statistics.fmean(_precision(run, measure, *cell) for cell in cells) if cells else math.nan


def _precision(run: RunResult, measure: Measure, name: str, level: int) -> float:
    values: Sequence[float] = run.precisions.get(measure.overlaps, {}).get(measure.metric, {}).get(name, ())
    return values[level] if values else math.nan
