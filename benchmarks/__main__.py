"""``python -m benchmarks``: times ``rakd_ops`` beside its baselines and writes a table and a CSV."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import options as checks
from benchmarks.ops import Case, Protocol, run_cases
from benchmarks.results import csv_path, exit_with_errors
from benchmarks.workloads import WORKLOADS

_DEFAULT_WORKLOADS = {"distill": ("train", "train19", "gt", "large"), "align": ("pool", "pool14")}
_QUICK_WORKLOADS = {"distill": ("train", "gt"), "align": ("pool",)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time rakd_ops beside its baselines, interleaved, on the same tensors, after checking that all "
        "agree. On a GPU: host time, device time and end to end, and the number of launches.",
    )
    parser.add_argument("--op", default="distill", help="distill (soft_roi_distill) or align (multilevel_roi_align)")
    checks.add_names(parser, "workloads", "of distill train, train19, gt, large, batch8 (default: all, batch8 on CUDA "
                     "alone); of align pool, pool14")  # fmt: skip
    checks.add_common(parser, repeats=21, max_seconds=10.0)
    parser.add_argument("--quick", action="store_true", help="about a minute: forward + backward alone, few repeats, "
                        "and fewer workloads, backends and baselines where none are named")  # fmt: skip
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> tuple[list[Case], Protocol]:
    """Turn options into cases and a protocol.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    op: str = checks.check_choices("op", [options.op], list(WORKLOADS))[0]
    protocol = checks.make_protocol(options, op, quick=options.quick)
    workloads = WORKLOADS[op]
    default = tuple(workloads) if protocol.cuda else _DEFAULT_WORKLOADS[op]
    if options.quick:
        default = _QUICK_WORKLOADS[op]
    names = checks.check_choices("workloads", options.workloads or default, list(workloads))
    threads = checks.check_threads(options.threads)
    cases = [
        Case(op, name, workloads[name], dtype, layout, threads)
        for name in names
        for dtype in options.dtypes
        for layout in options.layouts
    ]
    return cases, protocol


def main() -> None:
    """Measure."""
    options = parse()
    cases, protocol = plan(options)
    run_cases(cases, protocol, csv_path(options.out, options.op, protocol.device))


if __name__ == "__main__":
    exit_with_errors(main)
