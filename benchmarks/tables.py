"""Tables of measurements, for the terminal and the README.

``python -m benchmarks.tables CSV...`` prints the README's table: our times beside both baselines, torchvision's
RoIAlign of each map and one RoIAlign of the difference map, eager and compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Machine, Row, exit_with_errors, read_all
from benchmarks.workloads import PASSES, TRAINING


def format_time(milliseconds: float) -> str:
    """Write a time with three digits that mean something."""
    for limit, digits in ((1.0, 3), (10.0, 2), (100.0, 1)):
        if milliseconds < limit:
            return f"{milliseconds:.{digits}f}"
    return f"{milliseconds:.0f}"


def format_ratio(ratio: float) -> str:
    """Write a ratio with two or three digits."""
    if ratio < 10.0:
        return f"{ratio:.2f}×" if ratio < 1.0 else f"{ratio:.1f}×"
    return f"{ratio:,.0f}×"


def format_heading(machine: Machine, protocol: str) -> str:
    """Describe machine, versions and protocol in a few lines."""
    commit = f"{machine.commit[:10]}{' + local changes' if machine.dirty else ''}" if machine.commit else "no checkout"
    return (
        f"device {machine.device}, processor {machine.cpu}\n"
        f"torch {machine.torch}, torchvision {machine.torchvision}, rakd {machine.rakd} ({commit})\n{protocol}\n"
        "ratio: time over that of the first rakd backend; +MiB: rise of peak memory; "
        "bound: share of the time in which a copy would move the bytes that must move"
    )


def _cells(row: Row | None, gpu: bool) -> list[str]:
    if row is None:
        return [""] * (8 if gpu else 5)
    cells = [
        format_time(row.median_ms),
        f"{format_time(row.p20_ms)}-{format_time(row.p80_ms)}",
        "1" if row.is_subject else format_ratio(row.ratio),
        "?" if row.peak_extra_mib is None else f"{row.peak_extra_mib:.0f}",
        f"{100 * row.bound_fraction:.0f} %" if row.bound_fraction >= 0.01 else "<1 %",
    ]
    if not gpu:
        return cells
    numbers = [row.host_us, row.device_us, row.launches]
    return cells + ["?" if number is None else f"{number:.0f}" for number in numbers]


def format_case(rows: Sequence[Row]) -> str:
    """Lay out the rows of one case: a line per implementation, forward beside forward + backward."""
    first = rows[0]
    gpu = first.device != "cpu"
    passes = [name for name in PASSES if any(row.passes == name for row in rows)]
    found = {(row.implementation, row.passes): row for row in rows}
    columns = ["ms", "20-80 %", "ratio", "+MiB", "bound"] + ["host µs", "device µs", "launches"] * gpu
    lines = [["", *passes], ["", *columns * len(passes)]]
    for name in dict.fromkeys(row.implementation for row in rows):
        lines.append([name, *(cell for one in passes for cell in _cells(found.get((name, one)), gpu))])
    widths = [max(len(line[column]) for line in lines[1:]) for column in range(len(lines[1]))]
    texts = []
    for line in lines[1:]:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        groups = ["  ".join(cells[start : start + len(columns)]) for start in range(0, len(cells), len(columns))]
        texts.append("   | ".join([line[0].ljust(widths[0]), *groups]))
    group_widths = [len(text) for text in texts[0].split("   | ")]
    titles = [name.center(width) for name, width in zip(lines[0], group_widths, strict=True)]
    bounds = ", ".join(f"{one} {next(r.bound_mib for r in rows if r.passes == one):.0f} MiB" for one in passes)
    head = (
        f"{first.workload}: {first.batch} images {first.height}×{first.width}, {first.boxes} boxes ({first.kind}), "
        f"{first.output_size}×{first.output_size} bins, {first.sampling_ratio}² samples, C {first.channels}, "
        f"{first.dtype} {first.layout}, {first.threads} threads"
    )
    moved = f"must move: {bounds}; copy {first.copy_gb_s:.1f} GB/s"
    return "\n".join(line.rstrip() for line in [head, moved, "   | ".join(titles), *texts, ""])


LAYOUT_NAMES = {"nchw": "channels-first", "nhwc": "channels-last"}


def _baseline_cell(rows: dict[str, Row], name: str) -> str:
    ratios = [rows[n].ratio for n in (name, f"{name}-compiled") if n in rows]
    return " / ".join(format_ratio(ratio) for ratio in ratios) or "–"


def format_readme(rows: Sequence[Row]) -> str:
    """Make the README's Markdown table of training steps: a line per workload and layout.

    Ratios are times over ours, ``eager / compiled``.
    """
    wanted = [row for row in rows if row.passes == TRAINING]
    gpu = any(row.device != "cpu" for row in wanted)
    heads = ["workload", "layout", "ours, ms", "20–80 %", "of the bandwidth bound"]
    heads += ["host, µs", "device, µs", "launches"] * gpu + ["torchvision per map", "difference map"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in wanted:
        cases.setdefault((row.workload, row.dtype, row.layout), {})[row.implementation] = row
    for (workload, dtype, layout), mine in cases.items():
        ours = next((row for row in mine.values() if row.is_subject), None)
        if ours is None:
            continue
        spread = f"{format_time(ours.p20_ms)}–{format_time(ours.p80_ms)}"
        name = f"`{workload}`" + ("" if dtype == "float32" else f", {dtype}")
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
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="files written by python -m benchmarks")
    rows = read_all(parser.parse_args().csv)
    if not any(row.passes == TRAINING for row in rows):
        raise ValueError(f"csv: expected rows of {TRAINING}, found none")
    print(format_readme(rows))


if __name__ == "__main__":
    exit_with_errors(main)
