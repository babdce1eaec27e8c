"""The ops beside their baselines: one case measured after the other, in interleaved runs on the same tensors."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from benchmarks import timing
from benchmarks.implementations import (
    DisagreementError,
    check_agreement,
    make_implementations,
    make_upstream,
    run_forward,
    run_training,
)
from benchmarks.results import Machine, Row, atomic_write, describe_machine, write_rows
from benchmarks.tables import format_case, format_heading
from benchmarks.timing import Advance, Step, Timing
from benchmarks.workloads import FORWARD, PASSES, Workload, count_bytes, make_inputs


@dataclass(frozen=True)
class Case:
    """One measurement, on the same tensors.

    Attributes:
        op: ``"distill"`` or ``"align"``.
        name: The workload's name.
        workload: Its sizes.
        dtype: Of the maps.
        layout: Of the maps.
        threads: Torch's threads on the CPU.
    """

    op: str
    name: str
    workload: Workload
    dtype: str
    layout: str
    threads: int


@dataclass(frozen=True)
class Protocol:
    """How cases are measured.

    Attributes:
        device: A torch device.
        backends: Backends of ``rakd_ops``; the ratios refer to the first.
        baselines: As ``BASELINES`` names them.
        passes: ``"forward"``, ``"forward+backward"`` or both.
        repeats: Interleaved rounds.
        max_seconds: An implementation that has used this much in one measurement gets fewer repeats, at least 3.
        seed: Seed of boxes and maps.
    """

    device: str
    backends: tuple[str, ...]
    baselines: tuple[str, ...]
    passes: tuple[str, ...] = PASSES
    repeats: int = 21
    max_seconds: float = 10.0
    seed: int = 0

    @property
    def cuda(self) -> bool:
        """Whether cases run on a GPU."""
        return torch.device(self.device).type == "cuda"


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
    case: Case, protocol: Protocol, machine: Machine, advance: Advance = lambda _: None
) -> tuple[list[Row], dict[str, str]]:
    """Measure one case: agreement, times, peak memory.

    Args:
        case: Its sizes.
        protocol: How.
        machine: Where; copied into the rows.
        advance: Told of finished runs.

    Returns:
        A row for each implementation and each of ``protocol.passes``; and the baselines that torch.compile cannot make,
        each with the reason.

    Raises:
        DisagreementError: The implementations do not compute the same.
    """
    torch.set_num_threads(case.threads)
    bandwidth = _copy_bandwidth(protocol.device, case.threads)
    networks = 2 if case.op == "distill" else 1
    inputs = make_inputs(case.workload, case.dtype, case.layout, protocol.device, protocol.seed, networks)
    implementations = make_implementations(case.op, inputs, case.workload, protocol.backends, protocol.baselines)
    upstream = make_upstream(case.op, implementations[0], case.dtype)
    try:
        failed = check_agreement(implementations, inputs.apprentice, upstream, case.dtype, advance)
    except DisagreementError as error:
        raise DisagreementError(f"{case.name}, {case.dtype}, {case.layout}: {error}") from None
    implementations = [one for one in implementations if one.name not in failed]
    gc.collect()  # garbage of earlier cases must not be freed during this one's measurements
    bound = count_bytes(case.op, inputs.boxes, case.workload, case.dtype)
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
            row = Row(
                op=case.op,
                workload=case.name,
                boxes=case.workload.boxes,
                **sizes,
                dtype=case.dtype,
                layout=case.layout,
                implementation=name,
                passes=passes,
                median_ms=found.median,
                p20_ms=found.p20,
                p80_ms=found.p80,
                repeats=found.repeats,
                peak_extra_mib=peak,
                ratio=found.median / timings[subject].median,
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


def run_cases(cases: Sequence[Case], protocol: Protocol, path: Path) -> list[Row]:
    """Measure cases one after the other, with tables as they finish.

    The CSV is rewritten after each, so that an interrupted run keeps its measurements. Baselines that torch.compile
    cannot make here are named beside it, in a file that ends in ``.failed.txt``.

    Args:
        cases: Sizes.
        protocol: How.
        path: The CSV.

    Returns:
        All rows.

    Raises:
        DisagreementError: Implementations do not compute the same.
    """
    machine = describe_machine(protocol.device)
    print(format_heading(machine, f"{protocol.repeats} interleaved repeats, seed {protocol.seed}") + "\n", flush=True)
    rows: list[Row] = []
    failures = ""
    with tqdm(unit="run", file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
        for number, case in enumerate(cases, start=1):
            bar.set_description(f"{number}/{len(cases)} {case.name} {case.dtype} {case.layout}")
            measured, failed = measure_case(case, protocol, machine, bar.update)
            rows += measured
            write_rows(path, Row, rows)
            bar.write(format_case(measured), file=sys.stdout)
            for name, reason in failed.items():
                text = f"{case.name} {case.dtype} {case.layout}: no {name}: {reason}"
                bar.write(text, file=sys.stdout)
                failures += f"{text}\n"
    if failures:
        with atomic_write(path.with_suffix(".failed.txt")) as temporary:
            temporary.write_text(failures)
    print(f"{len(rows)} rows in {path}")
    return rows
