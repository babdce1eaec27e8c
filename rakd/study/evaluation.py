"""The evaluation of a run's detections: the figures of a study, and the primary ones on drawn frames."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rakd.evaluation.bootstrap import Resampler, draw_frames, make_resampler
from rakd.evaluation.kitti import CLASSES, LEVELS, Result, check_heights, evaluate_prepared
from rakd.progress import bar
from rakd.study.metrics import PRIMARY, values_by_seed
from rakd.study.results import METHODS, Precisions, RunResult, StudyResult

DRAWS = 100
"""Draws of the frames in a study: enough for a variance, whose root then errs by some 7 %."""

MAX_FRAMES = 10_000
"""Frames beyond which none are drawn: it would take the better part of an hour, and so many frames hardly scatter."""


def precisions_of(**results: Result) -> Precisions:
    """Gather what tables need from evaluations: ``precisions_of(official=..., loose=...)``.

    Args:
        results: Of `rakd.evaluation.kitti.evaluate`, for each kind of overlaps.

    Returns:
        R40 in 3D, from above and in the image ("bbox"). A class without objects at a level is NaN: nothing was to be
        found. A class with objects but without detections is 0.
    """
    return {
        overlaps: {
            metric: {name: _counted(result[name][metric]["R40"], result[name][metric]["objects"]) for name in CLASSES}
            for metric in ("3d", "bev", "bbox")
        }
        for overlaps, result in results.items()
    }


def _counted(values: Sequence[float], objects: Sequence[int]) -> tuple[float, ...]:
    """Values of the levels; NaN where there is no object."""
    return tuple(value if count else math.nan for value, count in zip(values, objects, strict=True))


def evaluate_run(
    method: str,
    seed: int,
    truth: Path,
    detections: Path,
    frames: Sequence[str],
    *,
    seconds: float | None = None,
    losses: Mapping[str, float] | None = None,
    draws: int = 0,
    progress: bool = False,
) -> tuple[RunResult, Result]:
    """Evaluate a run's detections.

    Args:
        method: See `rakd.study.results.RunResult`.
        seed: Same.
        truth: Folder of label files.
        detections: Folder of result files.
        frames: Names of the frames to evaluate on.
        seconds: See `rakd.study.results.RunResult`.
        losses: Same.
        draws: Draws of the frames for `rakd.study.results.RunResult.drawn`.
        progress: Show a progress bar.

    Returns:
        The figures, and the evaluation at the official overlaps.
    """
    resampler = make_resampler(truth, detections, frames, progress=progress)
    check_heights(resampler.prepared["official"], detections)
    official = evaluate_prepared(resampler.prepared["official"], progress=progress)
    loose = evaluate_prepared(resampler.prepared["loose"], progress=False)
    precisions = precisions_of(official=official, loose=loose)
    depth, by_size = resampler.depth.figures(), resampler.depth.by_size()
    run = RunResult(method, seed, precisions, depth, seconds, dict(losses or {}), by_size=by_size)
    return replace(run, drawn=_draw(run, resampler, len(frames), draws, progress)), official


def _draw(
    run: RunResult, resampler: Resampler, frames: int, draws: int, progress: bool
) -> dict[str, tuple[float, ...]]:
    """The primary metrics on draws of the frames."""
    if not draws or frames > MAX_FRAMES:
        return {}
    drawn: dict[str, list[float]] = {metric.key: [] for metric in PRIMARY}
    # A run beside this one with a figure wherever there are objects: averages are over these classes and levels.
    other = next(method for method in METHODS if method != run.method)
    for draw in bar(draw_frames(frames, draws), desc="drawing frames", delay=2.0, disable=not progress):
        own: Precisions = {}
        whole: Precisions = {}
        zeros = [0.0] * len(LEVELS)
        for overlaps, results in resampler.evaluate(draw).items():
            own[overlaps], whole[overlaps] = {}, {}
            for metric, classes in results.items():
                own[overlaps][metric] = {name: _counted(of["R40"], of["objects"]) for name, of in classes.items()}
                whole[overlaps][metric] = {name: _counted(zeros, of["objects"]) for name, of in classes.items()}
        depth = resampler.depth.figures(np.bincount(draw, minlength=frames))
        there = StudyResult((replace(run, precisions=own, depth=depth), RunResult(other, run.seed, whole)))
        for primary in PRIMARY:
            values = values_by_seed(there, run.method, primary)
            drawn[primary.key].append(round(values.get(run.seed, math.nan), 4))
    return {key: tuple(values) for key, values in drawn.items()}
