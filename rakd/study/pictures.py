"""A study as pictures: methods' figures and gains, AP against latency, objects by size, losses."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory

from rakd.distill import registry
from rakd.evaluation.depth import ALL, SIZES
from rakd.evaluation.kitti import CLASSES
from rakd.geometry import FloatArray
from rakd.study.metrics import MEAN, METHOD_NAMES, PRIMARY, Metric, interval_of_mean, summarise, values_by_seed
from rakd.study.results import METHODS, StudyResult, TrainingLog
from rakd.study.tables import Difference, Row, differences

COLORS = {"expert": "#22272e", "none": "#8b95a1", **{name: spec.color for name, spec in registry.METHODS.items()}}
INK, MUTED, GRID = "#22272e", "#6b7480", "#e4e7eb"


def draw_bars(study: StudyResult) -> Figure:
    """Bars of the mean over seeds, a method each, every seed a dot: AP 3D (moderate, IoU 0.5/0.25), AbsRel, recall.

    Args:
        study: Methods without any run are left out.

    Returns:
        The figure: a row for each metric, a column for each class and one for all.
    """
    methods = [method for method in METHODS if any(run.method == method for run in study.runs)]
    rows = (
        ("AP 3D, moderate, IoU 0.5/0.25, %", [Metric("3d", name, "moderate", "loose") for name in (*CLASSES, MEAN)]),
        (
            "AbsRel of the objects that each model found, %: lower is better",
            [Metric("abs_rel", n) for n in _GROUPS],
        ),
        ("Recall at 2D IoU 0.5, at any score, %", [Metric("recall", name) for name in _GROUPS]),
    )
    head, panel = 0.75, 0.75 + 0.24 * len(methods)
    height = head + panel * len(rows)
    figure = Figure(figsize=(11.5, height))
    axes = figure.subplots(len(rows), len(_GROUPS), sharey=True, sharex="row", squeeze=False)
    for line, (title, metrics) in zip(axes, rows, strict=True):
        for axis, metric in zip(line, metrics, strict=True):
            _draw_bar_panel(axis, study, metric, methods)
            axis.set_title({MEAN: "average", ALL: "all"}.get(metric.name, metric.name), loc="left", size=9, color=INK)
        line[0].annotate(
            title, (0, 1), (-84, 20), "axes fraction", textcoords="offset points", size=10, color=INK, weight="bold"
        )
    figure.subplots_adjust(left=0.12, right=0.985, top=1 - (head + 0.42) / height, bottom=0.3 / height)
    figure.subplots_adjust(wspace=0.1, hspace=0.75 / (panel - 0.6))
    _write_title(figure, "Distillation methods: bars are means, dots single seeds", study)
    return figure


_GROUPS = (*CLASSES, ALL)


def _draw_bar_panel(axis: Axes, study: StudyResult, metric: Metric, methods: Sequence[str]) -> None:
    for place, method in enumerate(methods):
        values = list(values_by_seed(study, method, metric).values())
        if not values:
            axis.annotate("–", (0, place), (4, 0), textcoords="offset points", va="center", size=9, color=MUTED)
            continue
        mean = summarise(values).mean
        axis.barh(place, mean, height=0.72, color=COLORS[method])
        axis.plot(values, [place] * len(values), "o", ms=4.5, mfc="white", mec=INK, mew=0.9, clip_on=False, zorder=3)
        end = max(*values, mean)
        axis.annotate(f"{mean:.1f}", (end, place), (7, 0), textcoords="offset points", va="center", size=8.5, color=INK)
    axis.set_yticks(range(len(methods)), [METHOD_NAMES[method] for method in methods])
    axis.set_ylim(len(methods) - 0.45, -0.55)
    axis.margins(x=0.25)
    _clean(axis, "x")
    axis.tick_params(axis="y", labelsize=9.5, labelcolor=INK)


def draw_gains(studies: Mapping[str, StudyResult]) -> Figure:
    """Draw what each method gains over no distillation: means with their intervals, a panel for each primary metric.

    Better is to the right in every panel. A dot is filled where the whole interval is; without an interval it is hollow
    and alone.

    Args:
        studies: By the name above their rows. One at least has a method and no distillation in one seed.

    Returns:
        The figure: a row for each method of each study.
    """
    rows: list[tuple[str, Row | None]] = []
    for name, study in studies.items():
        table = next((table for table in differences(study) if table.key == "difference"), None)
        if table is not None:
            found: list[tuple[str, Row | None]] = [(row.name, row) for row in table.rows if row.runs]
            rows += [*[(name, None)] * bool(name and found), *found]
    height = 1.05 + 0.24 * len(rows)
    figure = Figure(figsize=(13.5, height))
    metrics = [metric for metric in PRIMARY if metric.kind != "bev"]
    axes = figure.subplots(1, len(metrics), sharey=True)
    for axis, metric in zip(axes, metrics, strict=True):
        for place, (_, row) in enumerate(rows):
            if row is not None:
                _draw_gain(axis, place, row, metric)
        title = metric.title.removesuffix(" (%)").replace("average", "three classes").replace(" at ", "\n")
        title = f"Less {title}" if metric.lower_is_better else title
        axis.set_title(title, loc="left", size=9, color=INK)
        axis.axvline(0, color=INK, lw=0.8, zorder=1)
        _clean(axis, "x")
    axes[0].set_yticks(range(len(rows)), ["" if row is None else name for name, row in rows])
    axes[0].set_ylim(len(rows) - 0.45, -0.55)
    axes[0].tick_params(axis="y", labelsize=9, labelcolor=INK)
    for place, (name, row) in enumerate(rows):
        if row is None:
            # Of the figure, since it reaches over several panels.
            where = blended_transform_factory(figure.transFigure, axes[0].transData)
            text = figure.text(0.012, place, name, va="center", size=9.5, weight="bold", color=INK, transform=where)
            text.set_bbox({"fc": "white", "ec": "none", "pad": 1})
    figure.subplots_adjust(left=0.1, right=0.99, top=1 - 0.8 / height, bottom=0.25 / height, wspace=0.12)
    title = "Gains over no distillation, points (95 % intervals, simultaneous for a study's methods; right is better)"
    figure.text(0.012, 1 - 0.1 / height, title, va="top", size=13, weight="bold", color=INK)
    return figure


def _draw_gain(axis: Axes, place: int, row: Row, metric: Metric) -> None:
    (cell,) = (cell for cell in row.cells if cell.metric == metric)
    if not isinstance(cell, Difference) or not cell.summary.count:
        return
    sign = -1 if metric.lower_is_better else 1
    ends = sorted(sign * end for end in cell.interval)
    if np.isfinite(ends).all():
        axis.plot(ends, [place, place], color=COLORS[row.method], lw=2, solid_capstyle="butt")
    face = COLORS[row.method] if ends[0] > 0 else "white"
    axis.plot(sign * cell.summary.mean, place, "o", ms=6, mfc=face, mec=COLORS[row.method], mew=1.4, zorder=3)


def draw_tradeoff(study: StudyResult) -> Figure:
    """Draw AP 3D of cars (moderate) against latency, a point for each method, at both IoU: what distilling is for.

    Args:
        study: With runs, and the latency of both models.
    """
    figure = Figure(figsize=(10.5, 4.6))
    for axis, overlaps in zip(figure.subplots(1, 2), ("official", "loose"), strict=True):
        metric = Metric("3d", "Car", "moderate", overlaps)
        for method in METHODS:
            summary = summarise(values_by_seed(study, method, metric).values())
            model = study.model("expert" if method == "expert" else "apprentice")
            if not summary.count or model is None or model.latency_ms is None:
                continue
            error = 0.0 if summary.count < 2 else summary.std
            axis.errorbar(
                model.latency_ms, summary.mean, yerr=error, fmt="o", ms=8, color=COLORS[method], capsize=3,
                label=METHOD_NAMES[method],
            )  # fmt: skip
            if model.onnx_ms is not None:
                axis.plot(model.onnx_ms, summary.mean, "o", ms=8, mfc="white", mec=COLORS[method])
        axis.set_title(metric.title, loc="left", size=10, color=INK)
        exported = "; hollow: in ONNX Runtime" if any(model.onnx_ms is not None for model in study.models) else ""
        axis.set_xlabel(f"latency of one image, ms (median{exported})", size=9, color=MUTED)
        axis.margins(x=0.25, y=0.15)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        _clean(axis, "both")
    if axis.containers:
        axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9, labelcolor=INK)
    figure.subplots_adjust(left=0.06, right=0.84, top=0.8, bottom=0.12, wspace=0.2)
    _write_title(figure, "Accuracy against latency (bars: standard deviation over seeds)", study)
    return figure


def draw_sizes(study: StudyResult) -> Figure | None:
    """Draw what each method gains over no distillation in recall and AbsRel, by the size of objects.

    Means of the paired differences with 95 % intervals over seeds, not corrected for the number of comparisons; with
    one seed the differences alone. Better is up.

    Args:
        study: Runs that lack these figures are left out.

    Returns:
        The figure; None where no method has them in a seed that no distillation has too.
    """
    runs = {(run.method, run.seed): run.by_size for run in study.runs if run.by_size}
    seeds = {m: sorted(seed for method, seed in runs if method == m and ("none", seed) in runs) for m in METHODS}
    methods = [method for method in METHODS if method not in ("none", "expert") and seeds[method]]
    if not methods:
        return None
    figure = Figure(figsize=(11.5, 4.8))
    names = [f"{low:g} to {high:g}" for low, high in pairwise(SIZES)]
    names[0], names[-1] = f"< {SIZES[1]:g}", f"> {SIZES[-2]:g}"
    kinds = (
        ("recall", "Gain in recall at 2D IoU 0.5", 1),
        ("abs_rel", "Less AbsRel of depth of the objects found", -1),
    )
    for axis, (kind, title, sign) in zip(figure.subplots(1, 2), kinds, strict=True):

        def table(method: str, seeds: Sequence[int], kind: str = kind) -> FloatArray:
            return np.array([[100 * getattr(group, kind) for group in runs[method, seed]] for seed in seeds])

        for number, method in enumerate(methods):
            gains = sign * (table(method, seeds[method]) - table("none", seeds[method]))
            columns = [
                column[np.isfinite(column)].tolist() for column in gains.T
            ]  # a run may have found none of a size
            means = np.array([summarise(column).mean for column in columns])
            axis.errorbar(
                np.arange(len(names)) + 0.6 * ((number + 0.5) / len(methods) - 0.5), means,
                yerr=[_half_interval(column) for column in columns], fmt="o", ms=4.5, lw=1.4,
                color=COLORS[method], label=METHOD_NAMES[method],
            )  # fmt: skip
        axis.axhline(0, color=INK, lw=0.8, zorder=1)
        alone = table("none", seeds[methods[0]])
        objects = [group.objects for group in runs["none", seeds[methods[0]][0]]]
        baseline = [summarise(column[np.isfinite(column)].tolist()).mean for column in alone.T]
        rows = zip(names, objects, baseline, strict=True)
        axis.set_xticks(range(len(names)), [f"{name}\n{count}\n{value:.1f}" for name, count, value in rows])
        axis.set_title(f"{title}, points", loc="left", size=10, color=INK)
        axis.set_xlabel("root of the 2D box's area, pixels; objects; no distillation, %", size=9, color=MUTED)
        _clean(axis, "y")
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9, labelcolor=INK)
    figure.subplots_adjust(left=0.05, right=0.87, top=0.8, bottom=0.2, wspace=0.16)
    _write_title(figure, "Gains over no distillation by size (95 % intervals over seeds; up is better)", study)
    return figure


def _half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean; 0 for one value or none."""
    if len(values) < 2:
        return 0.0
    low, high = interval_of_mean(0.0, summarise(values).std ** 2 / len(values), len(values))
    return (high - low) / 2


def draw_training(study: StudyResult, logs: Sequence[TrainingLog]) -> Figure:
    """Draw how the losses fell: a panel for each loss, a colour for each method, a line for each seed.

    Lines are running means over a twenty-fifth of the steps.

    Args:
        study: Of the logs, for the title.
        logs: At least one, with at least one loss.

    Raises:
        ValueError: There is no loss to draw.
    """
    names = list(dict.fromkeys(name for log in logs for row in log.rows for name in row if name != "step"))
    if not names:
        raise ValueError("logs must hold at least one loss, got none")
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    height = 1.15 + 2.9 * lines
    figure = Figure(figsize=(max(7.5, 4.2 * columns), height))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, name in zip(panels, names, strict=False):
        _draw_loss_panel(axis, name, logs)
    for axis in panels[len(names) :]:
        axis.set_axis_off()
    methods = [method for method in METHODS if any(log.method == method for log in logs)]
    figure.legend(
        handles=[Line2D([], [], color=COLORS[method], lw=2.5, label=METHOD_NAMES[method]) for method in methods],
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.5 / height),
        ncols=len(methods),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.5,
    )
    figure.subplots_adjust(left=0.07, right=0.985, top=1 - 1.15 / height, bottom=0.5 / height)
    figure.subplots_adjust(wspace=0.2, hspace=0.4)
    _write_title(figure, "Losses while training (running means)", study)
    return figure


def _draw_loss_panel(axis: Axes, name: str, logs: Sequence[TrainingLog]) -> None:
    smooth = []
    for log in logs:
        steps, values = log.series(name)
        if not len(steps):
            continue
        means = running_mean(values, len(values) // 50)
        axis.plot(steps, means, color=COLORS[log.method], lw=1.3)
        smooth.append(means)
    axis.set_title(name, loc="left", size=10, color=INK)
    axis.set_xlabel("step", size=9, color=MUTED)
    axis.margins(x=0.02)
    _clean(axis, "both")
    if not smooth:
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "no finite values", transform=axis.transAxes, ha="center", color=MUTED)
        return
    drawn = np.concatenate(smooth)
    if drawn.min() > 0 and drawn.max() > 10 * drawn.min():
        axis.set_yscale("log")
        decades = np.log10(drawn.max() / drawn.min())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="y", which="both", colors=MUTED, labelsize=8.5, length=0)
        axis.set_ylim(drawn.min() / 1.2, drawn.max() * 1.2)
        return
    # The first steps of a loss that is far off would flatten all the rest.
    low, high = np.quantile(drawn, [0.0, 0.99])
    margin = 0.08 * (high - low) or 0.5
    axis.set_ylim(low - margin, high + margin)


def running_mean(values: FloatArray, reach: int) -> FloatArray:
    """Mean over each value and its ``reach`` neighbours on both sides, fewer at the ends; ``[n]`` to ``[n]``."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return np.asarray((sums[end] - sums[first]) / (end - first))


def _clean(axis: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Leave of the frame only what is read, and a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axis.grid(axis=grid, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _write_title(figure: Figure, title: str, study: StudyResult) -> None:
    """Write the title, and under it where the figures come from."""
    height = figure.get_size_inches()[1]
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    source = " · ".join(part for part in (study.data, versions) if part)
    figure.text(0.012, 1 - 0.10 / height, title, va="top", size=13, weight="bold", color=INK)
    # At size 8.5 about 14 letters an inch; one line is all there is room for.
    size = min(8.5, 8.5 * 14 * figure.get_figwidth() / max(1, len(source)))
    figure.text(0.012, 1 - 0.37 / height, source, va="top", size=size, color=MUTED)
