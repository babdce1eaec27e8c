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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from benchmarks import options as checks
from benchmarks.results import Machine, csv_path, describe_machine, exit_with_errors, git_state, write_rows
from benchmarks.timing import Step, count_dispatched, summarise, wall_sampler
from benchmarks.workloads import DISTILL_WORKLOADS, FORWARD, LAYOUTS, TRAINING, Workload, make_inputs

ROOT = Path(__file__).resolve().parents[1]
CALL = "call"  # a forward that is to be differentiated: its time until it returns
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
    """One measurement.

    Attributes:
        name: The workload's.
        workload: Sizes.
        layout: Of the maps, float32.
        boxes_as: ``"list"`` of one ``[K_b, 4]`` per image, or ``"rows"``, one ``[K, 5]``.
        passes: ``"call"``, ``"forward"`` (nothing to differentiate) or ``"forward+backward"``.
    """

    name: str
    workload: Workload
    layout: str
    boxes_as: str
    passes: str


def host_cases() -> list[BesideCase]:
    """Return calls with 8 boxes in 2 and in 8 images, on maps of 32×48 cells and fewer."""
    sizes = {f"tiny{batch}": Workload(batch, 8 // batch, 7, "objects", 4, 128, 192) for batch in (2, 8)}
    return [
        BesideCase(name, workload, "nchw", boxes_as, passes)
        for name, workload in sizes.items()
        for boxes_as in ("list", "rows")
        for passes in (CALL, FORWARD, TRAINING)
    ]


def step_cases(workloads: Sequence[str], layouts: Sequence[str]) -> list[BesideCase]:
    """Return training steps of the workloads named."""
    return [
        BesideCase(name, DISTILL_WORKLOADS[name], layout, "list", TRAINING) for name in workloads for layout in layouts
    ]


@dataclass(frozen=True, kw_only=True)
class BesideRow(Machine):
    """One case in one tree; ``commit`` and ``dirty`` are that tree's.

    Attributes:
        kind: ``"host"`` or ``"steps"``.
        tree: ``"this"`` or ``"other"``.
        workload: Its name.
        batch: Images.
        boxes: Boxes of the whole batch.
        layout: Of the maps.
        boxes_as: ``"list"`` or ``"rows"``.
        passes: See :class:`BesideCase`.
        processes: Processes of each tree.
        rounds: Rounds of all of them.
        calls: Calls of a round, of which the median is its sample.
        median_us: Median over the rounds, microseconds.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        torch_ops: Operations of torch that one step dispatches.
        own_ops: Those of ``rakd_ops``.
        ratio: Of this tree's time over the other's: median over the rounds; None without another tree, and in its rows.
        ratio_p20: 20th percentile.
        ratio_p80: 80th percentile.
        threads: Torch's threads.
    """

    kind: str
    tree: str
    workload: str
    batch: int
    boxes: int
    layout: str
    boxes_as: str
    passes: str
    processes: int
    rounds: int
    calls: int
    median_us: float
    p20_us: float
    p80_us: float
    torch_ops: int
    own_ops: int
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    threads: int


def make_step(case: BesideCase) -> Step:
    """Make the step of a case, on tensors of its own."""
    import rakd_ops

    inputs = make_inputs(case.workload, "float32", case.layout, "cpu", seed=0)
    boxes = inputs.boxes if case.boxes_as == "rows" else inputs.box_list()
    size = case.workload.output_size

    def call() -> torch.Tensor:
        return rakd_ops.soft_roi_distill(inputs.apprentice, inputs.expert, boxes, output_size=size)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return call()

    def training() -> object:
        return torch.autograd.grad(call(), inputs.apprentice)

    steps: dict[str, Callable[[], object]] = {CALL: call, FORWARD: forward, TRAINING: training}
    return steps[case.passes]


def work(imported_from: str) -> None:
    """Answer requests, one line of JSON each, until the input ends: a case to prepare, or calls to time."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may come between the answers
    step: Step = lambda: None  # noqa: E731
    print(json.dumps({"rakd_ops": imported_from}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "case" in request:
            torch.set_num_threads(request["threads"])
            workload = Workload(**request["case"].pop("workload"))
            step = make_step(BesideCase(workload=workload, **request["case"]))
            for _ in range(3):
                step()
            answer["ops"] = count_dispatched(step)
        else:
            sample = wall_sampler(step)
            answer["ms"] = [sample() for _ in range(request["calls"])]
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that runs one tree's ``rakd_ops``.

    Args:
        tree: The source tree.

    Raises:
        ValueError: The process ends, or imports ``rakd_ops`` from elsewhere.
    """

    def __init__(self, tree: Path) -> None:
        command = [sys.executable, "-c", _WORKER, str(tree), str(ROOT)]
        self.tree = tree
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        found = Path(self._read()["rakd_ops"])
        if not found.is_relative_to(tree):
            raise ValueError(f"beside: expected rakd_ops of {tree}, got {found}")

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"beside: the process of {self.tree} ended; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: object) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class _Found:
    """Samples in milliseconds, one a round, and dispatched operations, of each tree."""

    ms: list[list[float]]
    ops: list[tuple[int, int]]


def measure(
    cases: Sequence[BesideCase],
    trees: Sequence[Path],
    processes: int,
    rounds: int,
    calls: int,
    threads: int,
    advance: Callable[[int], object] = lambda _: None,
) -> list[_Found]:
    """Measure cases in one tree or two, in alternating turns.

    Args:
        cases: In their order.
        trees: This one, and perhaps another.
        processes: Fresh processes of each tree, one after the other.
        rounds: Of each process and case, after one that is not counted.
        calls: Of each round, in each tree.
        threads: Torch's threads.
        advance: Told of each finished round.

    Returns:
        Samples and operations, for each case.
    """
    found = [_Found([[] for _ in trees], [(0, 0)] * len(trees)) for _ in cases]
    for _ in range(processes):
        workers = [Worker(tree) for tree in trees]
        try:
            for case, here in zip(cases, found, strict=True):
                here.ops = [tuple(w.ask(case=asdict(case), threads=threads)["ops"]) for w in workers]
                for number in range(rounds + 1):
                    order = list(range(len(trees)))
                    for index in order if number % 2 else order[::-1]:
                        sample = float(np.median(workers[index].ask(calls=calls)["ms"]))
                        if number > 0:
                            here.ms[index].append(sample)
                    advance(1)
        finally:
            for worker in workers:
                worker.close()
    return found


def make_rows(
    options: argparse.Namespace, cases: Sequence[BesideCase], found: Sequence[_Found], trees: Sequence[Path]
) -> list[BesideRow]:
    """Make the rows of a CSV: of each case one for each tree."""
    machine = describe_machine("cpu")
    states = [git_state(tree) for tree in trees]
    rows = []
    for case, here in zip(cases, found, strict=True):
        for index, (commit, dirty) in enumerate(states):
            timing = summarise(here.ms[index])
            ratios: dict[str, Any] = {}
            if index == 0 and len(trees) == 2:
                ratio = summarise([a / b for a, b in zip(*here.ms, strict=True)])
                ratios = {"ratio": ratio.median, "ratio_p20": ratio.p20, "ratio_p80": ratio.p80}
            row = BesideRow(
                kind=options.kind,
                tree=("this", "other")[index],
                workload=case.name,
                batch=case.workload.batch,
                boxes=case.workload.boxes,
                layout=case.layout,
                boxes_as=case.boxes_as,
                passes=case.passes,
                processes=options.processes,
                rounds=timing.repeats,
                calls=options.calls,
                median_us=1000 * timing.median,
                p20_us=1000 * timing.p20,
                p80_us=1000 * timing.p80,
                torch_ops=here.ops[index][0],
                own_ops=here.ops[index][1],
                **ratios,
                threads=options.threads,
                **{**asdict(machine), "commit": commit, "dirty": dirty},
            )
            rows.append(row)
    return rows


def format_rows(rows: Sequence[BesideRow]) -> str:
    """Lay out the rows for the terminal."""
    lines = [f"{'case':40} {'tree':5} {'µs':>10} {'20-80 %':>19} {'ops':>6}   ratio (20-80 %)"]
    for row in rows:
        label = f"{row.workload} {row.layout} {row.boxes_as} {row.passes}"
        spread = f"{row.p20_us:.1f}-{row.p80_us:.1f}"
        line = f"{label:40} {row.tree:5} {row.median_us:>10.1f} {spread:>19} {f'{row.torch_ops}+{row.own_ops}':>6}"
        if row.ratio is not None:
            line += f"   {row.ratio:.3f} ({row.ratio_p20:.3f}-{row.ratio_p80:.3f})"
        lines.append(line)
    return "\n".join([*lines, "ops: dispatched, torch's + ours; ratio: this tree over the other, round by round"])


_DEFAULTS = {"host": {"rounds": 15, "calls": 200, "threads": 1}, "steps": {"rounds": 15, "calls": 1, "threads": 0}}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", help="host or steps")
    parser.add_argument("--beside", type=Path, metavar="PATH", help="another source tree with its compiled library")
    checks.add_names(parser, "workloads", "of steps: train, train19, gt, large, batch8",
                     ("train", "train19", "gt", "large"))  # fmt: skip
    checks.add_names(parser, "layouts", "of steps: nchw, nhwc (channels-last)", ("nchw", "nhwc"))
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes (default: 3)")
    parser.add_argument("--rounds", type=int, help="rounds of each process and case (default: 15)")
    parser.add_argument("--calls", type=int, help="calls of a round in each tree (default: host 200, steps 1)")
    parser.add_argument("--threads", type=int, help="torch's threads; 0: torch's own number (default: host 1, steps 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the CSV")
    options = parser.parse_args(arguments)
    checks.check_choices("kind", [options.kind], list(_DEFAULTS))
    for name, value in _DEFAULTS[options.kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("processes", "rounds", "calls"):
        checks.check_minimum(name, getattr(options, name), 1)
    checks.check_choices("workloads", options.workloads, list(DISTILL_WORKLOADS))
    checks.check_choices("layouts", options.layouts, list(LAYOUTS))
    options.threads = checks.check_threads(options.threads)
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
    trees = [ROOT] + ([options.beside] if options.beside else [])
    total = options.processes * len(cases) * (options.rounds + 1)
    with tqdm(total=total, unit="round", file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
        found = measure(cases, trees, options.processes, options.rounds, options.calls, options.threads, bar.update)
    rows = make_rows(options, cases, found, trees)
    path = csv_path(options.out, options.kind, "cpu")
    write_rows(path, BesideRow, rows)
    print(format_rows(rows))
    print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    exit_with_errors(main)
