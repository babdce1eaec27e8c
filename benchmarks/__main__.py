"""``python -m benchmarks``: times ``rakd_ops`` against its peers and writes a table and a CSV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import cases
from benchmarks.cases import Case, Protocol
from benchmarks.compare import compare_files
from benchmarks.measure import TRAINING, WHATS
from benchmarks.session import csv_path, exit_with_errors, run_cases
from benchmarks.workloads import WORKLOADS

_Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]
_Chosen = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]

_DEFAULT_WORKLOADS = {"distill": ("train", "train19", "gt", "large"), "align": ("pool", "pool14")}
_QUICK_WORKLOADS = {"distill": ("train", "gt"), "align": ("pool",)}
_QUICK_REPEATS = 5
_QUICK_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """Time rakd_ops against its peers, interleaved, on the same tensors, after checking that all agree.

    Attributes:
        op: distill (soft_roi_distill) or align (multilevel_roi_align, the detector's pooling).
        workloads: Of distill: train, train19, gt, large, batch8 (default: all, batch8 on CUDA only);
            of align: pool, pool14 (default: both).
        backends: Backends of rakd_ops: cpu, cuda, triton, reference (default: all that run on the device;
            with --quick all but reference).
        dtypes: float32, bfloat16, float16.
        layouts: nchw, nhwc (channels-last).
        peers: Of distill: torchvision, difference (one RoIAlign of the difference map),
            torchvision-compiled, difference-compiled; of align: torchvision; or none
            (default: the eager ones, on CUDA all; with --quick torchvision).
        device: cpu, cuda, or auto.
        threads: Torch's threads on the CPU; 0 leaves torch's own number.
        repeats: Interleaved rounds.
        most_seconds: A contender that has used so much time in one measurement gets fewer repeats, but at
            least 3.
        seed: Seed of boxes and maps.
        out: Folder of the CSV.
        quick: Under a minute: forward + backward only, few repeats, and fewer workloads, backends and peers
            where they are not given explicitly.
        compare: Instead of measuring, compare the ratios of two CSV files, old and new.
    """

    op: str = "distill"
    workloads: _Chosen = ()
    backends: _Chosen = ()
    dtypes: _Names = ("float32",)
    layouts: _Names = ("nchw", "nhwc")
    peers: _Chosen = ()
    device: str = "auto"
    threads: int = 0
    repeats: int = 21
    most_seconds: float = 10.0
    seed: int = 0
    out: Path = Path("runs/benchmarks")
    quick: bool = False
    compare: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="OLD NEW", help_behavior_hint="")] = None


def shorten(options: Options, device: str) -> Options:
    """Apply ``--quick`` to what was not given explicitly."""
    backends = cases.check_backends((), device)
    return replace(
        options,
        workloads=options.workloads or _QUICK_WORKLOADS[options.op],
        backends=options.backends or tuple(name for name in backends if name != "reference") or backends,
        peers=options.peers or ("torchvision",),
        repeats=min(options.repeats, _QUICK_REPEATS),
        most_seconds=min(options.most_seconds, _QUICK_SECONDS),
    )


def plan(options: Options) -> tuple[list[Case], Protocol]:
    """Turn options into cases and a protocol.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    cases.check_choices("op", [options.op], list(WORKLOADS))
    cases.check_layouts_and_dtypes(options.layouts, options.dtypes)
    device = cases.check_device(options.device)
    if options.quick:
        options = shorten(options, device)
    workloads = WORKLOADS[options.op]
    default = tuple(workloads) if device == "cuda" else _DEFAULT_WORKLOADS[options.op]
    names = cases.check_choices("workloads", options.workloads or default, list(workloads))
    threads = cases.check_threads(options.threads)
    protocol = Protocol(
        device=device,
        backends=cases.check_backends(options.backends, device),
        peers=cases.check_peers(options.op, options.peers, device),
        whats=(TRAINING,) if options.quick else WHATS,
        repeats=options.repeats,
        most_seconds=options.most_seconds,
        seed=options.seed,
    )
    planned = [
        Case(options.op, name, workloads[name], dtype, layout, threads)
        for name in names
        for dtype in options.dtypes
        for layout in options.layouts
    ]
    return planned, cases.check_protocol(protocol)


def main() -> None:
    """Measure, or compare."""
    options = tyro.cli(Options, prog="python -m benchmarks")
    if options.compare is not None:
        compare_files(*options.compare)
        return
    planned, protocol = plan(options)
    run_cases(planned, protocol, csv_path(options.out, options.op, protocol.device))


if __name__ == "__main__":
    exit_with_errors(main)
