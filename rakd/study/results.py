"""The figures of a comparison of distillation methods, as plain data that survives a trip through JSON."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from rakd.errors import UserError
from rakd.evaluation.depth import DepthFigures
from rakd.evaluation.kitti import LEVELS
from rakd.files import without_nan, write_text
from rakd.geometry import FloatArray
from rakd.study.settings import ALL_METHODS

METHODS = ("expert", *ALL_METHODS)
"""How a model was trained: the expert on its own, or the apprentice without or with a distillation method."""

Precisions = dict[str, dict[str, dict[str, tuple[float, ...]]]]
"""Average precision (R40, percent) ``[overlaps][metric][class]``, each for easy, moderate and hard."""


@dataclass(frozen=True)
class ModelFigures:
    """Cost of a model. None: not measured.

    Attributes:
        name: "expert" or "apprentice".
        backbone: Such as "resnet50".
        parameters: Their number.
        gflops: Of one image, 10⁹ operations.
        latency_ms: Median time for one image, milliseconds.
        latency_p90_ms: The time that nine of ten images stay under.
        onnx_ms: Median time for one image in ONNX Runtime, milliseconds.
    """

    name: str
    backbone: str
    parameters: int | None = None
    gflops: float | None = None
    latency_ms: float | None = None
    latency_p90_ms: float | None = None
    onnx_ms: float | None = None


@dataclass(frozen=True)
class RunResult:
    """Results of one training run.

    Attributes:
        method: One of `METHODS`.
        seed: Of the run. Runs of different methods with the same seed are compared with each other.
        precisions: See `Precisions`; overlaps are "official" and "loose", metrics "3d", "bev" and "bbox" (2D).
            Missing entries count as not measured. `rakd.study.evaluation.precisions_of` makes it.
        depth: By class and for "all", as `rakd.evaluation.depth.depth_errors` gives it.
        seconds: Training time; None if unknown.
        losses: Last values of the losses, by name.
        drawn: Primary metrics on frames drawn with replacement, by `rakd.study.metrics.Metric.key`; the same draws
            for all runs that were evaluated on the same frames. Empty where nothing was drawn.
        by_size: Depth and recall of objects by size, see `rakd.evaluation.depth.SIZES`; empty where not measured.
        versions: What it was trained with, see `rakd.study.versions.versions`; empty where that was not noted.

    Raises:
        ValueError: The method is not known, or a class does not have three levels.
    """

    method: str
    seed: int
    precisions: Precisions
    depth: dict[str, DepthFigures] = field(default_factory=dict)
    seconds: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    drawn: dict[str, tuple[float, ...]] = field(default_factory=dict)
    by_size: tuple[DepthFigures, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for overlaps, metrics in self.precisions.items():
            for metric, classes in metrics.items():
                for name, values in classes.items():
                    if len(values) != len(LEVELS):
                        where = f"precisions[{overlaps!r}][{metric!r}][{name!r}]"
                        raise ValueError(f"{where} must hold {len(LEVELS)} levels, got {len(values)}")


@dataclass(frozen=True)
class StudyResult:
    """All runs of a comparison, and what they ran on.

    Attributes:
        runs: In any order; at most one for each method and seed.
        models: Costs of "expert" and "apprentice", as far as measured.
        config: Settings of the study; anything that JSON can hold.
        versions: Version of each package and device that mattered, by name.
        seeds: The seeds planned; runs may be missing.
        data: Description of the training and validation frames, in a few words.

    Raises:
        ValueError: There are two runs of one method and seed, or two models of one name.
    """

    runs: tuple[RunResult, ...]
    models: tuple[ModelFigures, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    data: str = ""

    def __post_init__(self) -> None:
        runs = [(run.method, run.seed) for run in self.runs]
        models = [model.name for model in self.models]
        for twice in (run for run in runs if runs.count(run) > 1):
            raise ValueError(f"runs must hold one run a method and seed, got several of {twice[0]}, seed {twice[1]}")
        for name in (name for name in models if models.count(name) > 1):
            raise ValueError(f"models must hold one model a name, got several of {name!r}")

    def model(self, name: str) -> ModelFigures | None:
        """The model of that name, if it is there."""
        return next((model for model in self.models if model.name == name), None)

    def to_json(self) -> str:
        """Text that `from_json` reads; NaN and infinities, which JSON does not know, become null."""
        return json.dumps(without_nan(asdict(self)), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "StudyResult":
        """Read what `to_json` wrote; null in the place of a figure becomes NaN.

        Raises:
            ValueError: The text is not JSON, or does not hold what a study does; says where.
        """
        content = _record(StudyResult, json.loads(text), "study")
        for name, cls in (("runs", _run), ("models", _model)):
            entries = content.get(name, [])
            content[name] = tuple(cls(entry, f"{name}[{i}]") for i, entry in enumerate(entries))
        content["seeds"] = tuple(content.get("seeds", ()))
        return StudyResult(**content)


@dataclass(frozen=True)
class TrainingLog:
    """Losses of a run as they came.

    Attributes:
        method: One of `METHODS`.
        seed: Of the run.
        rows: ``{"step": ..., name of a loss: value, ...}``, steps ascending.

    Raises:
        ValueError: The method is not known, or a row has no step.
    """

    method: str
    seed: int
    rows: Sequence[Mapping[str, float]]

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for i, row in enumerate(self.rows):
            if "step" not in row:
                raise ValueError(f"rows must all have a step, row {i} has {', '.join(row) or 'nothing'}")

    def series(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Steps and finite values of a loss, from the rows that have it."""
        there = [(row["step"], row[name]) for row in self.rows if math.isfinite(row.get(name, math.nan))]
        table = np.array(there, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def write_study(path: Path, study: StudyResult) -> None:
    """Write a study as JSON, atomically."""
    write_text(path, study.to_json())


def read_study(path: Path) -> StudyResult:
    """Read a study that `write_study` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not hold a study; names the file.
    """
    try:
        return StudyResult.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def write_run(path: Path, run: RunResult) -> None:
    """Write one run as JSON, atomically."""
    write_text(path, json.dumps(without_nan(asdict(run)), indent=1, allow_nan=False) + "\n")


def read_run(path: Path) -> RunResult:
    """Read a run that `write_run` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not hold a run; names the file.
    """
    try:
        run: RunResult = _run(json.loads(path.read_text(encoding="utf-8")), "run")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected the result of a run: {error}") from None
    return run


def _record(cls: type, content: Any, where: str) -> dict[str, Any]:
    """A copy of a JSON object, after checking that it has no fields that the class lacks."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(content).__name__}")
    unknown = set(content) - {entry.name for entry in fields(cls)}
    if unknown:
        raise ValueError(f"{where} has the unknown field {min(unknown)!r}")
    return dict(content)


def _construct(cls: Callable[..., Any], content: dict[str, Any], where: str) -> Any:
    try:
        return cls(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _number(value: Any) -> float:
    if not (value is None or isinstance(value, (int, float))):
        raise ValueError(f"expected a number or null, got {value!r}")
    return math.nan if value is None else value


def _model(content: Any, where: str) -> Any:
    return _construct(ModelFigures, _record(ModelFigures, content, where), where)


def _depth(content: Mapping[str, Any]) -> DepthFigures:
    return DepthFigures(_number(content["abs_rel"]), _number(content["recall"]), content["objects"])


def _run(content: Any, where: str) -> Any:
    content = _record(RunResult, content, where)
    content["precisions"] = {
        overlaps: {
            metric: {name: tuple(map(_number, values)) for name, values in classes.items()}
            for metric, classes in metrics.items()
        }
        for overlaps, metrics in content.get("precisions", {}).items()
    }
    content["depth"] = {name: _depth(figures) for name, figures in content.get("depth", {}).items()}
    content["by_size"] = tuple(map(_depth, content.get("by_size", ())))
    content["losses"] = {name: _number(value) for name, value in content.get("losses", {}).items()}
    content["drawn"] = {name: tuple(map(_number, values)) for name, values in content.get("drawn", {}).items()}
    return _construct(RunResult, content, where)
