"""The figure of ``python -m benchmarks.training_cost``: time of a training step by kind, and what the loss adds."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks import style
from benchmarks.records import StepRow

BAR_INCHES = 0.34


def draw_steps(rows: Sequence[StepRow]) -> Figure:
    """Draw a bar for each kind of step, from top to bottom in the rows' order.

    Args:
        rows: Rows of one run.

    Returns:
        The figure.
    """
    head = 0.92  # inches of title, source and sizes
    height = head + 0.4 + BAR_INCHES * len(rows)
    figure = Figure(figsize=(9.2, height))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        axes.barh(y, row.median_ms, height=0.72, color=style.COLOURS.get(row.contender, style.MUTED))
        axes.plot([row.p20_ms, row.p80_ms], [y, y], color=style.INK, linewidth=1, alpha=0.6)
        text = style.show_time(row.median_ms)
        if row.share is not None:
            text += f" · the loss adds {100 * row.share:.1f} %"
        end = (max(row.median_ms, row.p80_ms), y)
        axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", size=8.5, color=style.INK)
    axes.set_yticks(range(len(rows)), [style.NAMES.get(row.contender, row.contender) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.5 * max(row.p80_ms for row in rows))
    axes.xaxis.set_major_formatter(lambda value, _: style.show_time(value) if value else "0")
    style.clean_axes(axes, "x")
    axes.tick_params(axis="y", labelsize=9, labelcolor=style.INK)
    first = rows[0]
    sizes = f"{first.batch} images {first.height}×{first.width}, {first.boxes} boxes"
    axes.set_title(sizes, loc="left", size=10, color=style.INK)
    style.write_title(figure, f"A training step: {first.apprentice} learns from {first.expert}", first)
    figure.subplots_adjust(left=0.22, right=0.985, top=1 - head / height, bottom=0.33 / height)
    return figure


def draw_runs(rows: Sequence[StepRow]) -> dict[str, Figure]:
    """Draw a figure for each pair, device and number of threads; of several runs of the same, the last counts.

    Args:
        rows: Rows, of any number of runs.

    Returns:
        Figures by file stem.
    """
    runs: dict[str, dict[str, StepRow]] = {}
    for row in rows:
        parts = ["training", row.pair, *([] if row.device == "cpu" else row.device.lower().split())]
        parts += [f"{row.threads}-threads"] if row.device == "cpu" else []
        runs.setdefault("-".join(parts), {})[row.contender] = row
    return {stem: draw_steps(list(run.values())) for stem, run in runs.items()}
