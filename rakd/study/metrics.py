"""Single figures of a study: values in each run, mean and standard deviation over seeds, intervals of differences."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rakd.distill.registry import METHODS
from rakd.evaluation.depth import ALL
from rakd.evaluation.kitti import CLASSES, LEVELS
from rakd.extras import require
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
METRIC_NAMES = {"3d": "AP 3D", "bev": "AP BEV", "bbox": "AP 2D", "abs_rel": "AbsRel", "recall": "Recall"}
"""Kinds of figures in words."""
IOU_NAMES = {"official": "IoU 0.7/0.5", "loose": "IoU 0.5/0.25"}
"""Overlap from which on a detection counts, of cars and of the other classes."""


@dataclass(frozen=True)
class Metric:
    """A figure that every run has.

    Attributes:
        kind: "3d", "bev" or "bbox" (average precision, percent), "abs_rel" (absolute relative error of depth,
            percent), "recall" (at 2D IoU 0.5, percent), "minutes" (of training) or "loss" (at the end of training).
        name: Class, `MEAN` for the average over classes, or "all" objects (AbsRel and recall); of a
            loss, its own name.
        level: Of average precision: "easy", "moderate", "hard", or `MEAN`.
        overlaps: Of average precision: "official" or "loose", see `IOU_NAMES`.
    """

    kind: str
    name: str = ""
    level: str = ""
    overlaps: str = ""

    @property
    def key(self) -> str:
        """The metric in a word or four, for files."""
        return " ".join(part for part in (self.kind, self.name, self.level, self.overlaps) if part)

    @property
    def lower_is_better(self) -> bool:
        """True of errors."""
        return self.kind == "abs_rel"

    @property
    def title(self) -> str:
        """The metric in words."""
        whose = {MEAN: "average", ALL: "all classes"}.get(self.name, self.name)
        level = "" if self.level in ("", MEAN) else f", {self.level}"
        return f"{METRIC_NAMES[self.kind]}, {whose}{level}{' at ' * bool(self.iou)}{self.iou} (%)"

    @property
    def iou(self) -> str:
        """Its overlap in words: that of its class, or both; empty for metrics without one."""
        both = IOU_NAMES.get(self.overlaps, "")
        cars, _, others = both.partition("/")
        return {"Car": cars, "Pedestrian": f"IoU {others}", "Cyclist": f"IoU {others}"}.get(self.name, both)


PRIMARY = (
    Metric("3d", "Car", "moderate", "official"),
    Metric("3d", "Car", "moderate", "loose"),
    Metric("bev", "Car", "moderate", "official"),
    Metric("bev", "Car", "moderate", "loose"),
    Metric("3d", MEAN, MEAN, "official"),
    Metric("3d", MEAN, MEAN, "loose"),
    Metric("abs_rel", ALL),
    Metric("recall", ALL),
)
"""The primary metrics, in which methods are compared seed by seed; KITTI ranks by the first."""


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over seeds.

    Attributes:
        mean: NaN if there are no values.
        std: Sample standard deviation; NaN for fewer than two values.
        count: Number of values.
    """

    mean: float
    std: float
    count: int


def values_by_seed(study: StudyResult, method: str, metric: Metric) -> dict[int, float]:
    """The metric in each run of a method that has it, by seed in ascending order."""
    runs = sorted((run for run in study.runs if run.method == method), key=lambda run: run.seed)
    values = {run.seed: _value(study, run, metric) for run in runs}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def summarise(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation of finite values."""
    values = list(values)
    return Summary(
        mean=statistics.fmean(values) if values else math.nan,
        std=statistics.stdev(values) if len(values) > 1 else math.nan,
        count=len(values),
    )


def paired_differences(study: StudyResult, method: str, baseline: str, metric: Metric) -> dict[int, float]:
    """The metric of a method minus that of a baseline, for each seed that both have, by seed in ascending order."""
    ones, others = (values_by_seed(study, name, metric) for name in (method, baseline))
    return {seed: ones[seed] - others[seed] for seed in ones if seed in others}


def difference_interval(
    study: StudyResult, method: str, baseline: str, metric: Metric, comparisons: int = 1
) -> tuple[float, float]:
    """95 % confidence interval of a mean paired difference, over trainings (seeds) and evaluated frames.

    The variance of the mean is that over seeds, ``s^2 / S``, plus that over draws of the frames, by the bootstrap
    (`rakd.study.results.RunResult.drawn`, the same draws for both methods). Seeds are few, so the quantile is Student's
    with ``S - 1`` degrees of freedom. With one seed the interval tells of the frames alone, by the normal quantile. The
    scatter over seeds has some of that over frames in it, so the interval is rather too wide.

    Args:
        study: The runs.
        method: See `paired_differences`, and so are baseline and metric.
        baseline: See there.
        metric: One of `PRIMARY`.
        comparisons: Number of intervals that are to be simultaneous, by Bonferroni's correction.

    Returns:
        Its ends; NaN where half of the draws lack the metric in some seed, or where both are equal on all frames.
    """
    differences = paired_differences(study, method, baseline, metric)
    runs = {(run.method, run.seed): run.drawn.get(metric.key, ()) for run in study.runs}
    drawn = [(runs[method, seed], runs[baseline, seed]) for seed in differences]
    if not drawn or any(len(values) != len(drawn[0][0]) or not values for pair in drawn for values in pair):
        return math.nan, math.nan
    means = np.mean([np.subtract(*pair) for pair in drawn], axis=0)
    means = means[np.isfinite(means)]
    variance = float(np.var(means, ddof=1)) if len(means) > max(1, len(drawn[0][0]) // 2) else math.nan
    if len(differences) > 1:
        variance += statistics.variance(differences.values()) / len(differences)
    if not variance > 0:
        return math.nan, math.nan
    return interval_of_mean(statistics.fmean(differences.values()), variance, len(differences), comparisons)


def interval_of_mean(mean: float, variance: float, seeds: int, comparisons: int = 1) -> tuple[float, float]:
    """95 % confidence interval of a mean over seeds, by Student's quantile; with one seed by the normal one.

    Args:
        mean: The mean.
        variance: Of the mean.
        seeds: Number of values behind it.
        comparisons: See `difference_interval`.

    Returns:
        Its ends.
    """
    share, special = 1 - 0.025 / comparisons, require("scipy.special", "train")
    quantile = special.stdtrit(seeds - 1, share) if seeds > 1 else special.ndtri(share)
    half = float(quantile) * math.sqrt(variance)
    return mean - half, mean + half


def _value(study: StudyResult, run: RunResult, metric: Metric) -> float:
    if metric.kind in ("abs_rel", "recall"):
        figures = run.depth.get(metric.name)
        if figures is None:
            return math.nan
        return 100 * (figures.abs_rel if metric.kind == "abs_rel" else figures.recall)
    if metric.kind == "minutes":
        return math.nan if run.seconds is None else run.seconds / 60
    if metric.kind == "loss":
        return run.losses.get(metric.name, math.nan)
    names = CLASSES if metric.name == MEAN else (metric.name,)
    levels = range(len(LEVELS)) if metric.level == MEAN else (LEVELS.index(metric.level),)
    cells = [(name, level) for name in names for level in levels]
    if len(cells) > 1:
        # Cells that no run has are dropped; a cell that only this run lacks leaves it without an average.
        cells = [cell for cell in cells if any(math.isfinite(_precision(run, metric, *cell)) for run in study.runs)]
    return statistics.fmean(_precision(run, metric, *cell) for cell in cells) if cells else math.nan


def _precision(run: RunResult, metric: Metric, name: str, level: int) -> float:
    values: Sequence[float] = run.precisions.get(metric.overlaps, {}).get(metric.kind, {}).get(name, ())
    return values[level] if values else math.nan
