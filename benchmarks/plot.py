"""``python -m benchmarks.plot CSV... --out DIR``: figures drawn from benchmark CSV files and nothing else.

Bars: time (with the floor) and peak memory by workload, a panel for each layout. Curves: time over each axis
that ``python -m benchmarks.scaling`` measured. Files of ``python -m benchmarks.training_cost`` give the bars of
`benchmarks.steps_figure`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from benchmarks import style
from benchmarks.measure import TRAINING
from benchmarks.records import Row, StepRow, holds_rows, read_all, read_rows
from benchmarks.report import format_ratio
from benchmarks.scaling import AXES, PREFIX
from benchmarks.session import exit_with_errors
from benchmarks.steps_figure import draw_runs

FORMATS = ("png", "svg", "pdf")
BAR_INCHES = 0.22
GAP_INCHES = 0.2

_AXIS_VALUE: dict[str, tuple[str, Callable[[Row], int]]] = {
    "boxes": ("boxes K", lambda row: row.boxes),
    "bins": ("output size P", lambda row: row.output_size),
    "dense-bins": ("output size P, all cells read", lambda row: row.output_size),
    "samples": ("sampling ratio n", lambda row: row.sampling_ratio),
    "dense-samples": ("sampling ratio n, all cells read", lambda row: row.sampling_ratio),
    "channels": ("channels C", lambda row: row.channels),
    "image": ("image height, px (width 3.4 times that)", lambda row: row.height),
    "threads": ("threads", lambda row: row.threads),
}


def latest(rows: Sequence[Row]) -> list[Row]:
    """Keep the last of rows that measure the same, in the order of first appearance."""
    kept = {}
    for row in rows:
        sizes = (row.boxes, row.output_size, row.sampling_ratio, row.channels, row.height, row.threads)
        names = (row.op, row.workload, row.dtype, row.layout, row.contender, row.what, row.device)
        kept[names + sizes] = row
    return list(kept.values())


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _contenders(rows: Sequence[Row]) -> list[str]:
    """List contenders: the known ones in the palette's order."""
    there = _unique([row.contender for row in rows])
    return sorted(
        there,
        key=lambda name: list(style.COLOURS).index(name) if name in style.COLOURS else len(style.COLOURS),
    )


def _group_inches(contenders: Sequence[str]) -> float:
    return GAP_INCHES + BAR_INCHES * len(contenders)


def _draw_time_panel(axes: Axes, rows: Sequence[Row], workloads: list[str], contenders: list[str]) -> None:
    bar = BAR_INCHES / _group_inches(contenders)
    for row in rows:
        group = workloads.index(row.workload)
        y = group + (contenders.index(row.contender) - (len(contenders) - 1) / 2) * bar
        axes.barh(y, row.median_ms, height=0.86 * bar, color=style.COLOURS.get(row.contender, style.MUTED))
        axes.plot([row.p20_ms, row.p80_ms], [y, y], color=style.INK, linewidth=1, alpha=0.6)
        text = style.show_time(row.median_ms)
        if not row.is_subject:
            text += f" · {format_ratio(row.ratio)}"
        weight = "bold" if row.is_subject else "normal"
        right = max(row.median_ms, row.p80_ms)
        axes.annotate(
            text,
            (right, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=8.5,
            color=style.INK,
            weight=weight,
        )
        if row.is_subject:
            floor = row.floor_fraction * row.median_ms
            axes.plot(
                [floor, floor],
                [group - 0.45, group + 0.45],
                color=style.INK,
                linewidth=1.4,
                linestyle=(0, (2, 1.5)),
            )
    style.use_time_axis(axes, "x")


def _draw_memory_panel(axes: Axes, rows: Sequence[Row], workloads: list[str], contenders: list[str]) -> None:
    bar = BAR_INCHES / _group_inches(contenders)
    for row in rows:
        if row.peak_extra_mib is None:
            continue
        y = workloads.index(row.workload) + (contenders.index(row.contender) - (len(contenders) - 1) / 2) * bar
        axes.barh(y, row.peak_extra_mib, height=0.86 * bar, color=style.COLOURS.get(row.contender, style.MUTED))
        weight = "bold" if row.is_subject else "normal"
        axes.annotate(
            f"{row.peak_extra_mib:,.0f}",
            (row.peak_extra_mib, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=8.5,
            color=style.INK,
            weight=weight,
        )


def draw_bars(rows: Sequence[Row], memory: bool) -> Figure:
    """Draw bars by workload, a panel for each layout.

    Args:
        rows: Rows of one op, dtype, device and kind of run.
        memory: Peak memory instead of time.

    Returns:
        The figure.
    """
    workloads = _unique([row.workload for row in rows])
    layouts = _unique([row.layout for row in rows])
    contenders = _contenders(rows)
    head = style.head_height(len(contenders) + (not memory))
    height = head + 0.33 + len(workloads) * _group_inches(contenders)
    figure = Figure(figsize=(4.9 * max(2, len(layouts)), height))
    panels = figure.subplots(1, len(layouts), sharex=True, sharey=True, squeeze=False)[0]
    for axes, layout in zip(panels, layouts, strict=True):
        mine = [row for row in rows if row.layout == layout]
        (_draw_memory_panel if memory else _draw_time_panel)(axes, mine, workloads, contenders)
        axes.set_title(style.LAYOUT_NAMES[layout], loc="left", size=10, color=style.INK)
        axes.set_yticks(range(len(workloads)), workloads)
        axes.set_ylim(len(workloads) - 0.48, -0.52)
        style.clean_axes(axes, "x")
        axes.tick_params(axis="y", labelsize=10, labelcolor=style.INK)
    if memory:
        panels[0].set_xlim(0, 1.18 * max(row.peak_extra_mib or 0.0 for row in rows) or 1.0)
    else:
        floors = [row.floor_fraction * row.median_ms for row in rows if row.is_subject]
        low, high = min([*floors, *(row.median_ms for row in rows)]), max(row.p80_ms for row in rows)
        panels[0].set_xlim(0.5 * low, high * (high / low) ** 0.3)
    handles: list[Patch | Line2D] = [
        Patch(color=style.COLOURS.get(c, style.MUTED), label=style.NAMES.get(c, c)) for c in contenders
    ]
    if not memory:
        handles.append(
            Line2D([], [], color=style.INK, linewidth=1.4, linestyle=(0, (2, 1.5)), label="floor: a plain copy")
        )
    first = rows[0]
    subject = "peak memory above the inputs, MiB" if memory else "time and ratio"
    style.write_title(
        figure, f"{style.OP_NAMES[first.op]}, {style.WHAT_NAMES[first.what]}, {first.dtype}: {subject}", first
    )
    style.write_legend(figure, handles)
    figure.subplots_adjust(left=0.085, right=0.975, top=1 - head / height, bottom=0.33 / height, wspace=0.06)
    return figure


def _draw_curve_panel(
    axes: Axes, rows: Sequence[Row], axis: str, contenders: list[str], layouts: list[str], ticks: tuple[int, ...]
) -> None:
    label, value_of = _AXIS_VALUE[axis]
    labelled = next((name for name in contenders if not name.startswith("rakd:")), None)
    for contender in contenders:
        for layout in layouts:
            mine = sorted((row for row in rows if row.contender == contender and row.layout == layout), key=value_of)
            if not mine:
                continue
            colour = style.COLOURS.get(contender, style.MUTED)
            x = [value_of(row) for row in mine]
            axes.fill_between(
                x, [row.p20_ms for row in mine], [row.p80_ms for row in mine], color=colour, alpha=0.15, lw=0
            )
            dashes = "-" if layout == layouts[0] else "--"
            axes.plot(x, [row.median_ms for row in mine], color=colour, linestyle=dashes, marker="o", markersize=3.5)
            if contender == labelled and layout == layouts[0]:
                end = (x[-1], mine[-1].median_ms)
                text = format_ratio(mine[-1].ratio)
                axes.annotate(text, end, (5, 0), textcoords="offset points", va="center", size=8.5, color=colour)
    values = sorted({value_of(row) for row in rows})
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_title(label, loc="left", size=10, color=style.INK)
    style.use_time_axis(axes, "y", ticks)
    style.clean_axes(axes, "both")


def draw_curves(rows: Sequence[Row]) -> Figure:
    """Draw time over each axis that the rows vary, one panel for each.

    Args:
        rows: Rows of ``python -m benchmarks.scaling``, of one dtype and device.

    Returns:
        The figure.
    """
    axes_names = [axis for axis in AXES if any(row.workload == PREFIX + axis for row in rows)]
    contenders = _contenders(rows)
    layouts = _unique([row.layout for row in rows])
    span = max(row.p80_ms for row in rows) / min(row.p20_ms for row in rows)
    ticks = (1, 2, 5) if span < 100.0 else (1,)
    columns = min(3 if len(axes_names) <= 6 else 4, len(axes_names))
    lines = -(-len(axes_names) // columns)
    head = style.head_height(len(contenders) + len(layouts))
    height = head + 2.6 * lines
    figure = Figure(figsize=(max(7.6, 3.5 * columns), height))
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for index, panel in enumerate(panels.flat):
        if index >= len(axes_names):
            panel.set_visible(False)
            continue
        mine = [row for row in rows if row.workload == PREFIX + axes_names[index]]
        _draw_curve_panel(panel, mine, axes_names[index], contenders, layouts, ticks)
    handles: list[Patch | Line2D] = [
        Line2D(
            [],
            [],
            color=style.COLOURS.get(c, style.MUTED),
            marker="o",
            markersize=3.5,
            label=style.NAMES.get(c, c),
        )
        for c in contenders
    ]
    handles += [
        Line2D([], [], color=style.MUTED, linestyle="-" if layout == layouts[0] else "--", label=name)
        for layout, name in style.LAYOUT_NAMES.items()
        if layout in layouts
    ]
    first = next((row for row in rows if row.workload != PREFIX + "threads"), rows[0])
    style.write_title(
        figure,
        f"{style.OP_NAMES[first.op]}, {style.WHAT_NAMES[first.what]}, {first.dtype}: how it scales",
        first,
    )
    style.write_legend(figure, handles)
    figure.subplots_adjust(
        left=0.075, right=0.955, top=1 - head / height, bottom=0.35 / height, wspace=0.17, hspace=0.3
    )
    return figure


def draw_all(rows: Sequence[Row]) -> dict[str, Figure]:
    """Draw every figure that the rows support.

    Args:
        rows: Rows, of any number of runs.

    Returns:
        Figures by file stem.
    """
    groups: dict[str, list[Row]] = {}
    several_threads = len({row.threads for row in rows if not row.workload.startswith(PREFIX)}) > 1
    for row in latest(rows):
        curves = row.workload.startswith(PREFIX)
        parts = ["scaling" if curves else row.op, row.dtype]
        parts += [] if row.device == "cpu" else row.device.lower().split()
        parts += [f"{row.threads}-threads"] if several_threads and not curves else []
        parts += [] if row.what == TRAINING else ["forward"]
        groups.setdefault("-".join(parts), []).append(row)
    figures = {}
    for stem, group in groups.items():
        if group[0].workload.startswith(PREFIX):
            figures[stem] = draw_curves(group)
            continue
        figures[f"{stem}-time"] = draw_bars(group, memory=False)
        if any(row.peak_extra_mib is not None for row in group):
            figures[f"{stem}-memory"] = draw_bars(group, memory=True)
    return figures


@dataclass(frozen=True)
class Options:
    """Draw figures from benchmark CSV files.

    Attributes:
        csv: Files written by python -m benchmarks, python -m benchmarks.scaling and
            python -m benchmarks.training_cost; of the same measurement in several, the last one counts.
        out: Folder of the figures.
        format: png, svg or pdf.
    """

    csv: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CSV ...")]
    out: Path = Path("runs/benchmarks")
    format: str = "png"


def main() -> None:
    """Draw."""
    options = tyro.cli(Options, prog="python -m benchmarks.plot")
    if options.format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {options.format!r}")
    steps = [path for path in options.csv if holds_rows(path, StepRow)]
    others = [path for path in options.csv if path not in steps]
    figures = draw_runs([row for path in steps for row in read_rows(path, StepRow)])
    if others or not steps:
        figures |= draw_all(read_all(others))
    options.out.mkdir(parents=True, exist_ok=True)
    for stem, figure in figures.items():
        path = options.out / f"{stem}.{options.format}"
        figure.savefig(path, dpi=150, facecolor="white")
        print(path)


if __name__ == "__main__":
    exit_with_errors(main)
