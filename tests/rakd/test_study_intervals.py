"""Intervals of paired differences: over seeds, over evaluated frames, and for several comparisons at once."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from study_cases import LOOSE
from study_cases import run as make_run

from rakd.geometry import FloatArray
from rakd.study.evaluation import DRAWS
from rakd.study.metrics import MEAN, difference_interval
from rakd.study.results import RunResult, StudyResult, read_study, write_study
from rakd.study.tables import format_csv, make_tables


def run(method: str, seed: int, ap: float, drawn: Iterable[float] | None = None) -> RunResult:
    """A run with one AP throughout, and values of the loose average on drawn frames."""
    return make_run(method, seed, ap, drawn={} if drawn is None else {LOOSE.key: tuple(drawn)})


def pairs(gains: Iterable[float], draws: FloatArray) -> StudyResult:
    """RAKD ahead of nothing by a gain in each seed, and on drawn frames by these deviations ``[S, B]`` more."""
    runs = []
    for seed, (gain, deviations) in enumerate(zip(gains, draws, strict=True)):
        runs.append(run("none", seed, 7.0, np.full(len(deviations), 7.0)))
        runs.append(run("rakd", seed, 7.0 + gain, 7.0 + gain + deviations))
    return StudyResult(tuple(runs))


def deviations(*values: float) -> FloatArray:
    """Draws as an array."""
    return np.array(values, dtype=float)


def test_one_seed_has_the_normal_interval_over_frames() -> None:
    draws = deviations(-1, 1, 0, 0, 0)  # of variance 0.5
    low, high = difference_interval(pairs([2.0], draws[None]), "rakd", "none", LOOSE)
    assert (low, high) == pytest.approx((2 - 1.959964 * 0.5**0.5, 2 + 1.959964 * 0.5**0.5), abs=1e-5)
    # For five comparisons the quantile of 0.995.
    low, high = difference_interval(pairs([2.0], draws[None]), "rakd", "none", LOOSE, comparisons=5)
    assert (low, high) == pytest.approx((2 - 2.575829 * 0.5**0.5, 2 + 2.575829 * 0.5**0.5), abs=1e-5)
    assert difference_interval(pairs([2.0], draws[None]), "none", "rakd", LOOSE, 5) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (11, 2.2281)])
def test_several_seeds_have_students_interval(seeds: int, t: float) -> None:
    gains = np.arange(seeds) * 0.5
    # Two-sided 95 % points of Student's t, from its printed table; the frames change nothing.
    error = gains.std(ddof=1) / math.sqrt(seeds)
    found = difference_interval(pairs(gains, np.zeros((seeds, 4))), "rakd", "none", LOOSE)
    assert found == pytest.approx((gains.mean() - t * error, gains.mean() + t * error), abs=2e-4)  # t has four digits
    # Frames, which are the same for all seeds, add their variance of 0.5.
    draws = np.tile(deviations(-1, 1, 0, 0, 0), (seeds, 1))
    error = math.sqrt(error**2 + 0.5)
    found = difference_interval(pairs(gains, draws), "rakd", "none", LOOSE)
    assert found == pytest.approx((gains.mean() - t * error, gains.mean() + t * error), abs=2e-4)  # t has four digits


def test_no_interval_without_draws_of_every_seed() -> None:
    whole = pairs([1.0, 2.0], np.tile(deviations(-1, 1), (2, 1)))
    assert all(map(math.isfinite, difference_interval(whole, "rakd", "none", LOOSE)))
    # A seed without draws, draws of another number, equal runs, and draws that leave no figure.
    for study in (
        StudyResult((*whole.runs, run("none", 2, 7.0), run("rakd", 2, 8.0))),
        StudyResult((*whole.runs, run("none", 2, 7.0, (7.0,)), run("rakd", 2, 8.0, (8.0,)))),
        StudyResult((run("none", 0, 0.0, (0.0, 0.0)), run("rakd", 0, 0.0, (0.0, 0.0)))),
        StudyResult((run("none", 0, 1.0, (1.0, math.nan)), run("rakd", 0, 2.0, (math.nan, 1.0)))),
        # Half of the draws have one: the rest may be of another kind.
        pairs([2.0], deviations(-1, math.nan, 1, math.nan)[None]),
    ):
        assert all(map(math.isnan, difference_interval(study, "rakd", "none", LOOSE)))
    # A draw that leaves one run without a figure is left out: -1, 1 and 0 stay.
    holes = pairs([2.0], deviations(-1, math.nan, 1, 0)[None])
    assert difference_interval(holes, "rakd", "none", LOOSE) == pytest.approx((2 - 1.959964, 2 + 1.959964))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int) -> None:
    """Trainings and frames scatter as in a study, with as many draws; by chance 5 % of the intervals miss."""
    rng = np.random.default_rng(seeds)
    frames, trials, inside = 60, 600, 0
    for _ in range(trials):
        own = rng.normal(0.0, 3.0, frames)  # of each frame, the same in all trainings
        trained = rng.normal(0.0, 0.0 if seeds == 1 else 1.0, seeds)
        chosen = rng.integers(frames, size=(DRAWS, frames))
        draws = np.tile(own[chosen].mean(axis=1) - own.mean(), (seeds, 1))
        low, high = difference_interval(pairs(own.mean() + trained, draws), "rakd", "none", LOOSE)
        inside += low <= 0.0 <= high
    # Rather too wide with several seeds; three standard errors of 600 trials are 2.7 %.
    assert 0.95 - 0.03 <= inside / trials <= 1.0


def test_intervals_stand_behind_differences(tmp_path: Path) -> None:
    study = pairs([2.0], deviations(-1, 1, 0, 0, 0)[None])
    (table,) = [table for table in make_tables(study) if table.key == "difference"]
    place = table.heads.index(LOOSE.title)
    assert [row.cells[place].text(row.runs) for row in table.rows] == ["+2.00 [+0.61, +3.39]"]
    write_study(tmp_path / "study.json", study)
    assert read_study(tmp_path / "study.json") == study
    (row,) = [
        r
        for r in csv.DictReader(format_csv(make_tables(study)).splitlines())
        if r["table"] == "difference" and r["overlap"] == "loose" and r["class"] == MEAN
    ]
    assert [row[name] for name in ("mean", "std", "low", "high")] == ["2", "", "0.614096", "3.3859"]
