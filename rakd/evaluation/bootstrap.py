"""Metrics on frames that are drawn with replacement: how much a figure owes to the frames that it was measured on.

Efron and Tibshirani, An Introduction to the Bootstrap (1993). Overlaps are computed once; each draw matches anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rakd.evaluation.depth import DepthErrors, find_depth_errors
from rakd.evaluation.kitti import (
    CLASSES,
    LIMITS,
    MetricResult,
    Overlaps,
    Prepared,
    evaluate_metric,
    prepare,
    read_folders,
)
from rakd.evaluation.overlaps import Indices, Pairs


def draw_frames(frames: int, draws: int, seed: int = 0) -> Indices:
    """Draw as many frames as there are, with replacement.

    Args:
        frames: Their number.
        draws: How often.
        seed: Runs that are compared need the same.

    Returns:
        ``[draws, frames]`` numbers of frames.
    """
    return np.random.default_rng(seed).integers(frames, size=(draws, frames))


@dataclass(frozen=True, eq=False)
class Resampler:
    """A model's detections, to be scored on any frames of a set, each as often as is wanted.

    Attributes:
        prepared: By the name of the overlaps, see `rakd.evaluation.kitti.LIMITS`; pairs by frame.
        depth: Errors of the depth of the objects found.
    """

    prepared: dict[Overlaps, Prepared]
    depth: DepthErrors

    def evaluate(self, draw: Indices) -> dict[Overlaps, dict[str, dict[str, MetricResult]]]:
        """Score the detections on drawn frames.

        Args:
            draw: ``[n]`` numbers of frames. One that is drawn twice counts as two frames.

        Returns:
            ``[overlaps][metric][class]`` of "3d" and "bev", see `rakd.evaluation.kitti.evaluate`.
        """
        found: dict[Overlaps, dict[str, dict[str, MetricResult]]] = {}
        for overlaps, prepared in self.prepared.items():
            drawn = _draw(prepared, draw)
            found[overlaps] = {m: {name: evaluate_metric(drawn, name, m)[m] for name in CLASSES} for m in ("3d", "bev")}
        return found


def make_resampler(gt_dir: Path, pred_dir: Path, frames: Sequence[str], *, progress: bool = False) -> Resampler:
    """Read labels and detections of a set of frames; see `rakd.evaluation.kitti.evaluate`."""
    truths, detections = read_folders(gt_dir, pred_dir, frames=frames, progress=progress)
    prepared = {name: _by_frame(prepare(truths, detections, limits)) for name, limits in LIMITS.items()}
    return Resampler(prepared, find_depth_errors(truths, detections))


def _draw(prepared: Prepared, draw: Indices) -> Prepared:
    """The rows and pairs of drawn frames, numbered anew."""
    truth_rows, truth_frames, truth_shift = _rows(prepared.truth_frames, draw)
    detection_rows, detection_frames, detection_shift = _rows(prepared.detection_frames, draw)

    def pairs(of: Pairs) -> Pairs:
        rows, numbers, _ = _rows(prepared.detection_frames[of.detection], draw)
        overlap = {name: values[rows] for name, values in of.overlap.items()}
        return Pairs(of.truth[rows] + truth_shift[numbers], of.detection[rows] + detection_shift[numbers], overlap)

    return replace(
        prepared,
        truth=prepared.truth.select(truth_rows),
        truth_frames=truth_frames,
        detections=prepared.detections.select(detection_rows),
        detection_frames=detection_frames,
        pairs=pairs(prepared.pairs),
        regions=pairs(prepared.regions),
    )


def _by_frame(prepared: Prepared) -> Prepared:
    """Sort pairs by frame."""

    def pairs(of: Pairs) -> Pairs:
        order = np.argsort(prepared.detection_frames[of.detection], kind="stable")
        overlap = {name: values[order] for name, values in of.overlap.items()}
        return Pairs(of.truth[order], of.detection[order], overlap)

    return replace(prepared, pairs=pairs(prepared.pairs), regions=pairs(prepared.regions))


def _rows(frames: Indices, draw: Indices) -> tuple[Indices, Indices, Indices]:
    """Where the rows of drawn frames are.

    Args:
        frames: ``[N]`` frame of each row, ascending.
        draw: ``[n]`` frames.

    Returns:
        The rows of one drawn frame after the other, ``[M]``; the number of its draw for each, ``[M]``; and for each
        draw, ``[n]``, the difference of a row's new place and its old one.
    """
    first, end = np.searchsorted(frames, draw, side="left"), np.searchsorted(frames, draw, side="right")
    lengths = end - first
    shift = np.cumsum(lengths) - lengths - first
    numbers = np.repeat(np.arange(len(draw)), lengths)
    return np.arange(len(numbers)) - shift[numbers], numbers, shift
