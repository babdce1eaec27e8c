"""Measuring end to end on a micro workload: agreement, rows, CSV, figures, options. No time is asserted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import cases, measure, plot, scaling, session
from benchmarks.cases import Case, Protocol, measure_case
from benchmarks.contenders import Contender, make_contenders
from benchmarks.measure import WHATS, DisagreementError, check_agreement, measure_peak_mib, time_interleaved
from benchmarks.records import describe_machine, read_csv
from benchmarks.workloads import Workload, make_inputs
from rakd_ops import available_backends

MICRO = Workload(2, 5, 3, "proposals", channels=4, height=64, width=96)
BACKENDS = tuple(name for name in ("cpu", "reference") if available_backends()[name] is True)


@pytest.fixture(autouse=True)
def _small_and_restored(monkeypatch: pytest.MonkeyPatch) -> object:
    threads = torch.get_num_threads()
    monkeypatch.setattr("benchmarks.floor.CPU_COPY_MIB", 1)
    yield
    torch.set_num_threads(threads)


def _protocol(peers: tuple[str, ...]) -> Protocol:
    return Protocol("cpu", BACKENDS, peers, repeats=3)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "peers"), [("distill", ("torchvision", "difference")), ("align", ("torchvision",))])
def test_case_gives_a_row_for_each_contender_and_kind_of_run(
    op: str, peers: tuple[str, ...], dtype: str, layout: str
) -> None:
    protocol = _protocol(peers)
    finished: list[int] = []
    case = Case(op, "micro", MICRO, dtype, layout, threads=1)
    rows = measure_case(case, protocol, describe_machine("cpu"), finished.append)
    assert sum(finished) == protocol.runs_per_case
    names = [*(f"rakd:{name}" for name in BACKENDS), *peers]
    assert [(row.what, row.contender) for row in rows] == [(what, name) for what in WHATS for name in names]
    for row in rows:
        assert (row.workload, row.boxes, row.dtype, row.layout, row.threads) == (
            "micro",
            10,
            dtype,
            layout,
            1,
        )
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.repeats == 3
        assert row.ratio_to == names[0]
        subject = next(other for other in rows if other.is_subject and other.what == row.what)
        assert row.ratio == pytest.approx(row.median_ms / subject.median_ms)
        floor_ms = 1000 * row.floor_mib * 2**20 / (row.copy_gb_s * 1e9)
        assert row.floor_fraction == pytest.approx(floor_ms / row.median_ms)


def test_a_contender_that_computes_something_else_stops_the_run() -> None:
    inputs = make_inputs(MICRO, "float32", "nchw", "cpu", seed=0)
    (right,) = make_contenders("distill", inputs, MICRO, BACKENDS[:1], ())
    upstream = torch.ones(())
    maps = inputs.apprentice
    check_agreement([right, right], maps, upstream, "float32", lambda _: None)
    wrong = Contender("wrong", lambda: 1.01 * right.forward())
    with pytest.raises(DisagreementError, match=r"wrong and rakd:\w+ disagree: the output differs by 1.0e-02"):
        check_agreement([right, wrong], maps, upstream, "float32", lambda _: None)
    sly = Contender("sly", lambda: right.forward() + (maps[2] - maps[2].detach()).sum())
    with pytest.raises(DisagreementError, match="the gradient of map 2 differs"):
        check_agreement([right, sly], maps, upstream, "float32", lambda _: None)
    nothing = Contender("nothing", lambda: right.forward() * float("nan"))
    with pytest.raises(DisagreementError, match="differs by inf"):
        check_agreement([right, nothing], maps, upstream, "float32", lambda _: None)


def test_runs_are_interleaved_and_slow_ones_leave_early(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(measure, "_time_once", lambda run, cuda: run())
    timings = time_interleaved(
        {"fast": lambda: order.append("fast") or 1.0, "slow": lambda: order.append("slow") or 1000.0},
        cuda=False,
        repeats=5,
        most_seconds=2.5,
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
    rows = session.run_cases(planned, _protocol(("torchvision",)), path)
    assert len(read_csv(path)) == len(rows) == len(planned) * (len(BACKENDS) + 1) * len(WHATS)
    printed = capsys.readouterr().out
    assert "micro: 2 images 64×96, 10 boxes (proposals)" in printed
    assert "must move: forward 0 MiB" in printed

    figures = plot.draw_all(read_csv(path))
    expected = {
        "distill-float32-time",
        "distill-float32-forward-time",
        "scaling-float32",
        "scaling-float32-forward",
    }
    assert expected <= set(figures)
    out = tmp_path / "figure.png"
    figures["distill-float32-time"].savefig(out)
    figures["scaling-float32"].savefig(out)
    assert out.stat().st_size > 5000


def test_default_plan() -> None:
    planned, protocol = program.plan(program.Options(device="cpu"))
    assert {case.name for case in planned} == {"train", "train19", "gt", "large"}
    assert len(planned) == 8
    assert protocol.backends == BACKENDS
    assert protocol.peers == ("torchvision", "difference")


def test_quick_keeps_what_was_given() -> None:
    planned, protocol = program.plan(program.Options(device="cpu", quick=True, workloads=("large",)))
    assert {case.name for case in planned} == {"large"}
    assert protocol.peers == ("torchvision",)
    assert protocol.repeats <= 5
    assert protocol.whats == ("forward+backward",)
    assert len(protocol.backends) == 1


def test_scaling_plan_varies_one_thing() -> None:
    planned, _ = scaling.plan(scaling.Options(device="cpu", layouts=("nchw",), threads=1))
    assert {case.name for case in planned} == {scaling.PREFIX + axis for axis in scaling.AXES}
    bins = [case.workload.output_size for case in planned if case.name == "scaling-bins"]
    assert bins == sorted(set(bins)) and 7 in bins
    assert scaling.thread_counts(1) == [1]
    assert scaling.thread_counts(2) == [1, 2]
    assert scaling.thread_counts(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "dance"], "op: expected some of distill, align, got 'dance'"),
        (["--workloads", "tiny"], "workloads: expected some of train, .*, got 'tiny'"),
        (["--backends", "magic"], "backends: expected some of .*, got 'magic'"),
        (["--dtypes", "int8"], "dtypes: expected some of .*, got 'int8'"),
        (["--layouts", "chwn"], "layouts: expected some of nchw, nhwc, got 'chwn'"),
        (
            ["--op", "align", "--peers", "difference"],
            "peers: expected some of torchvision, got 'difference'",
        ),
        (["--threads", "-1"], "threads: expected a positive number"),
        (["--repeats", "1"], "repeats: expected at least 3, got 1"),
        (["--most-seconds", "0"], "most_seconds: expected a positive number"),
        (["--compare", "a.csv", "b.csv"], "a.csv: no such file"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        session.exit_with_errors(program.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert re.match(f"error: {message}", line)


def test_a_backend_that_cannot_run_says_why() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda' was asked for, but torch finds no CUDA device"):
            cases.check_device("cuda")
        with pytest.raises(ValueError, match="backends: 'cuda' cannot run here: "):
            cases.check_backends(["cuda"], "cpu")
