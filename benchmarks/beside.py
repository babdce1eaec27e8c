"""``python -m benchmarks.beside KIND [--beside PATH]``: host time or training steps, beside another checkout.

KIND ``host``: a call with few boxes on tiny maps, so that only the code around the kernels costs; with the number of
operations that a call dispatches. KIND ``steps``: forward and backward on the workloads of ``python -m benchmarks``.

PATH is another source tree with its own compiled library. Both trees run in processes of their own that wait for one
another: each round takes samples from both, in alternating order, so that a slow minute slows both. Several pairs of
processes, one after the other, show how far one process differs from the next. The ratio is that of a round, this
tree over the other. Only ``soft_roi_distill`` is called, in the same way in both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from benchmarks.timing import Step, compare, count_dispatched, summarise, wall_sampler
from benchmarks.workloads import DISTILL_WORKLOADS, FORWARD, LAYOUTS, TRAINING, Workload, make_inputs

CALL = "call"  # a forward that is to be differentiated: its time until it returns
CALLS = {"host": 200, "steps": 1}  # of a round in each tree
# The other tree's rakd_ops, but this tree's benchmarks.
_WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import rakd_ops
sys.path[0] = sys.argv[2]
from benchmarks import beside
beside.work(rakd_ops.__file__)
"""


@dataclass(frozen=True)
class BesideCase:
    """One measurement."""

    name: str  # of the workload
    workload: Workload
    layout: str  # of the maps, float32
    boxes_as: str  # "list" of one [K_b, 4] per image, or "rows", one [K, 5]
    passes: str  # "call", "forward" (nothing to differentiate) or "forward+backward"


def host_cases() -> list[BesideCase]:
    """Return calls with 8 boxes in 2 and in 8 images, on maps of 32×48 cells and fewer."""
    return [
        BesideCase(f"tiny{n}", Workload(n, 8 // n, 7, "objects", 4, 128, 192), "nchw", boxes_as, passes)
        for n in (2, 8)
        for boxes_as in ("list", "rows")
        for passes in (CALL, FORWARD, TRAINING)
    ]


def step_cases(workloads: Sequence[str], layouts: Sequence[str]) -> list[BesideCase]:
    """Return training steps of the workloads named."""
    return [
        BesideCase(name, DISTILL_WORKLOADS[name], layout, "list", TRAINING) for name in workloads for layout in layouts
    ]


@dataclass(frozen=True, kw_only=True)
class BesideRow(results.Machine):
    """One case in one tree; ``commit`` and ``dirty`` are that tree's."""

    kind: str  # "host" or "steps"
    tree: str  # "this" or "other"
    workload: str
    batch: int  # images
    boxes: int  # of the whole batch
    layout: str  # of the maps
    boxes_as: str  # as in BesideCase
    passes: str
    processes: int  # of each tree
    rounds: int  # of all of them
    calls: int  # of a round, of which the median is its sample
    median_us: float  # over the rounds
    p20_us: float  # 20th percentile
    p80_us: float  # 80th percentile
    torch_ops: int  # operations of torch that one step dispatches
    own_ops: int  # those of rakd_ops
    ratio: float | None = None  # this tree's time over the other's: median over the rounds; None in the other's rows
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    threads: int  # of torch


def make_step(case: BesideCase) -> Step:
    """Make the step of a case, on tensors of its own."""
    import rakd_ops

    inputs = make_inputs(case.workload, "float32", case.layout, "cpu", seed=0)
    boxes = inputs.boxes if case.boxes_as == "rows" else inputs.box_list()
    size = case.workload.output_size

    def call() -> torch.Tensor:
        return rakd_ops.soft_roi_distill(inputs.apprentice, inputs.expert, boxes, output_size=size)

    steps: dict[str, Step] = {
        CALL: call,
        FORWARD: torch.no_grad()(call),
        TRAINING: lambda: torch.autograd.grad(call(), inputs.apprentice),
    }
    return steps[case.passes]


def work(imported_from: str) -> None:
    """Answer requests, one line of JSON each, until the input ends: a case to prepare, or calls to time."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may come between the answers
    answer: Any = imported_from
    step: Step = lambda: None  # noqa: E731
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            torch.set_num_threads(request["threads"])
            workload = Workload(**request["case"].pop("workload"))
            step = make_step(BesideCase(workload=workload, **request["case"]))
            for _ in range(3):
                step()
            answer = count_dispatched(step)
        else:
            sample = wall_sampler(step)
            answer = [sample() for _ in range(request["calls"])]
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that runs one tree's ``rakd_ops``.

    Raises:
        ValueError: The process ends, or imports ``rakd_ops`` from elsewhere.
    """

    def __init__(self, tree: Path) -> None:
        command = [sys.executable, "-c", _WORKER, str(tree), str(results.ROOT)]
        self.tree = tree
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(command, cwd=results.ROOT, stdin=pipe, stdout=pipe, text=True)
        found = self._read()
        if not Path(found).is_relative_to(tree):
            raise ValueError(f"beside: expected rakd_ops of {tree}, got {found}")

    def _read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"beside: the process of {self.tree} ended; its error stands above")
        return json.loads(line)

    def ask(self, **request: object) -> Any:
        """Send a request and wait for the answer."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Found:
    """Of one case: samples in milliseconds, one a round, and operations of torch and of ours, for each tree."""

    ms: list[list[float]]
    ops: list[list[int]]


def measure(cases: Sequence[BesideCase], trees: Sequence[Path], options: argparse.Namespace) -> list[Found]:
    """Measure cases in one tree or two, in alternating turns, in each process after one round that is not counted."""
    found = [Found([[] for _ in trees], []) for _ in cases]
    turns = list(range(len(trees)))
    bar = results.progress(options.processes * len(cases) * (options.rounds + 1), "round")
    for _ in range(options.processes):
        workers = [Worker(tree) for tree in trees]
        try:
            for case, here in zip(cases, found, strict=True):
                here.ops = [worker.ask(case=asdict(case), threads=options.threads) for worker in workers]
                for number in range(options.rounds + 1):
                    for index in turns if number % 2 else turns[::-1]:
                        sample = float(np.median(workers[index].ask(calls=CALLS[options.kind])))
                        if number > 0:
                            here.ms[index].append(sample)
                    bar.update()
        finally:
            for worker in workers:
                worker.close()
    bar.close()
    return found


def make_rows(
    options: argparse.Namespace, cases: Sequence[BesideCase], found: Sequence[Found], trees: Sequence[Path]
) -> list[BesideRow]:
    """Make the rows of a CSV: of each case one for each tree."""
    machine = asdict(results.describe_machine("cpu"))
    states = [results.git_state(tree) for tree in trees]
    rows = []
    for case, here in zip(cases, found, strict=True):
        timings = [summarise(samples) for samples in here.ms]
        for name, (commit, dirty), timing, ops in zip(("this", "other"), states, timings, here.ops, strict=False):
            ratios: dict[str, Any] = {}
            if name == "this" and len(timings) == 2:
                ratio = compare(*timings)
                ratios = {"ratio": ratio.median, "ratio_p20": ratio.p20, "ratio_p80": ratio.p80}
            row = BesideRow(
                kind=options.kind,
                tree=name,
                workload=case.name,
                batch=case.workload.batch,
                boxes=case.workload.boxes,
                layout=case.layout,
                boxes_as=case.boxes_as,
                passes=case.passes,
                processes=options.processes,
                rounds=timing.repeats,
                calls=CALLS[options.kind],
                median_us=1000 * timing.median,
                p20_us=1000 * timing.p20,
                p80_us=1000 * timing.p80,
                torch_ops=ops[0],
                own_ops=ops[1],
                **ratios,
                threads=options.threads,
                **{**machine, "commit": commit, "dirty": dirty},
            )
            rows.append(row)
    return rows


def format_rows(rows: Sequence[BesideRow]) -> str:
    """Lay out the rows for the terminal."""
    lines = [["case", "tree", "µs", "20-80 %", "ops", "ratio", "20-80 %"]]
    for row in rows:
        case = f"{row.workload} {row.layout} {row.boxes_as} {row.passes}"
        ops = f"{row.torch_ops}+{row.own_ops}"
        line = [case, row.tree, *results.time_cells(row.median_us, row.p20_us, row.p80_us), ops, "", ""]
        if row.ratio is not None:
            line[-2:] = f"{row.ratio:.3f}", f"{row.ratio_p20:.3f}-{row.ratio_p80:.3f}"
        lines.append(line)
    table = results.format_table(lines)
    return f"{table}\nops: dispatched, torch's + ours; ratio: this tree over the other, round by round"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    parser = results.Parser("benchmarks.beside", __doc__)
    parser.add_argument("kind", choices=list(CALLS))
    parser.add_argument("--beside", type=Path, metavar="PATH", help="another source tree with its compiled library")
    parser.add_names("--workloads", list(DISTILL_WORKLOADS), "of steps", ("train", "train19", "gt", "large"))
    parser.add_names("--layouts", list(LAYOUTS), "of steps")
    parser.add_number("--processes", 3, text="pairs of processes")
    parser.add_number("--rounds", 15, text="of each process and case")
    parser.add_number("--threads", None, text="of torch (default: of host 1, of steps torch's own number)")
    options = parser.parse_args(arguments)
    options.threads = options.threads or (1 if options.kind == "host" else torch.get_num_threads())
    if options.beside is not None:
        options.beside = options.beside.resolve()
        if not list((options.beside / "rakd_ops").glob("_cpu*so")):
            hint = "build it there: python setup.py build_ext --inplace"
            raise ValueError(f"beside: expected a source tree with rakd_ops/_cpu*.so, got {options.beside} ({hint})")
    return options


def main() -> None:
    """Measure, print and write."""
    options = parse()
    cases = host_cases() if options.kind == "host" else step_cases(options.workloads, options.layouts)
    trees = [results.ROOT] + ([options.beside] if options.beside else [])
    rows = make_rows(options, cases, measure(cases, trees, options), trees)
    results.report(results.csv_path(options.out, options.kind, "cpu"), BesideRow, rows, format_rows(rows))


if __name__ == "__main__":
    results.exit_with_errors(main)
