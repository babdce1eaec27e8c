"""Measuring end to end on a micro workload: agreement, rows, CSV, figures, options. No time is asserted."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import figures, results, timing
from benchmarks.__main__ import Case, Protocol, measure_case
from benchmarks.implementations import (
    DisagreementError,
    Implementation,
    check_agreement,
    choose_backends,
    make_implementations,
)
from benchmarks.results import Row, describe_machine, read_rows
from benchmarks.timing import count_dispatched, measure_peak_mib, time_interleaved
from benchmarks.workloads import AXES, PASSES, SCALING, TRAINING, Workload, make_inputs
from rakd_ops import available_backends

MICRO = Workload(2, 5, 3, "proposals", channels=4, height=64, width=96)
BACKENDS = tuple(name for name in ("cpu", "reference") if available_backends()[name] is True)


@pytest.fixture(autouse=True)
def _small_and_restored(monkeypatch: pytest.MonkeyPatch) -> object:
    threads = torch.get_num_threads()
    monkeypatch.setattr("benchmarks.timing.CPU_COPY_MIB", 1)
    yield
    torch.set_num_threads(threads)


def _protocol(baselines: tuple[str, ...]) -> Protocol:
    return Protocol("cpu", BACKENDS, baselines, repeats=3)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "baselines"), [("distill", ("torchvision", "difference")), ("align", ("torchvision",))])
def test_a_case_gives_a_row_for_each_implementation_and_kind_of_passes(
    op: str, baselines: tuple[str, ...], dtype: str, layout: str
) -> None:
    case = Case(op, "micro", MICRO, dtype, layout, threads=1)
    rows, failed = measure_case(case, _protocol(baselines), describe_machine("cpu"))
    assert failed == {}
    names = [*(f"rakd:{name}" for name in BACKENDS), *baselines]
    assert [(row.passes, row.implementation) for row in rows] == [(one, name) for one in PASSES for name in names]
    for row in rows:
        assert (row.workload, row.boxes, row.dtype, row.layout, row.threads) == ("micro", 10, dtype, layout, 1)
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.repeats == 3
        assert row.ratio_to == names[0]
        assert row.ratio == 1 if row.is_subject else row.ratio > 0
        bound_ms = 1000 * row.bound_mib * 2**20 / (row.copy_gb_s * 1e9)
        assert row.bound_fraction == pytest.approx(bound_ms / row.median_ms)
        assert row.host_us is row.device_us is row.launches is None


def test_ratios_are_of_rounds_that_both_took(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(samplers: dict[str, object], *_: object) -> dict[str, timing.Timing]:
        samples = dict.fromkeys(samplers, (10.0, 20.0, 40.0, 1.0, 1.0))
        samples["difference"] = (30.0, 60.0, 120.0)  # slow, thus gone after three
        return {name: timing.summarise(taken) for name, taken in samples.items()}

    monkeypatch.setattr(timing, "time_interleaved", rounds)
    monkeypatch.setattr(timing, "measure_copy_bandwidth", lambda *_: 1e10)
    case = Case("distill", "micro", MICRO, "float32", "nchw", threads=1)
    rows, _ = measure_case(case, _protocol(("difference",)), describe_machine("cpu"))
    assert {row.ratio for row in rows if row.implementation == "difference"} == {3.0}
    assert {row.ratio for row in rows if row.implementation != "difference"} == {1.0}


def test_a_baseline_that_cannot_be_compiled_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(function: object) -> object:
        def run(*_: object) -> None:
            raise RuntimeError("no compiler here\nand more")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    case = Case("distill", "micro", MICRO, "float32", "nchw", threads=1)
    path = tmp_path / "micro.csv"
    rows = program.run_cases([case], _protocol(("difference", "difference-compiled")), path)
    assert {row.implementation for row in rows} == {*(f"rakd:{name}" for name in BACKENDS), "difference"}
    told = "micro float32 nchw: no difference-compiled: RuntimeError: no compiler here"
    assert told in capsys.readouterr().out
    assert (tmp_path / "micro.failed.txt").read_text() == f"{told}\n"


def test_a_baseline_is_compiled() -> None:
    protocol = Protocol("cpu", BACKENDS[:1], ("difference-compiled",), (TRAINING,), repeats=3)
    case = Case("distill", "micro", MICRO, "float32", "nchw", threads=1)
    rows, failed = measure_case(case, protocol, describe_machine("cpu"))
    assert len(rows) == 2 - len(failed)  # no working C++ compiler is no fault of this code
    if failed:
        pytest.skip(f"torch.compile does not work here: {failed}")


def test_an_implementation_that_computes_something_else_stops_the_run() -> None:
    inputs = make_inputs(MICRO, "float32", "nchw", "cpu", seed=0)
    (right,) = make_implementations("distill", inputs, MICRO, BACKENDS[:1], ())
    upstream = torch.ones(())
    maps = inputs.apprentice
    check_agreement([right, right], maps, upstream, "float32", lambda _: None)
    wrong = Implementation("wrong", lambda: 1.01 * right.forward())
    with pytest.raises(DisagreementError, match=r"wrong and rakd:\w+ disagree: the output differs by 1.0e-02"):
        check_agreement([right, wrong], maps, upstream, "float32", lambda _: None)
    sly = Implementation("sly", lambda: right.forward() + (maps[2] - maps[2].detach()).sum())
    with pytest.raises(DisagreementError, match="the gradient of map 2 differs"):
        check_agreement([right, sly], maps, upstream, "float32", lambda _: None)
    nothing = Implementation("nothing", lambda: right.forward() * float("nan"))
    with pytest.raises(DisagreementError, match="differs by inf"):
        check_agreement([right, nothing], maps, upstream, "float32", lambda _: None)


def test_runs_are_interleaved_and_slow_ones_leave_early() -> None:
    order: list[str] = []
    timings = time_interleaved(
        {"fast": lambda: order.append("fast") or 1.0, "slow": lambda: order.append("slow") or 1000.0},
        repeats=5,
        max_seconds=2.5,
        advance=lambda _: None,
    )
    assert order == ["fast", "slow"] * 4 + ["fast", "fast"]  # the first round is the warm-up
    assert (timings["fast"].repeats, timings["slow"].repeats) == (5, 3)
    assert timings["slow"].median == 1000.0


def test_peak_memory_counts_what_a_run_allocates() -> None:
    peak = measure_peak_mib(lambda: torch.ones(32, 2**18), cuda=False)
    if peak is None:
        pytest.skip("this system has no resettable high-water mark")
    assert 30 < peak < 40


def test_run_writes_a_csv_from_which_figures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = [Case("distill", "micro", MICRO, "float32", layout, threads=1) for layout in ("nchw", "nhwc")]
    planned += [
        Case(
            "distill",
            "scaling-channels",
            Workload(1, 2, 3, "objects", channels, 64, 96),
            "float32",
            "nchw",
            1,
        )
        for channels in (2, 4)
    ]
    path = tmp_path / "micro.csv"
    rows = program.run_cases(planned, _protocol(("torchvision",)), path)
    assert len(read_rows(path, Row)) == len(rows) == len(planned) * (len(BACKENDS) + 1) * len(PASSES)
    printed = capsys.readouterr().out
    assert "micro: 2 images 64×96, 10 boxes (proposals)" in printed
    assert "forward, must move 0 MiB" in printed

    drawn = figures.draw_all(read_rows(path, Row))
    expected = {
        "distill-float32-time",
        "distill-float32-forward-time",
        "scaling-float32",
        "scaling-float32-forward",
    }
    assert expected <= set(drawn)
    bars = drawn["distill-float32-time"].axes[0]
    assert len(bars.patches) == len(BACKENDS) + 1
    drawn["distill-float32-time"].savefig(tmp_path / "bars.png")
    curves = drawn["scaling-float32"].axes[0]
    assert len(curves.lines) == len(BACKENDS) + 1
    drawn["scaling-float32"].savefig(tmp_path / "curves.png")


def test_default_plan() -> None:
    planned, protocol = program.plan(program.parse(["--device", "cpu"]))
    assert {case.name for case in planned} == {"train", "train19", "gt", "large"}
    assert len(planned) == 8
    assert protocol.backends == BACKENDS
    assert protocol.baselines == ("torchvision", "difference", "torchvision-compiled", "difference-compiled")


def test_given_options_are_kept() -> None:
    words = ["--workloads", "large", "--layouts", "nhwc", "--repeats", "4", "--max-seconds", "3", "--baselines", "none"]
    (case,), protocol = program.plan(program.parse(["--device", "cpu", *words]))
    assert (case.name, case.layout) == ("large", "nhwc")
    assert (protocol.baselines, protocol.repeats, protocol.max_seconds) == ((), 4, 3)


def test_axes_vary_one_thing_of_the_first_backend() -> None:
    words = ["--device", "cpu", "--layouts", "nchw", "--threads", "1", "--axes"]
    planned, protocol = program.plan(program.parse(words))
    assert {case.name for case in planned} == {SCALING + axis for axis in AXES}
    assert (protocol.backends, protocol.baselines, protocol.passes) == (BACKENDS[:1], ("torchvision",), (TRAINING,))
    bins = [case.workload.output_size for case in planned if case.name == "scaling-bins"]
    assert bins == sorted(set(bins)) and 7 in bins
    counts = [case.threads for case in planned if case.name == "scaling-threads"]
    assert counts == program.thread_counts(os.cpu_count() or 1)
    planned, protocol = program.plan(program.parse([*words, "samples", "--backends", *BACKENDS]))
    assert {case.name for case in planned} == {"scaling-samples"}
    assert protocol.backends == BACKENDS
    assert program.thread_counts(1) == [1]
    assert program.thread_counts(2) == [1, 2]
    assert program.thread_counts(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "dance"], "op: invalid choice: 'dance' .*distill"),
        (["--axes", "mood"], "axes: invalid choice: 'mood' .*boxes"),
        (["--axes", "--workloads", "train"], "axes: expected neither workloads nor another op"),
        (["--workloads", "tiny"], "workloads: expected some of train, .*, got 'tiny'"),
        (["--backends", "magic"], "backends: expected some of .*, got 'magic'"),
        (["--dtypes", "int8"], "dtypes: invalid choice: 'int8' .*float32"),
        (["--layouts", "chwn"], "layouts: invalid choice: 'chwn' .*nchw"),
        (
            ["--op", "align", "--baselines", "difference"],
            "baselines: expected some of torchvision, got 'difference'",
        ),
        (["--threads", "-1"], "threads: expected a whole number of at least 0, got -1"),
        (["--repeats", "1"], "repeats: expected a whole number of at least 3, got 1"),
        (["--max-seconds", "0"], "max-seconds: expected a whole number of at least 1, got 0"),
        (["--dance"], "unrecognized arguments: --dance"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        results.exit_with_errors(program.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert re.match(f"error: {message}", line)


def test_a_backend_that_cannot_run_says_why() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda' was asked for, but torch finds no CUDA device"):
            choose_backends([], "cuda")
        with pytest.raises(ValueError, match="backends: 'cuda' cannot run here: "):
            choose_backends(["cuda"], "cpu")
    assert choose_backends(["reference"], "cpu") == ("cpu", ("reference",))


def test_operations_that_a_call_dispatches_are_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    assert count_dispatched(lambda: (x * 2).sum()) == (2, 0)
    inputs = make_inputs(MICRO, "float32", "nchw", "cpu", seed=0)
    (ours,) = make_implementations("distill", inputs, MICRO, BACKENDS[:1], ())
    _, own = count_dispatched(ours.forward)
    assert own >= 1 or BACKENDS[0] == "reference"


def test_readme_table(make_row: Callable[..., Row]) -> None:
    ours = make_row(implementation="rakd:cpu", ratio=1.0, median_ms=100.0, bound_fraction=0.3)
    rows = [
        ours,
        make_row(ratio=19.5),
        make_row(implementation="torchvision-compiled", ratio=18.0),
        make_row(implementation="difference", ratio=9.75),
        make_row(passes="forward", implementation="rakd:cpu", ratio=1.0, median_ms=1.0),
    ]
    head, _, line, *_ = figures.format_readme(rows).splitlines()
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "`train`",
        "channels-first",
        "100",
        "1940–2023",
        "30 %",
        "20× / 18×",
        "9.8×",
    ]
    assert "host" not in head
    later = replace(rows[0], threads=1, median_ms=1000.0, commit="f" * 40)
    lines = figures.format_readme([*rows, later]).splitlines()[2:4]  # another measurement: no ratio is of two runs
    assert [("| 100 |" in each, "20×" in each, "| 1000 |" in each) for each in lines] == [
        (True, True, False),
        (False, False, True),
    ]
    assert "cpu, 1 threads" in lines[1]
    lines = figures.format_readme([*rows, replace(later, threads=rows[0].threads)]).splitlines()
    assert "1000" in lines[2] and "×" not in lines[2]
    gpu = [replace(row, device="NVIDIA H100", host_us=50.0, device_us=140.0, launches=4) for row in rows]
    head, _, line, *_ = figures.format_readme(gpu).splitlines()
    assert "| host, µs | device, µs | launches |" in head and "| 50 | 140 | 4 |" in line
    assert "host µs" in program.format_case(gpu)


def test_the_three_numbers_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On steps that only say which they are; the samplers themselves need a GPU."""
    steps = {"fast": lambda: "fast", "uncaptured": lambda: "uncaptured", "blind": lambda: "blind"}
    device = {"fast": (lambda: 0.14, "graph"), "uncaptured": (lambda: 0.5, "profiler (why)"), "blind": (None, "none")}
    kernels = {"fast": [("a", 90.0), ("b", 50.0)], "uncaptured": [("a", 500.0)], "blind": []}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "host_sampler", lambda step: lambda: 0.05)
    monkeypatch.setattr(timing, "list_kernels", lambda step: kernels[step()])
    monkeypatch.setattr(timing, "device_sampler", lambda step: device[step()])
    columns = program._time_on_gpu(steps, _protocol(()), lambda _: None)  # type: ignore[arg-type]
    assert [columns[name]["launches"] for name in steps] == [2, 1, None]
    assert [columns[name].get("device_us") for name in steps] == [pytest.approx(140), pytest.approx(500), None]
    assert [columns[name]["device_by"] for name in steps] == ["graph", "profiler (why)", "none"]
    assert all(columns[name]["host_us"] == pytest.approx(50) for name in steps)
