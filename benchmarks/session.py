"""A run over many cases: progress bar, tables as they finish, CSV rewritten after each case."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from benchmarks.cases import Case, Protocol, measure_case
from benchmarks.records import Row, describe_machine, write_csv
from benchmarks.report import format_case, format_heading


def run_cases(cases: Sequence[Case], protocol: Protocol, path: Path) -> list[Row]:
    """Measure cases one after the other.

    The CSV is rewritten after each, so that an interrupted run keeps what it measured.

    Args:
        cases: What to measure.
        protocol: How.
        path: The CSV.

    Returns:
        All rows.

    Raises:
        DisagreementError: Contenders do not compute the same.
    """
    machine = describe_machine(protocol.device)
    plan = f"{protocol.repeats} interleaved repeats, seed {protocol.seed}"
    print(format_heading(machine, plan) + "\n", flush=True)
    rows: list[Row] = []
    total = len(cases) * protocol.runs_per_case
    with tqdm(total=total, unit="run", file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
        for case in cases:
            bar.set_description(f"{case.name} {case.dtype} {case.layout}")
            measured = measure_case(case, protocol, machine, bar.update)
            rows += measured
            write_csv(path, rows)
            bar.write(format_case(measured), file=sys.stdout)
    print(f"{len(rows)} rows in {path}")
    return rows


def csv_path(out: Path, stem: str, device: str) -> Path:
    """Name a run's CSV after what was measured, where and when."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return out / f"{stem}-{device}-{now}.csv"


def exit_with_errors(main: Callable[[], None]) -> None:
    """Run a program; a user's error becomes one line and exit code 2."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished cases are in the CSV", file=sys.stderr)
        sys.exit(130)
