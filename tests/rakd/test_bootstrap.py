"""Metrics on drawn frames against the evaluation of folders in which those frames stand as often as they were drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rakd.evaluation.bootstrap import draw_frames, make_resampler
from rakd.evaluation.depth import depth_errors
from rakd.evaluation.kitti import CLASSES, evaluate
from rakd.study import evaluation
from rakd.study.evaluation import evaluate_run
from rakd.study.metrics import PRIMARY

FRAMES = [f"{i:06d}" for i in range(6)]


def row(name: str, x1: float, z: float, low: float = 160.0, more: str = "") -> str:
    return f"{name} 0 0 0.5 {x1} 100 {x1 + 60} {low} 1.5 1.6 4 {(x1 - 300) * z / 700:.2f} 1.7 {z} 0.6{more}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six frames: found, nearly found, missed, invented, in regions that do not count, and one that is empty."""
    root = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(3)
    for kind in ("gt", "pred"):
        (root / kind).mkdir()
    for i, frame in enumerate(FRAMES):
        labels, found = [], []
        for k in range(i):
            name = CLASSES[(i + k) % 3]
            x1, z = 60.0 + 70 * k, 12.0 + 3 * k
            labels.append(row(name if (i, k) != (4, 0) else "Van", x1, z))
            if (i + 2 * k) % 4:
                score = rng.integers(1, 6) / 10  # scores come more than once
                found.append(row(name, x1 + 2, z + rng.choice([0.0, 0.1, 0.4, 3.0]), more=f" {score}"))
            if k % 3 == 1:
                found.append(row(name, x1 + 600, z, more=f" {rng.uniform():.3f}"))
        if i == 5:
            labels.append("DontCare -1 -1 -10 650 90 900 200 -1 -1 -1 -1000 -1000 -1000 -10")
        for kind, rows in (("gt", labels), ("pred", found)):
            (root / kind / f"{frame}.txt").write_text("".join(f"{line}\n" for line in rows))
    return root / "gt", root / "pred"


@given(draw=st.lists(st.integers(0, len(FRAMES) - 1), min_size=1, max_size=9))
def test_drawn_frames_are_as_copied_ones(
    folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, draw: list[int]
) -> None:
    copies = [tmp_path_factory.mktemp(name) for name in ("gt", "pred")]
    for folder, copied in zip(folders, copies, strict=True):
        for place, frame in enumerate(draw):
            shutil.copy(folder / f"{FRAMES[frame]}.txt", copied / f"{place:06d}.txt")
    resampler = make_resampler(*folders, FRAMES)
    found = resampler.evaluate(np.array(draw))
    for overlaps in ("official", "loose"):
        expected = evaluate(*copies, overlaps=overlaps, progress=False)
        for metric in ("3d", "bev"):
            for name in CLASSES:
                ours = found[overlaps][metric][name]
                assert ours["objects"] == expected[name][metric]["objects"]
                np.testing.assert_array_equal(ours["R40"], expected[name][metric]["R40"])
    depth = resampler.depth.figures(np.bincount(draw, minlength=len(FRAMES)))
    theirs = depth_errors(*copies, progress=False)
    for name, figures in theirs.items():
        assert depth[name].objects == figures.objects
        np.testing.assert_allclose(
            (depth[name].abs_rel, depth[name].recall), (figures.abs_rel, figures.recall), rtol=1e-12
        )


def test_draws_are_the_same_for_all_runs_and_as_many_frames_as_there_are() -> None:
    draws = draw_frames(40, 500)
    assert draws.shape == (500, 40) and draws.min() == 0 and draws.max() == 39
    assert np.array_equal(draws, draw_frames(40, 500)) and not np.array_equal(draws, draw_frames(40, 500, seed=1))
    # A frame is left out of a draw with probability (1 - 1/40)^40 = 0.363.
    left_out = np.mean([len(set(draw)) for draw in draws.tolist()]) / 40
    assert 1 - left_out == pytest.approx((1 - 1 / 40) ** 40, abs=0.01)


def test_a_run_has_its_primary_metrics_on_drawn_frames(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = evaluate_run("rakd", 3, *folders, FRAMES, draws=7)
    assert set(run.drawn) == {metric.key for metric in PRIMARY}
    assert {len(values) for values in run.drawn.values()} == {7}
    resampler, draws = make_resampler(*folders, FRAMES), draw_frames(len(FRAMES), 7)
    for kind in ("3d", "bev"):
        car = [resampler.evaluate(draw)["loose"][kind]["Car"]["R40"][1] for draw in draws]
        np.testing.assert_allclose(run.drawn[f"{kind} Car moderate loose"], car, atol=5e-5)
        assert len(set(car)) > 1
    recall = [resampler.depth.figures(np.bincount(draw, minlength=6))["all"].recall for draw in draws]
    np.testing.assert_allclose(run.drawn["recall all"], np.multiply(recall, 100), atol=5e-5)
    assert evaluate_run("rakd", 3, *folders, FRAMES)[0].drawn == {}
    monkeypatch.setattr(evaluation, "MAX_FRAMES", len(FRAMES) - 1)
    assert evaluate_run("rakd", 3, *folders, FRAMES, draws=7)[0].drawn == {}
