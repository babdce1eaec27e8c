"""One case: a workload in one dtype, layout and thread count; measuring it gives its rows."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.contenders import PEERS, make_contenders
from benchmarks.floor import COUNT_BYTES, measure_copy_bandwidth
from benchmarks.measure import (
    FORWARD,
    LEAST_REPEATS,
    WHATS,
    Advance,
    DisagreementError,
    check_agreement,
    make_upstream,
    measure_peak_mib,
    run_forward,
    run_training,
    time_interleaved,
)
from benchmarks.records import Machine, Row
from benchmarks.workloads import DTYPES, LAYOUTS, Workload, make_inputs
from rakd_ops import available_backends

SERVED_BY = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


@dataclass(frozen=True)
class Case:
    """What is measured together, on the same tensors.

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
        peers: Peers, as ``PEERS`` names them.
        whats: ``"forward"``, ``"forward+backward"`` or both.
        repeats: Interleaved rounds.
        most_seconds: A contender that has used this much in one measurement gets fewer repeats, at least 3.
        seed: Seed of boxes and maps.
    """

    device: str
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    whats: tuple[str, ...] = WHATS
    repeats: int = 21
    most_seconds: float = 10.0
    seed: int = 0

    @property
    def runs_per_case(self) -> int:
        """Runs of all contenders in one case, for progress: agreement, warm-up, repeats, memory."""
        return (len(self.backends) + len(self.peers)) * (1 + len(self.whats) * (self.repeats + 2))


def check_choices(name: str, values: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Return ``values`` if there is at least one and all are among ``choices``.

    Raises:
        ValueError: They are not; the message names the option.
    """
    listed = ", ".join(choices)
    if not values:
        raise ValueError(f"{name}: expected at least one of {listed}")
    for value in values:
        if value not in choices:
            raise ValueError(f"{name}: expected some of {listed}, got {value!r}")
    return tuple(dict.fromkeys(values))


def check_device(device: str) -> str:
    """Resolve ``"auto"``, and refuse a device that is not there."""
    check_choices("device", [device], ["auto", "cpu", "cuda"])
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError("device: 'cuda' was asked for, but torch finds no CUDA device")
    return ("cuda" if there else "cpu") if device == "auto" else device


def check_backends(backends: Sequence[str], device: str) -> tuple[str, ...]:
    """Return the backends asked for, or without any all that run on the device; refuse those that cannot."""
    state = available_backends()
    if not backends:
        return tuple(name for name in SERVED_BY[device] if state[name] is True)
    chosen = check_choices("backends", backends, list(state))
    for name in chosen:
        if state[name] is not True:
            raise ValueError(f"backends: {name!r} cannot run here: {state[name]}")
        if name not in SERVED_BY[device]:
            raise ValueError(f"backends: {name!r} takes no tensors on the device {device!r}")
    return chosen


def check_peers(op: str, peers: Sequence[str], device: str) -> tuple[str, ...]:
    """Return the peers asked for (none for ``none``); by default the eager ones, on CUDA all."""
    if tuple(peers) == ("none",):
        return ()
    if peers:
        return check_choices("peers", peers, PEERS[op])
    return tuple(name for name in PEERS[op] if device == "cuda" or not name.endswith("-compiled"))


def check_protocol(protocol: Protocol) -> Protocol:
    """Return the protocol if its numbers make sense."""
    if protocol.repeats < LEAST_REPEATS:
        raise ValueError(f"repeats: expected at least {LEAST_REPEATS}, got {protocol.repeats}")
    if protocol.most_seconds <= 0:
        raise ValueError(f"most_seconds: expected a positive number, got {protocol.most_seconds}")
    return protocol


def check_threads(threads: int) -> int:
    """Return the number of threads, torch's own for 0."""
    if threads < 0:
        raise ValueError(f"threads: expected a positive number, or 0 for torch's own, got {threads}")
    return threads or torch.get_num_threads()


def check_layouts_and_dtypes(layouts: Sequence[str], dtypes: Sequence[str]) -> None:
    """Refuse unknown layouts and dtypes."""
    check_choices("layouts", layouts, list(LAYOUTS))
    check_choices("dtypes", dtypes, list(DTYPES))


@functools.cache
def _copy_bandwidth(device: str, threads: int) -> float:
    """Copy bandwidth with so many threads, measured once a run."""
    torch.set_num_threads(threads)
    return measure_copy_bandwidth(device)


def measure_case(case: Case, protocol: Protocol, machine: Machine, advance: Advance) -> list[Row]:
    """Measure one case: agreement, times, peak memory.

    Args:
        case: What to measure.
        protocol: How.
        machine: Where; copied into the rows.
        advance: Told of finished runs, ``protocol.runs_per_case`` in all.

    Returns:
        A row for each contender and ``protocol.whats``.

    Raises:
        DisagreementError: The contenders do not compute the same.
    """
    torch.set_num_threads(case.threads)
    bandwidth = _copy_bandwidth(protocol.device, case.threads)
    cuda = torch.device(protocol.device).type == "cuda"
    networks = 2 if case.op == "distill" else 1
    inputs = make_inputs(case.workload, case.dtype, case.layout, protocol.device, protocol.seed, networks)
    contenders = make_contenders(case.op, inputs, case.workload, protocol.backends, protocol.peers)
    upstream = make_upstream(case.op, contenders[0], case.dtype)
    try:
        check_agreement(contenders, inputs.apprentice, upstream, case.dtype, advance)
    except DisagreementError as error:
        raise DisagreementError(f"{case.name}, {case.dtype}, {case.layout}: {error}") from None
    gc.collect()  # what earlier cases left must not be freed during this one's measurements
    floor = COUNT_BYTES[case.op](inputs.boxes, case.workload, case.dtype)

    rows = []
    for what in protocol.whats:
        runs: dict[str, Callable[[], object]] = {}
        for contender in contenders:
            if what == FORWARD:
                runs[contender.name] = functools.partial(run_forward, contender)
            else:
                runs[contender.name] = functools.partial(run_training, contender, inputs.apprentice, upstream)
        timings = time_interleaved(runs, cuda, protocol.repeats, protocol.most_seconds, advance)
        floor_bytes = floor.forward if what == FORWARD else floor.training
        floor_ms = 1000.0 * floor_bytes / bandwidth
        subject = contenders[0].name
        for name, timing in timings.items():
            peak = measure_peak_mib(runs[name], cuda)
            advance(1)
            rows.append(
                Row(
                    op=case.op,
                    workload=case.name,
                    kind=case.workload.kind,
                    batch=case.workload.batch,
                    boxes=case.workload.boxes,
                    output_size=case.workload.output_size,
                    sampling_ratio=case.workload.sampling_ratio,
                    channels=case.workload.channels,
                    height=case.workload.height,
                    width=case.workload.width,
                    dtype=case.dtype,
                    layout=case.layout,
                    contender=name,
                    what=what,
                    median_ms=timing.median,
                    p20_ms=timing.p20,
                    p80_ms=timing.p80,
                    repeats=timing.repeats,
                    peak_extra_mib=peak,
                    ratio=timing.median / timings[subject].median,
                    ratio_to=subject,
                    floor_mib=floor_bytes / 2**20,
                    floor_fraction=floor_ms / timing.median,
                    copy_gb_s=bandwidth / 1e9,
                    threads=case.threads,
                    **asdict(machine),
                )
            )
    return rows
