"""``python -m benchmarks.figures CSV...``: figures and the README's table, from CSV files of ``python -m benchmarks``.

Bars: time by workload, with the bandwidth bound, a panel for each layout. Curves: time over each axis that was
measured. Table: our times in training beside both baselines, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.results import Parser, Row, exit_with_errors, format_ratio, format_time, read_rows
from benchmarks.workloads import AXES, FORWARD, SCALING, TRAINING

LOOKS = {  # colour and name of each implementation, in the order of the legend
    "rakd:cuda": ("#1f5fbf", "rakd_ops, CUDA"),
    "rakd:cuda-rows": ("#6f97d6", "rakd_ops, CUDA, boxes as one tensor"),
    "rakd:cpu": ("#1f5fbf", "rakd_ops, C++"),
    "rakd:triton": ("#17877a", "rakd_ops, Triton"),
    "rakd:reference": ("#a9c1e6", "rakd_ops, PyTorch reference"),
    "torchvision": ("#d3702c", "torchvision"),
    "difference": ("#edae6b", "torchvision, difference map"),
    "torchvision-compiled": ("#8f3f2e", "torchvision, compiled"),
    "difference-compiled": ("#c98d7f", "torchvision, difference map, compiled"),
}
LAYOUT_NAMES = {"nchw": "channels-first", "nhwc": "channels-last"}
PASS_NAMES = {FORWARD: "forward", TRAINING: "forward + backward"}
OP_NAMES = {"distill": "soft_roi_distill", "align": "multilevel_roi_align"}
INK, MUTED, GRID = "#22272e", "#6b7480", "#e4e7eb"
BAR, GAP = 0.22, 0.2  # inches
DASHES = (0, (2, 1.5))

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


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _implementations(rows: Sequence[Row]) -> list[str]:
    # One without a look is an error: left out, nobody would miss it.
    return sorted({row.implementation for row in rows}, key=list(LOOKS).index)


def show_time(milliseconds: float) -> str:
    """Write a time with its unit and two or three digits."""
    value, unit = milliseconds, "ms"
    if milliseconds >= 999.5:
        value, unit = milliseconds / 1000, "s"
    elif milliseconds < 0.9995:
        value, unit = 1000 * milliseconds, "µs"
    return f"{value:,.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"


def _annotate(axes: Axes, text: str, place: tuple[float, float], colour: str = INK, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.annotate(text, place, (4, 0), textcoords="offset points", va="center", size=8.5, color=colour, weight=weight)


def write_title(figure: Figure, title: str, row: Row, rows: Sequence[Row]) -> None:
    """Write the title, and under it where the figures come from: the machine is a row's, commits are those of all."""
    commits = _unique([f"{row.commit[:10]}{'+' if row.dirty else ''}" for row in rows if row.commit])
    commit = f", commit {' and '.join(commits)}" if commits else ""
    machine = row.device if row.device != "cpu" else f"{row.cpu}, {row.threads} threads"
    if row.workload == SCALING + "threads":
        machine = row.cpu
    versions = f"torch {row.torch}, torchvision {row.torchvision}, rakd {row.rakd}{commit}"
    height = figure.get_size_inches()[1]
    source = f"{machine} · {versions} · {row.date[:10]}"
    figure.text(0.012, 1 - 0.10 / height, title, va="top", size=13, weight="bold", color=INK)
    figure.text(0.012, 1 - 0.37 / height, source, va="top", size=8.5, color=MUTED)


def clean_axes(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Leave a light grid along the axes named, and of the frame only two sides."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_columns(entries: int) -> int:
    return entries if entries <= 5 else 4


def head_height(legend_entries: int) -> float:
    """Inches that title, source, legend and the panels' own titles take."""
    return 0.92 + 0.2 * -(-legend_entries // _legend_columns(legend_entries))


def write_legend(figure: Figure, handles: Sequence[Patch | Line2D]) -> None:
    """Write one legend for all panels in a row under the title."""
    figure.legend(
        handles=list(handles),
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.55 / figure.get_size_inches()[1]),
        ncols=_legend_columns(len(handles)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.5,
        columnspacing=1.6,
    )


def _use_time_axis(axes: Axes, which: str, ticks: tuple[int, ...] = (1,)) -> None:
    """Make an axis logarithmic with ticks that read as times: at these multiples of powers of ten."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(10, subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show_time(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def latest(rows: Sequence[Row]) -> list[Row]:
    """Keep the last of rows that measure the same, in the order of first appearance."""
    last = {}
    for row in rows:
        sizes = (row.boxes, row.output_size, row.sampling_ratio, row.channels, row.height, row.threads)
        names = (row.op, row.workload, row.dtype, row.layout, row.implementation, row.passes, row.device)
        last[names + sizes] = row
    return list(last.values())


def _bound_ms(row: Row) -> float:
    return 1000 * row.bound_mib * 2**20 / (1e9 * row.copy_gb_s)


def _draw_bar(axes: Axes, row: Row, group: int, y: float, height: float) -> None:
    axes.barh(y, row.median_ms, height=0.86 * height, color=LOOKS[row.implementation][0])
    text = show_time(row.median_ms) + ("" if row.is_subject else f" · {format_ratio(row.ratio)}")
    _annotate(axes, text, (max(row.median_ms, row.p80_ms), y), bold=row.is_subject)
    axes.plot([row.p20_ms, row.p80_ms], [y, y], color=INK, linewidth=1, alpha=0.6)
    if row.is_subject:
        bound = _bound_ms(row)
        axes.plot([bound, bound], [group - 0.45, group + 0.45], color=INK, linewidth=1.4, linestyle=DASHES)


def draw_bars(rows: Sequence[Row]) -> Figure:
    """Draw bars by workload, a panel for each layout, from rows of one op, dtype, device and kind of passes."""
    workloads = _unique([row.workload for row in rows])
    layouts = _unique([row.layout for row in rows])
    names = _implementations(rows)
    group_inches = GAP + BAR * len(names)
    head = head_height(len(names) + 1)
    height = head + 0.33 + len(workloads) * group_inches
    figure = Figure(figsize=(4.9 * max(2, len(layouts)), height))
    panels = figure.subplots(1, len(layouts), sharex=True, sharey=True, squeeze=False)[0]
    for axes, layout in zip(panels, layouts, strict=True):
        for row in (row for row in rows if row.layout == layout):
            group = workloads.index(row.workload)
            y = group + (names.index(row.implementation) - (len(names) - 1) / 2) * BAR / group_inches
            _draw_bar(axes, row, group, y, BAR / group_inches)
        _use_time_axis(axes, "x")
        axes.set_title(LAYOUT_NAMES[layout], loc="left", size=10, color=INK)
        axes.set_yticks(range(len(workloads)), workloads)
        axes.set_ylim(len(workloads) - 0.48, -0.52)
        clean_axes(axes, "x")
        axes.tick_params(axis="y", labelsize=10, labelcolor=INK)
    handles: list[Patch | Line2D] = [Patch(color=LOOKS[name][0], label=LOOKS[name][1]) for name in names]
    low = min(min(_bound_ms(row), row.median_ms) for row in rows)
    high = max(row.p80_ms for row in rows)
    panels[0].set_xlim(0.5 * low, high * (high / low) ** 0.3)
    handles.append(Line2D([], [], color=INK, linewidth=1.4, linestyle=DASHES, label="bandwidth bound: a plain copy"))
    first = rows[0]
    write_title(figure, f"{OP_NAMES[first.op]}, {PASS_NAMES[first.passes]}, {first.dtype}: time and ratio", first, rows)
    write_legend(figure, handles)
    figure.subplots_adjust(left=0.085, right=0.975, top=1 - head / height, bottom=0.33 / height, wspace=0.06)
    return figure


def _draw_curves(axes: Axes, rows: Sequence[Row], axis: str, names: list[str], layouts: list[str]) -> None:
    label, value_of = _AXIS_VALUE[axis]
    labelled = next((name for name in names if not name.startswith("rakd:")), None)
    for name in names:
        for layout in layouts:
            mine = sorted((r for r in rows if r.implementation == name and r.layout == layout), key=value_of)
            if not mine:
                continue
            x, colour = [value_of(row) for row in mine], LOOKS[name][0]
            low, high = [row.p20_ms for row in mine], [row.p80_ms for row in mine]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            dashes = "-" if layout == layouts[0] else "--"
            axes.plot(x, [row.median_ms for row in mine], color=colour, linestyle=dashes, marker="o", markersize=3.5)
            if name == labelled and layout == layouts[0]:
                _annotate(axes, format_ratio(mine[-1].ratio), (x[-1], mine[-1].median_ms), colour)
    values = sorted({value_of(row) for row in rows})
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_title(label, loc="left", size=10, color=INK)


def draw_curves(rows: Sequence[Row]) -> Figure:
    """Draw time over each axis that the rows vary, one panel for each, from rows of one dtype and device."""
    present = [axis for axis in AXES if any(row.workload == SCALING + axis for row in rows)]
    names = _implementations(rows)
    layouts = _unique([row.layout for row in rows])
    span = max(row.p80_ms for row in rows) / min(row.p20_ms for row in rows)
    columns = min(3 if len(present) <= 6 else 4, len(present))
    lines = -(-len(present) // columns)
    head = head_height(len(names) + len(layouts))
    height = head + 2.6 * lines
    figure = Figure(figsize=(max(7.6, 3.5 * columns), height))
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for index, panel in enumerate(panels.flat):
        if index >= len(present):
            panel.set_visible(False)
            continue
        mine = [row for row in rows if row.workload == SCALING + present[index]]
        _draw_curves(panel, mine, present[index], names, layouts)
        _use_time_axis(panel, "y", (1, 2, 5) if span < 100.0 else (1,))
        clean_axes(panel, "both")
    handles = [Line2D([], [], color=LOOKS[n][0], marker="o", markersize=3.5, label=LOOKS[n][1]) for n in names]
    for layout, dashes in zip(layouts, ("solid", "dashed"), strict=False):
        handles.append(Line2D([], [], color=MUTED, ls=dashes, label=LAYOUT_NAMES[layout]))
    first = next((row for row in rows if row.workload != SCALING + "threads"), rows[0])
    title = f"{OP_NAMES[first.op]}, {PASS_NAMES[first.passes]}, {first.dtype}: how it scales"
    write_title(figure, title, first, rows)
    write_legend(figure, handles)
    top, bottom = 1 - head / height, 0.35 / height
    figure.subplots_adjust(left=0.075, right=0.955, top=top, bottom=bottom, wspace=0.17, hspace=0.3)
    return figure


def draw_all(rows: Sequence[Row]) -> dict[str, Figure]:
    """Draw every figure that the rows support, by file stem; of several runs of the same, the last counts."""
    groups: dict[str, list[Row]] = {}
    several_threads = len({row.threads for row in rows if not row.workload.startswith(SCALING)}) > 1
    for row in latest(rows):
        is_curve = row.workload.startswith(SCALING)
        parts = ["scaling" if is_curve else row.op, row.dtype]
        parts += [] if row.device == "cpu" else row.device.lower().split()
        parts += [f"{row.threads}-threads"] if several_threads and not is_curve else []
        parts += [] if row.passes == TRAINING else ["forward"]
        groups.setdefault("-".join(parts), []).append(row)
    curves = {stem: draw_curves(group) for stem, group in groups.items() if stem.startswith("scaling")}
    return {f"{stem}-time": draw_bars(group) for stem, group in groups.items() if stem not in curves} | curves


def _baseline_cell(rows: dict[str, Row], name: str) -> str:
    ratios = [rows[n].ratio for n in (name, f"{name}-compiled") if n in rows]
    return " / ".join(format_ratio(ratio) for ratio in ratios) or "–"


def format_readme(rows: Sequence[Row]) -> str:
    """Make the README's Markdown table of training steps: a line per workload and layout.

    Ratios are times over ours, ``eager / compiled``.
    """
    wanted = [row for row in rows if row.passes == TRAINING and not row.workload.startswith(SCALING)]
    if not wanted:
        return ""
    gpu = any(row.device != "cpu" for row in wanted)
    heads = ["workload", "layout", "ours, ms", "20–80 %", "of the bandwidth bound"]
    heads += ["host, µs", "device, µs", "launches"] * gpu + ["torchvision per map", "difference map"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    cases: dict[tuple[str, str, str, str, int], dict[str, Row]] = {}
    for row in wanted:
        case = (row.workload, row.dtype, row.layout, row.device, row.threads)
        run = cases.get(case, {})
        # The last run counts, whole: a ratio is of two times of one run.
        same = all((other.commit, other.date) == (row.commit, row.date) for other in run.values())
        cases[case] = {**(run if same else {}), row.implementation: row}
    several = len({case[3:] for case in cases}) > 1
    for (workload, dtype, layout, device, threads), mine in cases.items():
        ours = next((row for row in mine.values() if row.is_subject), None)
        if ours is None:
            continue
        spread = f"{format_time(ours.p20_ms)}–{format_time(ours.p80_ms)}"
        name = f"`{workload}`" + ("" if dtype == "float32" else f", {dtype}")
        name += f", {device}, {threads} threads" if several else ""
        cells = [name, LAYOUT_NAMES[layout], format_time(ours.median_ms), spread, f"{100 * ours.bound_fraction:.0f} %"]
        if gpu:
            cells += ["–" if n is None else f"{n:.0f}" for n in (ours.host_us, ours.device_us, ours.launches)]
        cells += [_baseline_cell(mine, name) for name in ("torchvision", "difference")]
        lines.append("| " + " | ".join(cells) + " |")
    first = wanted[0]
    source = f"{first.device if gpu else first.cpu}, torch {first.torch}, torchvision {first.torchvision}"
    source += f", commit {first.commit[:10]}, {first.date[:10]}; ratios: eager / compiled."
    return "\n".join([*lines, "", source])


def main() -> None:
    """Draw, and print the table."""
    parser = Parser("benchmarks.figures", __doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="where several hold the same measurement, the last counts")
    options = parser.parse_args()
    rows = [row for path in options.csv for row in read_rows(path, Row)]
    if not rows:
        raise ValueError(f"csv: no rows in {', '.join(map(str, options.csv))}")
    if table := format_readme(rows):
        print(table)
    figures = draw_all(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    for stem, figure in figures.items():
        figure.savefig(options.out / f"{stem}.png", dpi=150, facecolor="white")
        print(options.out / f"{stem}.png")


if __name__ == "__main__":
    exit_with_errors(main)
