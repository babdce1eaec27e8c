"""Studies whose figures are made by hand; imported by tests."""

import math

from rakd.evaluation.depth import DepthFigures
from rakd.evaluation.kitti import CLASSES
from rakd.study.metrics import MEAN, Metric
from rakd.study.results import ModelFigures, RunResult, StudyResult

LOOSE = Metric("3d", MEAN, MEAN, "loose")


def run(method, seed, ap, *, abs_rel=0.1, recall=0.5, **more):
    """A run with one AP throughout; ``ap`` may also be a dict by class of three levels."""
    by_class = ap if isinstance(ap, dict) else dict.fromkeys(CLASSES, (ap,) * 3)
    precisions = {overlaps: dict.fromkeys(("3d", "bev", "bbox"), by_class) for overlaps in ("official", "loose")}
    depth = {name: DepthFigures(abs_rel, recall, 8) for name in (*CLASSES, "all")}
    return RunResult(method, seed, precisions, depth, **more)


def study_of(*runs, **more):
    return StudyResult(runs, **more)


def example_study():
    """A study of four methods."""
    return study_of(
        run("expert", 0, 30.0, abs_rel=0.04, recall=0.9),
        *(run("none", seed, value) for seed, value in enumerate((10.0, 11.0, 12.0))),
        *(run("rakd", seed, value, abs_rel=0.08) for seed, value in enumerate((12.0, 14.0, 13.0))),
        run("pkd", 0, 10.5, seconds=90.0, losses={"task": 1.5, "distill": math.nan}),
        models=(
            ModelFigures("expert", "resnet50", 44_123_456, 410.25, 38.21, 40.0, 21.5),
            ModelFigures("apprentice", "resnet18", latency_ms=17.0),
        ),
        config={"steps": 100, "levels": [2, 3]},
        versions={"torch": "2.13"},
        seeds=(0, 1, 2),
        data="made by hand",
    )
