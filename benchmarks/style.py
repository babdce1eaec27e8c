"""How the figures look: colours and names of the contenders, titles, axes, legends."""

from __future__ import annotations

from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.measure import FORWARD, TRAINING
from benchmarks.records import Row, StepRow
from benchmarks.scaling import PREFIX

COLOURS = {
    "alone": "#9aa3ad",
    "expert": "#6b7480",
    "rakd:cuda": "#1f5fbf",
    "rakd:cpu": "#1f5fbf",
    "rakd:triton": "#17877a",
    "rakd:reference": "#a9c1e6",
    "torchvision": "#d3702c",
    "difference": "#edae6b",
    "torchvision-compiled": "#8f3f2e",
    "difference-compiled": "#c98d7f",
}
NAMES = {
    "alone": "apprentice alone",
    "expert": "expert's forward as well",
    "rakd:cuda": "rakd_ops, CUDA",
    "rakd:cpu": "rakd_ops, C++",
    "rakd:triton": "rakd_ops, Triton",
    "rakd:reference": "rakd_ops, PyTorch reference",
    "torchvision": "torchvision",
    "difference": "torchvision, difference map",
    "torchvision-compiled": "torchvision, compiled",
    "difference-compiled": "torchvision, difference map, compiled",
}
LAYOUT_NAMES = {"nchw": "channels-first", "nhwc": "channels-last"}
WHAT_NAMES = {FORWARD: "forward", TRAINING: "forward + backward"}
OP_NAMES = {"distill": "soft_roi_distill", "align": "multilevel_roi_align"}
INK, MUTED, GRID = "#22272e", "#6b7480", "#e4e7eb"


def show_time(milliseconds: float) -> str:
    """Write a time with its unit and two or three digits."""
    value, unit = milliseconds, "ms"
    if milliseconds >= 999.5:
        value, unit = milliseconds / 1000, "s"
    elif milliseconds < 0.9995:
        value, unit = 1000 * milliseconds, "µs"
    return f"{value:,.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"


def write_title(figure: Figure, title: str, row: Row | StepRow) -> None:
    """Write the title, and under it where the figures come from."""
    commit = f", commit {row.commit[:10]}{'+' if row.dirty else ''}" if row.commit else ""
    machine = row.device if row.device != "cpu" else f"{row.cpu}, {row.threads} threads"
    if isinstance(row, Row) and row.workload == PREFIX + "threads":
        machine = row.cpu
    versions = f"torch {row.torch}, torchvision {row.torchvision}, rakd {row.rakd}{commit}"
    source = f"{machine} · {versions} · {row.date[:10]}"
    height = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.10 / height, title, va="top", size=13, weight="bold", color=INK)
    figure.text(0.012, 1 - 0.37 / height, source, va="top", size=8.5, color=MUTED)


def clean_axes(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Leave of the frame only what is read, and a light grid along the axes named."""
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


def write_legend(figure: Figure, handles: list[Patch | Line2D]) -> None:
    """Write one legend for all panels in a row under the title."""
    height = figure.get_size_inches()[1]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.55 / height),
        ncols=_legend_columns(len(handles)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.5,
        columnspacing=1.6,
    )


def use_time_axis(axes: Axes, which: str, ticks: tuple[int, ...] = (1,)) -> None:
    """Make an axis logarithmic with ticks that read as times: at these multiples of powers of ten."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(10, subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show_time(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
