"""``python -m benchmarks``: times ``rakd_ops`` beside its baselines and writes a table and a CSV.

Cases are measured one after the other, in interleaved runs on the same tensors, after checking that all implementations
agree. With ``--axes`` they are curves: forward + backward while one size of the workload ``train`` varies.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import results, timing, workloads
from benchmarks.implementations import (
    BASELINES,
    DisagreementError,
    add_options,
    check_agreement,
    check_names,
    choose_backends,
    make_implementations,
    make_upstream,
    run_forward,
    run_training,
)
from benchmarks.timing import Advance, Step, Timing
from benchmarks.workloads import FORWARD, PASSES, TRAINING, Workload


@dataclass(frozen=True)
class Case:
    """One measurement, on the same tensors."""

    op: str  # "distill" or "align"
    name: str  # of the workload
    workload: Workload
    dtype: str  # of the maps
    layout: str  # of the maps
    threads: int  # of torch, on the CPU


@dataclass(frozen=True)
class Protocol:
    """How cases are measured."""

    device: str
    backends: tuple[str, ...]  # of rakd_ops; the ratios refer to the first
    baselines: tuple[str, ...]  # as BASELINES names them
    passes: tuple[str, ...] = PASSES
    repeats: int = 21  # interleaved rounds
    max_seconds: float = 10.0  # what an implementation may use in a measurement before it gets fewer repeats
    seed: int = 0  # of boxes and maps

    @property
    def cuda(self) -> bool:
        """Whether cases run on a GPU."""
        return torch.device(self.device).type == "cuda"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = results.Parser("benchmarks", __doc__)
    parser.add_argument("--op", default="distill", choices=list(workloads.WORKLOADS), help="soft_roi_distill or "
                        "multilevel_roi_align")  # fmt: skip
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="of distill train, train19, gt, large, batch8 "
                        "(default: all, batch8 on CUDA alone); of align pool, pool14")  # fmt: skip
    axes = list(workloads.AXES)
    parser.add_argument("--axes", nargs="*", choices=axes, metavar="NAME", help="curves instead of workloads, of the "
                        f"first backend: {', '.join(axes)}, or all where none is named")  # fmt: skip
    add_options(parser)
    parser.add_names("--dtypes", list(workloads.DTYPES), default=["float32"])
    parser.add_names("--layouts", list(workloads.LAYOUTS), "nhwc is channels-last")
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help="of distill torchvision, difference (one "
                        "RoIAlign of the difference map), torchvision-compiled, difference-compiled; of align "
                        "torchvision; or none (default: all, of axes torchvision)")  # fmt: skip
    least = timing.MIN_REPEATS
    parser.add_number("--repeats", None, least, "interleaved rounds (default: 21, of axes 9)")
    parser.add_number("--max-seconds", None, text="an implementation that has used so much in one measurement gets "
                      f"fewer repeats, at least {least} (default: 10, of axes 2)")  # fmt: skip
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> tuple[list[Case], Protocol]:
    """Turn options into cases and a protocol.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    curves = options.axes is not None
    if curves and (options.workloads or options.op != "distill"):
        raise ValueError("axes: expected neither workloads nor another op beside them")
    device, backends = choose_backends(options.backends, options.device)
    baselines = BASELINES[options.op]
    if options.baselines == ["none"]:
        baselines = ()
    elif options.baselines:
        check_names("baselines", options.baselines, baselines)
        baselines = tuple(options.baselines)
    elif curves:
        baselines = ("torchvision",)
    protocol = Protocol(
        device=device,
        backends=backends[: len(options.backends) or 1] if curves else backends,
        baselines=baselines,
        passes=(TRAINING,) if curves else PASSES,
        repeats=options.repeats or (9 if curves else 21),
        max_seconds=options.max_seconds or (2 if curves else 10),
        seed=options.seed,
    )
    return _plan_curves(options, protocol) if curves else _plan_workloads(options, protocol), protocol


def _plan_workloads(options: argparse.Namespace, protocol: Protocol) -> list[Case]:
    known = workloads.WORKLOADS[options.op]
    names = options.workloads or [name for name in known if protocol.cuda or name != "batch8"]
    check_names("workloads", names, list(known))
    return [
        Case(options.op, name, known[name], dtype, layout, options.threads)
        for name in names
        for dtype in options.dtypes
        for layout in options.layouts
    ]


def thread_counts(cores: int) -> list[int]:
    """List the powers of two up to the cores, and the cores."""
    return sorted({min(2**power, cores) for power in range(cores.bit_length() + 1)})


def _plan_curves(options: argparse.Namespace, protocol: Protocol) -> list[Case]:
    varied = thread_counts(os.cpu_count() or 1)
    return [
        Case("distill", workloads.SCALING + axis, workload, dtype, layout, threads)
        for axis in options.axes or workloads.AXES
        if not (protocol.cuda and axis == "threads")
        for dtype in options.dtypes
        for layout in options.layouts
        for workload in workloads.AXES[axis]
        for threads in (varied if axis == "threads" else [options.threads])
    ]


@functools.cache
def _copy_bandwidth(device: str, threads: int) -> float:
    """Copy bandwidth with so many threads, measured once a run."""
    torch.set_num_threads(threads)
    return timing.measure_copy_bandwidth(device)


def _time_on_gpu(steps: dict[str, Step], protocol: Protocol, advance: Advance) -> dict[str, dict[str, object]]:
    """Return host and device time and launches of each step, as the columns of a row."""

    def interleave(samplers: dict[str, timing.Sampler]) -> dict[str, Timing]:
        return timing.time_interleaved(samplers, protocol.repeats, protocol.max_seconds, advance)

    host = interleave({name: timing.host_sampler(step) for name, step in steps.items()})
    torch.cuda.synchronize()
    launches = {name: len(timing.list_kernels(step)) or None for name, step in steps.items()}
    replays = {name: timing.device_sampler(step) for name, step in steps.items()}
    device = interleave({name: sampler for name, (sampler, _) in replays.items() if sampler is not None})
    columns: dict[str, dict[str, object]] = {}
    for name in steps:
        columns[name] = {"device_by": replays[name][1], "launches": launches[name]}
        for prefix, found in (("host", host.get(name)), ("device", device.get(name))):
            if found is None:
                continue
            columns[name][f"{prefix}_us"] = 1000.0 * found.median
            columns[name][f"{prefix}_p20_us"] = 1000.0 * found.p20
            columns[name][f"{prefix}_p80_us"] = 1000.0 * found.p80
    return columns


def measure_case(
    case: Case, protocol: Protocol, machine: results.Machine, advance: Advance = lambda _: None
) -> tuple[list[results.Row], dict[str, str]]:
    """Measure one case: agreement, times, peak memory; ``advance`` is told of finished runs.

    Returns:
        A row for each implementation and each of ``protocol.passes``; and the baselines that torch.compile cannot make,
        each with the reason.

    Raises:
        DisagreementError: The implementations do not compute the same.
    """
    torch.set_num_threads(case.threads)
    bandwidth = _copy_bandwidth(protocol.device, case.threads)
    networks = 2 if case.op == "distill" else 1
    inputs = workloads.make_inputs(case.workload, case.dtype, case.layout, protocol.device, protocol.seed, networks)
    implementations = make_implementations(case.op, inputs, case.workload, protocol.backends, protocol.baselines)
    upstream = make_upstream(case.op, implementations[0], case.dtype)
    try:
        failed = check_agreement(implementations, inputs.apprentice, upstream, case.dtype, advance)
    except DisagreementError as error:
        raise DisagreementError(f"{case.name}, {case.dtype}, {case.layout}: {error}") from None
    implementations = [one for one in implementations if one.name not in failed]
    gc.collect()  # garbage of earlier cases must not be freed during this one's measurements
    bound = workloads.count_bytes(case.op, inputs.boxes, case.workload, case.dtype)
    sizes = asdict(case.workload)
    del sizes["boxes_per_image"]

    rows = []
    for passes in protocol.passes:
        steps: dict[str, Step] = {}
        for one in implementations:
            training = functools.partial(run_training, one, inputs.apprentice, upstream)
            steps[one.name] = functools.partial(run_forward, one) if passes == FORWARD else training
        sampler = timing.end_to_end_sampler if protocol.cuda else timing.wall_sampler
        samplers = {name: sampler(step) for name, step in steps.items()}
        timings = timing.time_interleaved(samplers, protocol.repeats, protocol.max_seconds, advance)
        on_gpu = _time_on_gpu(steps, protocol, advance) if protocol.cuda else {}
        bound_bytes = bound.forward if passes == FORWARD else bound.training
        subject = implementations[0].name
        for name, found in timings.items():
            peak = timing.measure_peak_mib(steps[name], protocol.cuda)
            advance(1)
            columns = on_gpu.get(name, {})
            device_us = columns.get("device_us")
            kernels_ms = device_us / 1000.0 if isinstance(device_us, float) else found.median
            row = results.Row(
                op=case.op,
                workload=case.name,
                boxes=case.workload.boxes,
                **sizes,
                dtype=case.dtype,
                layout=case.layout,
                implementation=name,
                passes=passes,
                **found.columns(),
                repeats=found.repeats,
                peak_extra_mib=peak,
                ratio=timing.compare(found, timings[subject]).median,
                ratio_to=subject,
                bound_mib=bound_bytes / 2**20,
                bound_fraction=1000.0 * bound_bytes / bandwidth / kernels_ms,
                copy_gb_s=bandwidth / 1e9,
                threads=case.threads,
                **asdict(machine),
                **columns,  # type: ignore[arg-type]
            )
            rows.append(row)
    return rows, failed


def format_heading(machine: results.Machine, protocol: Protocol) -> str:
    """Describe machine, versions and protocol in a few lines."""
    commit = f"{machine.commit[:10]}{' + local changes' if machine.dirty else ''}" if machine.commit else "no checkout"
    return (
        f"device {machine.device}, processor {machine.cpu}\n"
        f"torch {machine.torch}, torchvision {machine.torchvision}, rakd {machine.rakd} ({commit})\n"
        f"{protocol.repeats} interleaved repeats, seed {protocol.seed}\n"
        "ratio: time over that of the first rakd backend in the same round, median; +MiB: rise of peak memory; "
        "bound: share of the time in which a copy would move the bytes that must move\n"
    )


def format_case(rows: Sequence[results.Row]) -> str:
    """Lay out the rows of one case: a line for each implementation, forward apart from forward + backward."""
    first = rows[0]
    gpu = first.device != "cpu"
    text = (
        f"{first.workload}: {first.batch} images {first.height}×{first.width}, {first.boxes} boxes ({first.kind}), "
        f"{first.output_size}×{first.output_size} bins, {first.sampling_ratio}² samples, C {first.channels}, "
        f"{first.dtype} {first.layout}, {first.threads} threads; copy {first.copy_gb_s:.1f} GB/s\n"
    )
    for passes in dict.fromkeys(row.passes for row in rows):
        mine = [row for row in rows if row.passes == passes]
        heading = [f"{passes}, must move {mine[0].bound_mib:.0f} MiB", "ms", "20-80 %", "ratio", "+MiB", "bound"]
        lines = [heading + ["host µs", "device µs", "launches"] * gpu]
        for row in mine:
            cells = [row.implementation, *results.time_cells(row.median_ms, row.p20_ms, row.p80_ms)]
            cells.append("1" if row.is_subject else results.format_ratio(row.ratio))
            cells.append("?" if row.peak_extra_mib is None else f"{row.peak_extra_mib:.0f}")
            cells.append(f"{100 * row.bound_fraction:.0f} %" if row.bound_fraction >= 0.01 else "<1 %")
            if gpu:
                cells += ["?" if n is None else f"{n:.0f}" for n in (row.host_us, row.device_us, row.launches)]
            lines.append(cells)
        text += results.format_table(lines) + "\n"
    return text


def run_cases(cases: Sequence[Case], protocol: Protocol, path: Path) -> list[results.Row]:
    """Measure cases one after the other, with tables as they finish.

    The CSV is rewritten after each, so that an interrupted run keeps its measurements. Baselines that torch.compile
    cannot make here are named beside it, in a file that ends in ``.failed.txt``.

    Raises:
        DisagreementError: Implementations do not compute the same.
    """
    machine = results.describe_machine(protocol.device)
    print(format_heading(machine, protocol), flush=True)
    rows: list[results.Row] = []
    failures = ""
    with results.progress(None, "run") as bar:
        for number, case in enumerate(cases, start=1):
            bar.set_description(f"{number}/{len(cases)} {case.name} {case.dtype} {case.layout}")
            measured, failed = measure_case(case, protocol, machine, bar.update)
            rows += measured
            results.write_rows(path, results.Row, rows)
            bar.write(format_case(measured), file=sys.stdout)
            for name, reason in failed.items():
                text = f"{case.name} {case.dtype} {case.layout}: no {name}: {reason}"
                bar.write(text, file=sys.stdout)
                failures += f"{text}\n"
    if failures:
        with results.atomic_write(path.with_suffix(".failed.txt")) as temporary:
            temporary.write_text(failures)
    print(f"{len(rows)} rows in {path}")
    return rows


def main() -> None:
    """Measure."""
    options = parse()
    cases, protocol = plan(options)
    stem = options.op if options.axes is None else "scaling"
    run_cases(cases, protocol, results.csv_path(options.out, stem, protocol.device))


if __name__ == "__main__":
    results.exit_with_errors(main)
