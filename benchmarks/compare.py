"""``python -m benchmarks.compare OLD.csv NEW.csv``: warns where a ratio to a baseline has fallen by 30 %.

Ratios only: both sides of one were timed in the same interleaved runs, so they carry over between machines of a kind
far better than seconds do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Row, exit_with_errors, read_all
from benchmarks.tables import format_ratio

MAX_FALL = 0.3


@dataclass(frozen=True)
class Change:
    """A ratio in two files.

    Attributes:
        label: The measurement.
        old: Its ratio before.
        new: Its ratio now.
    """

    label: str
    old: float
    new: float

    @property
    def fell(self) -> bool:
        """Whether the ratio is down by 30 % or more."""
        return self.new <= (1.0 - MAX_FALL) * self.old


def _key(row: Row) -> tuple[str | int, ...]:
    names = (row.op, row.workload, row.dtype, row.layout, row.passes, row.implementation, row.ratio_to)
    sizes = (row.batch, row.boxes, row.output_size, row.sampling_ratio, row.channels, row.height, row.width)
    return (*names, *sizes, row.threads)


def _label(row: Row) -> str:
    return f"{row.op} {row.workload} {row.dtype} {row.layout} {row.passes}: {row.implementation} over {row.ratio_to}"


def compare_rows(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Pair the ratios of two runs; a measurement that only one of them has is left out."""
    before = {_key(row): row.ratio for row in old if not row.is_subject}
    return [Change(_label(row), before[_key(row)], row.ratio) for row in new if _key(row) in before]


def compare_files(old: Path, new: Path) -> list[Change]:
    """Compare two CSV files and print every ratio, with a warning where it fell by 30 %.

    Args:
        old: The CSV to hold the other to.
        new: The CSV to judge.

    Returns:
        The changes that are falls.

    Raises:
        ValueError: A file cannot be read, or the two have no measurement in common.
    """
    changes = compare_rows(read_all([old]), read_all([new]))
    if not changes:
        raise ValueError(
            f"compare: {old} and {new} have no measurement in common; workload, sizes, dtype, layout, "
            "threads and implementations must match"
        )
    width = max(len(change.label) for change in changes)
    for change in changes:
        print(f"{change.label.ljust(width)}  {format_ratio(change.old):>6} -> {format_ratio(change.new):>6}")
    falls = [change for change in changes if change.fell]
    for change in falls:
        fall = 100 * (1 - change.new / change.old)
        old_text, new_text = format_ratio(change.old), format_ratio(change.new)
        print(f"warning: {change.label} fell by {fall:.0f} %, from {old_text} to {new_text}")
    print(f"{len(changes)} ratios compared, {len(falls)} fell by {100 * MAX_FALL:.0f} % or more")
    return falls


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="the CSV to hold the other to")
    parser.add_argument("new", type=Path, help="the CSV to judge")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 on a warning")
    options = parser.parse_args()
    if compare_files(options.old, options.new) and options.strict:
        raise SystemExit(1)


if __name__ == "__main__":
    exit_with_errors(main)
