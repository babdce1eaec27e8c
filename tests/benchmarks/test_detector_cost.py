"""The benchmark of detectors' training steps measures, writes and prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import detector_cost
from benchmarks.detector_cost import DetectorRow, format_rows, measure, parse
from benchmarks.results import read_rows


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--detectors", "tiny", "monodetr-tiny", "--batch", "1", "--steps", "1", "--turns", "1", "--threads", "1"]
    rows = measure(parse(words))
    assert [(row.detector, row.family, row.height, row.width) for row in rows] == [
        ("tiny", "two stages", 128, 448),
        ("monodetr-tiny", "MonoDETR", 128, 448),
    ]
    for row in rows:
        assert row.median_ms == row.p20_ms == row.p80_ms > 0 and row.steps == 1
        assert row.images_per_second == pytest.approx(1e3 / row.median_ms)
        # Weights, gradients and AdamW's two moments are the least that a step adds; the gradients and moments here.
        assert row.added_mib > 3 * 4e6 * row.parameters / 2**20
    monkeypatch.setattr(detector_cost, "measure", lambda options: rows)
    monkeypatch.setattr("sys.argv", ["detector_cost", *words, "--out", str(tmp_path / "rows.csv")])
    detector_cost.main()
    for read, row in zip(read_rows(tmp_path / "rows.csv", DetectorRow), rows, strict=True):
        assert (read.detector, read.commit) == (row.detector, row.commit)
        assert read.added_mib == pytest.approx(row.added_mib, rel=1e-4)
    assert format_rows(rows) in capsys.readouterr().out
    with pytest.raises(ValueError, match="turns: expected a whole number of at least 1, got 0"):
        parse(["--turns", "0"])
