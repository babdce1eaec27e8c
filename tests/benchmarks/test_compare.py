"""The comparison looks at ratios alone and warns at a fall of 30 %."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import compare_files, compare_rows
from benchmarks.results import Row, write_rows


@pytest.mark.parametrize(("new", "fell"), [(20.0, False), (10.0, False), (7.1, False), (7.0, True), (1.0, True)])
def test_rule(make_row: Callable[..., Row], new: float, fell: bool) -> None:
    (change,) = compare_rows([make_row(ratio=10.0)], [make_row(ratio=new)])
    assert change.fell is fell


def test_seconds_and_dates_do_not_matter(make_row: Callable[..., Row]) -> None:
    (change,) = compare_rows([make_row()], [make_row(median_ms=9e6, cpu="slow", date="later", commit="other")])
    assert not change.fell


@pytest.mark.parametrize(
    "other",
    [
        {"layout": "nhwc"},
        {"dtype": "float16"},
        {"passes": "forward"},
        {"implementation": "difference"},
        {"boxes": 16},
        {"threads": 1},
        {"ratio_to": "rakd:cuda"},
    ],
)
def test_only_the_same_measurement_is_compared(make_row: Callable[..., Row], other: dict[str, object]) -> None:
    assert compare_rows([make_row()], [make_row(**other)]) == []


def test_the_subject_itself_has_no_ratio(make_row: Callable[..., Row]) -> None:
    rows = [make_row(implementation="rakd:cpu", ratio=1.0)]
    assert compare_rows(rows, rows) == []


def test_files(tmp_path: Path, make_row: Callable[..., Row], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_rows(old, Row, [make_row(ratio=10.0), make_row(ratio=4.0, layout="nhwc")])
    write_rows(new, Row, [make_row(ratio=5.0), make_row(ratio=8.0, layout="nhwc")])
    (fall,) = compare_files(old, new)
    assert "nchw" in fall.label
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1
    assert "fell by 50 %, from 10× to 5.0×" in printed
    write_rows(new, Row, [make_row(threads=64)])
    with pytest.raises(ValueError, match="no measurement in common"):
        compare_files(old, new)


@pytest.mark.parametrize(("flags", "code"), [([], None), (["--strict"], 1)])
def test_exit_code(
    tmp_path: Path,
    make_row: Callable[..., Row],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    code: int | None,
) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_rows(old, Row, [make_row(ratio=10.0)])
    write_rows(new, Row, [make_row(ratio=5.0)])
    monkeypatch.setattr(sys, "argv", ["compare", str(old), str(new), *flags])
    if code is None:
        compare.main()
    else:
        with pytest.raises(SystemExit) as stopped:
            compare.main()
        assert stopped.value.code == code
