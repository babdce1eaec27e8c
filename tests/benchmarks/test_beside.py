"""Two source trees in alternating processes, on tiny sizes: rows, operations, and errors. No time is asserted."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import beside, results
from benchmarks.beside import BesideRow
from benchmarks.results import ROOT, read_rows
from benchmarks.workloads import Workload
from rakd_ops import available_backends

MICRO = Workload(2, 5, 3, "proposals", channels=4, height=64, width=96)
TINY = ["--processes", "1", "--rounds", "2"]
needs_library = pytest.mark.skipif(available_backends()["cpu"] is not True, reason="the CPU library is not built")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree's rakd_ops with its library, which counts the calls of its public function."""
    tree = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "rakd_ops", tree / "rakd_ops", ignore=shutil.ignore_patterns("_cuda*", "__pycache__"))
    with (tree / "rakd_ops" / "__init__.py").open("a") as stream:
        stream.write("_inner = soft_roi_distill\n")
        stream.write(
            "def soft_roi_distill(*a, **k):\n    import torch\n    torch.ones(1)\n    return _inner(*a, **k)\n"
        )
    return tree


@pytest.fixture(scope="module")
def one_worker_a_tree() -> Iterator[None]:
    """A process takes seconds to start: measurements of this file share one of each tree. It ends well at the end."""
    workers: dict[Path, beside.Worker] = {}
    start, close = beside.Worker, beside.Worker.close

    def kept(tree: Path) -> beside.Worker:
        if tree not in workers:
            workers[tree] = start(tree)
        return workers[tree]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside, "Worker", kept)
        patch.setattr(start, "close", lambda worker: None)
        yield
    for worker in workers.values():
        close(worker)
        assert worker.process.returncode == 0


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[BesideRow]:
    monkeypatch.setattr(sys, "argv", ["beside", *arguments, *TINY, "--out", str(out)])
    beside.main()
    (path,) = out.glob("*.csv")
    return read_rows(path, BesideRow)


@needs_library
@pytest.mark.usefixtures("one_worker_a_tree")
def test_host_time_of_both_trees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: Path) -> None:
    cases = [case for case in beside.host_cases() if case.workload.batch == 2]
    monkeypatch.setattr(beside, "host_cases", lambda: cases)
    rows = run(monkeypatch, tmp_path, "host", "--beside", str(other))
    this, other_rows = rows[::2], rows[1::2]
    assert [(row.boxes_as, row.passes) for row in this] == [(case.boxes_as, case.passes) for case in cases]
    for row, beside_it in zip(this, other_rows, strict=True):
        assert (row.tree, beside_it.tree) == ("this", "other")
        assert (row.batch, row.boxes, row.rounds, row.calls, row.threads) == (2, 8, 2, 200, 1)
        assert row.ratio is not None and beside_it.ratio is None
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.own_ops == beside_it.own_ops >= 1
        assert beside_it.torch_ops == row.torch_ops + 1  # that tree's own torch.ones: it was that tree that ran
        assert beside_it.commit == ""  # no checkout


@needs_library
@pytest.mark.usefixtures("one_worker_a_tree")
def test_training_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: Path) -> None:
    monkeypatch.setitem(beside.DISTILL_WORKLOADS, "gt", MICRO)
    rows = run(monkeypatch, tmp_path, "steps", "--beside", str(other), "--workloads", "gt", "--threads", "1")
    cases = [(row.tree, row.workload, row.layout) for row in rows]
    assert cases == [(tree, "gt", layout) for layout in ("nchw", "nhwc") for tree in ("this", "other")]
    assert {row.passes for row in rows} == {"forward+backward"}
    assert all(row.ratio_p20 <= row.ratio <= row.ratio_p80 for row in rows[::2])  # type: ignore[operator]


@needs_library
@pytest.mark.usefixtures("one_worker_a_tree")
def test_without_another_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(beside.DISTILL_WORKLOADS, "gt", MICRO)
    (row,) = run(monkeypatch, tmp_path, "steps", "--workloads", "gt", "--layouts", "nchw", "--threads", "1")
    assert row.ratio is None and row.tree == "this"
    assert "gt nchw list forward+backward" in capsys.readouterr().out


def test_rounds_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Worker:
        def __init__(self, tree: Path) -> None:
            self.name = tree.name

        def ask(self, **request: object) -> list[float]:
            if "case" in request:
                return [3, 1]
            asked.append(self.name)
            return [float(len(asked))]

        def close(self) -> None:
            asked.append(f"{self.name} closed")

    monkeypatch.setattr(beside, "Worker", Worker)
    options = beside.parse(["host", *TINY])
    (found,) = beside.measure(beside.host_cases()[:1], [Path("a"), Path("b")], options)
    assert asked == ["b", "a", "a", "b", "b", "a", "a closed", "b closed"]  # the first round is the warm-up
    assert found.ms == [[3.0, 6.0], [4.0, 5.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "argument kind: invalid choice: 'dance' .*host"),
        (["host", "--beside", "/nowhere"], r"beside: expected a source tree with rakd_ops/_cpu\*.so, got /nowhere"),
        (["steps", "--workloads", "tiny"], "workloads: invalid choice: 'tiny' .*train19"),
        (["host", "--rounds", "0"], "rounds: expected a whole number of at least 1, got 0"),
    ],
)
def test_user_errors(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["beside", *arguments])
    with pytest.raises(SystemExit) as stopped:
        results.exit_with_errors(beside.main)
    assert stopped.value.code == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
