"""What the terminal shows: a heading, and a table for each case."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import WHATS
from benchmarks.records import Machine, Row

_COLUMNS = ("ms", "20-80 %", "ratio", "+MiB", "floor")


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


def format_heading(machine: Machine, protocol_text: str) -> str:
    """Describe machine, versions and protocol in a few lines."""
    commit = f"{machine.commit[:10]}{' + local changes' if machine.dirty else ''}" if machine.commit else "no checkout"
    return "\n".join(
        [
            f"device {machine.device}, processor {machine.cpu}",
            f"torch {machine.torch}, torchvision {machine.torchvision}, rakd {machine.rakd} ({commit})",
            protocol_text,
            "ratio: time over that of the first rakd backend; +MiB: rise of peak memory; "
            "floor: share of the time in which a copy would move the bytes that must move",
        ]
    )


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return [""] * len(_COLUMNS)
    return [
        format_time(row.median_ms),
        f"{format_time(row.p20_ms)}-{format_time(row.p80_ms)}",
        "1" if row.is_subject else format_ratio(row.ratio),
        "?" if row.peak_extra_mib is None else f"{row.peak_extra_mib:.0f}",
        f"{100 * row.floor_fraction:.0f} %" if row.floor_fraction >= 0.01 else "<1 %",
    ]


def format_case(rows: Sequence[Row]) -> str:
    """Lay out the rows of one case: a line per contender, forward beside forward + backward."""
    first = rows[0]
    whats = [what for what in WHATS if any(row.what == what for row in rows)]
    found = {(row.contender, row.what): row for row in rows}
    contenders = list(dict.fromkeys(row.contender for row in rows))
    lines = [["", *(list(_COLUMNS) * len(whats))]]
    lines += [[name, *(cell for what in whats for cell in _cells(found.get((name, what))))] for name in contenders]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    group = len(_COLUMNS)
    texts = []
    for line in lines:
        padded = [line[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        texts.append("   | ".join(_join_groups(padded, group)))
    group_widths = [len(text) for text in texts[0].split("   | ")]
    titles = [f"{what}".center(width) for what, width in zip(whats, group_widths[1:], strict=True)]
    floors = ", ".join(f"{what} {next(row.floor_mib for row in rows if row.what == what):.0f} MiB" for what in whats)
    head = (
        f"{first.workload}: {first.batch} images {first.height}×{first.width}, "
        f"{first.boxes} boxes ({first.kind}), "
        f"{first.output_size}×{first.output_size} bins, {first.sampling_ratio}² samples, C {first.channels}, "
        f"{first.dtype} {first.layout}, {first.threads} threads"
    )
    moved = f"must move: {floors}; copy {first.copy_gb_s:.1f} GB/s"
    title_line = "   | ".join([" " * group_widths[0], *titles])
    return "\n".join(line.rstrip() for line in [head, moved, title_line, *texts, ""])


def _join_groups(cells: Sequence[str], group: int) -> list[str]:
    rest = cells[1:]
    return [cells[0], *("  ".join(rest[start : start + group]) for start in range(0, len(rest), group))]
