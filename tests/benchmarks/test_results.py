"""CSV files: a round trip, whole or not at all, and clear words about a bad one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.results import ROOT, Row, describe_machine, git_state, read_rows, write_rows


def test_round_trip(tmp_path: Path, make_row: Callable[..., Row]) -> None:
    rows = [
        make_row(),
        make_row(peak_extra_mib=None, commit="", dirty=False, implementation="rakd:cpu", host_us=12.5, launches=4),
    ]
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, Row, rows)
    assert read_rows(path, Row) == rows
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, make_row: Callable[..., Row]) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, Row, [make_row()])

    def broken() -> object:
        yield make_row(ratio=1.0)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_rows(path, Row, broken())  # type: ignore[arg-type]
    assert read_rows(path, Row) == [make_row()]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def test_bad_files_are_named(tmp_path: Path, make_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"absent\.csv: no such file"):
        read_rows(tmp_path / "absent.csv", Row)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv: not a benchmark CSV, lacks the columns op, workload"):
        read_rows(other, Row)
    broken = tmp_path / "broken.csv"
    write_rows(broken, Row, [make_row()])
    broken.write_text(broken.read_text().replace("1950.5", "fast"))
    with pytest.raises(ValueError, match=r"broken\.csv, line 2: median_ms is 'fast'"):
        read_rows(broken, Row)
    write_rows(broken, Row, [])
    monkeypatch.setattr("sys.argv", ["figures", str(broken)])
    with pytest.raises(ValueError, match=r"no rows in .*broken\.csv"):
        figures.main()


def test_machine_is_described() -> None:
    machine = describe_machine("cpu")
    assert machine.device == "cpu"
    assert machine.cpu
    assert len(machine.date) == len("2026-01-02T03:04:05Z")
    assert machine.commit == "" or len(machine.commit) == 40


def test_without_git_the_commit_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_machine("cpu").commit == ""
    assert git_state(Path()) == ("", False)


@pytest.mark.parametrize(
    "program", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if 'Parser("' in path.read_text())
)
def test_every_program_shows_its_help(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{program}")
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"usage: python -m benchmarks{'' if program == '__main__' else f'.{program}'} " in capsys.readouterr().out
