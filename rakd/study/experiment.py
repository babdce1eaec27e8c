"""An experiment: a plan of runs (`rakd.study.plan`), each done by a runner (`rakd.study.runner`), and a report.

Each run has a folder of its own in the experiment's folder. Finished work is not done again, so that an
interrupted experiment is continued by starting it again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rakd.checkpoints import config_diff, file_digest
from rakd.data.checks import check_frames
from rakd.data.frames import digest, find_frames
from rakd.detector.base import BaseDetector
from rakd.detector.base_config import BaseConfig
from rakd.detector.configs import DETECTORS
from rakd.detector.files import load_detector
from rakd.detector.latency import Model, benchmark
from rakd.detector.onnx_model import OnnxDetector
from rakd.distill import registry
from rakd.distill.base import Setup
from rakd.distill.methods import make_method
from rakd.distributed import Processes, barrier, broadcast_object
from rakd.errors import UserError
from rakd.files import check_file, write_text
from rakd.study.frames import draw_frames
from rakd.study.jobs import run_side_by_side
from rakd.study.plan import Run, has_begun, make_plan, run_name
from rakd.study.report import write_report
from rakd.study.results import ModelFigures, RunResult, StudyResult, TrainingLog
from rakd.study.runner import Runner, backbone_start
from rakd.study.settings import StudySettings
from rakd.study.versions import joined_versions
from rakd.training.log import losses_of
from rakd.training.model import expert_size
from rakd_ops import multilevel_roi_align


class Experiment:
    """A comparison of distillation methods in a folder.

    Args:
        settings: Of the experiment.
        data: Folder in KITTI's layout, with the lists ``train`` and ``val``.
        out: The experiment's folder.
        processes: Where to compute, see `rakd.distributed.start_processes`.
        expert: File of a trained expert (`rakd.detector.files.save_detector`); None: one is trained for each seed.
        splits: Names of the lists to train on and to evaluate on.
        quiet: Show no progress bars.
        jobs: How many runs are done at a time, see `rakd.study.jobs`.
        init: See `rakd.study.plan.make_plan`.
        extend: See `rakd.study.runner.Runner`.
        cache_bytes: Same.
        onnx: Whether latency is measured in ONNX Runtime too, which needs the extra "export".

    Raises:
        FileNotFoundError: The data or the expert's file are not there.
        ValueError: The folder holds a run with other settings, a file does not hold what it should, or the expert
            is for images of other proportions than the apprentice's.
    """

    def __init__(
        self,
        settings: StudySettings,
        data: Path,
        out: Path,
        processes: Processes,
        *,
        expert: Path | None = None,
        splits: tuple[str, str] = ("train", "val"),
        quiet: bool = False,
        jobs: int = 1,
        init: Path | None = None,
        extend: bool = False,
        cache_bytes: int = 0,
        onnx: bool = False,
    ) -> None:
        if jobs < 1 or (jobs > 1 and processes.count > 1):
            most = " or more" if processes.count == 1 else " for processes that train together"
            raise UserError(f"jobs must be 1{most}, got {jobs}")
        self.settings = settings
        self.data = data
        self.out = out
        self.processes = processes
        self.splits = splits
        self.quiet = quiet or not processes.is_main
        self.jobs = jobs
        self.extend = extend
        self.init = init and init.resolve()
        self.onnx = onnx
        self.plan = make_plan(settings, init, expert)
        self.runner = Runner(
            settings, data, out, processes, splits=splits, quiet=self.quiet, extend=extend, cache_bytes=cache_bytes
        )
        self.logs: list[TrainingLog] = []
        self.started_from: dict[str, str] = {}
        self._check_settings()
        self._train_frames, self._val_frames = (find_frames(data, split) for split in splits)
        if expert is not None:
            check_file(expert, "a detector (expert)")
        for run in self.plan:
            if run.init is not None:
                check_file(run.init, "a detector to start from (init)")
        sizes = [(config.height, config.width) for config in (DETECTORS[settings.apprentice], self._expert_config)]
        self._shared = 0  # frames, as the main process counts them
        if processes.is_main:
            self._shared = check_frames(self._train_frames, self._val_frames, sizes)

    def run(self) -> StudyResult:
        """Train, evaluate and report what is not done yet.

        Returns:
            All figures; in the main process only are they complete.
        """
        self._check_expert()
        self._claim()
        is_open = any(map(self._is_open, self.plan))
        if is_open:
            self._try_models()
        self._train_side_by_side()
        runs: list[RunResult | None] = []
        experts: dict[str, BaseDetector] = {}
        for run in self.plan:
            detector = self.runner.build(run)
            self._note_start("expert" if run.method == "expert" else "apprentice", detector)
            runs.append(self._do(run, detector, experts[run.taught_by] if run.taught_by else None))
            if run.method == "expert":
                experts = {run.name: detector}  # the next one's apprentices follow it
        if not is_open:  # known only now: finished runs of other settings are refused above
            self._say("all runs are finished already: only tables and pictures are made anew")
        done = tuple(run for run in runs if run is not None)
        study = StudyResult(
            runs=done,
            models=self._models() if self.processes.is_main else (),
            config=self._config(),
            versions=joined_versions([run.versions for run in done], self.processes.device),
            seeds=self.settings.seeds,
            data=self._describe_data(),
        )
        if self.processes.is_main:
            write_report(study, self.out, self.logs)
            self._draw_frames()
        barrier(self.processes)
        return study

    def _is_open(self, run: Run) -> bool:
        """Whether there is something to be done for a run, as far as its folder tells."""
        return self.extend or not (self.out / run.name / "result.json").exists()

    def _try_models(self) -> None:
        """Build every model before anything is trained.

        Missing packages or weights, and settings, files or an expert that do not fit each other, raise now.
        """
        runs = {run.method: run for run in reversed(self.plan)}
        expert = self.runner.build(runs.pop("expert"))
        self._note_start("expert", expert)
        for run in runs.values():
            detector = self.runner.build(run)
            self._note_start("apprentice", detector)
            self.runner.make_model(run, detector, expert if run.taught_by else None)

    def _train_side_by_side(self) -> None:
        """With several jobs, do the runs; what follows then finds them finished."""
        tasks = {run.name: (run,) for run in self.plan if self._is_open(run)}
        after = {run.name: run.taught_by for run in self.plan if run.taught_by}
        if self.jobs > 1 and tasks:
            for run in self.plan:
                if run.method == "expert" and run.name not in tasks and run.trained is None:
                    self.runner.train(run, self.runner.build(run), None)  # refuses other settings; no step is left
            run_side_by_side(self._train_alone, tasks, self.jobs, self._say, after)

    def _train_alone(self, slot: int, run: Run) -> None:
        """Do one run in a process of its own."""
        device = self.processes.device
        if device.type == "cuda":
            device = torch.device("cuda", slot % torch.cuda.device_count())
            torch.cuda.set_device(device)
        self.runner.processes = replace(self.processes, device=device)
        self.runner.quiet = self.quiet = True
        expert = None
        if run.taught_by:
            # Not by the expert's trainer: all processes would write its log.
            expert = load_detector(self.out / run.taught_by / "detector.pt").to(device)
        self._do(run, self.runner.build(run), expert)

    def _claim(self) -> None:
        """Refuse a folder whose runs had another expert or other validation frames; trainers check the rest.

        A folder in which no run has begun, such as that of a refused command, is nobody's.
        """
        here = {
            "expert": "each seed's own" if self.plan[0].trained is None else file_digest(self.plan[0].trained),
            "evaluated frames": digest(self._val_frames),
        }
        path = self.out / "basis.json"

        def read() -> Any:
            return json.loads(path.read_text(encoding="utf-8")) if has_begun(self.out) and path.exists() else here

        there = broadcast_object(self.processes, read)
        other = config_diff(there, here)
        if other:
            raise UserError(f"{self.out} holds a run with other settings: {'; '.join(other)}; choose another folder")
        orphan = broadcast_object(self.processes, self._orphan)
        if orphan is not None:
            raise UserError(
                f"{self.out / orphan.name} holds a run taught by an expert that is gone, {orphan.taught_by}, and would "
                f"be compared with another: remove {orphan.name} too, or choose another folder"
            )
        if self.processes.is_main:
            write_text(path, json.dumps(here, indent=1) + "\n")

    def _orphan(self) -> Run | None:
        """A run that has begun, of whose expert's training nothing is left."""
        if self.plan[0].trained is not None:  # its file is looked at
            return None
        for run in self.plan:
            files = [self.out / str(run.taught_by) / name for name in ("checkpoint.pt", "detector.pt")]
            begun = run.taught_by and (self.out / run.name / "checkpoint.pt").exists()
            if begun and not any(file.exists() for file in files):
                return run
        return None

    def _check_settings(self) -> None:
        """Say before anything is trained what would only fail hours later."""
        settings, count = self.settings, self.processes.count
        for method, options in settings.options.items():
            try:
                if "backend" in options:  # one that cannot run here says so
                    maps, boxes = torch.zeros(1, 1, 8, 8, device=self.processes.device), torch.zeros(0, 5)
                    multilevel_roi_align([maps], boxes.to(maps.device), strides=(4,), backend=options["backend"])
                found = sorted(set(options) & set(Setup.__dataclass_fields__))
                if found:
                    raise ValueError(f"{found[0]} is the networks' or the training's: leave it out")
                make_method(method, strides=(4, 8), expert_channels=8, apprentice_channels=8, batch_size=2, **options)
            except (RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"options of {method}: {error}") from None
            idle = set(options) - set(registry.METHODS[method].load().option_names())
            if idle:
                raise UserError(f"options of {method}: {min(idle)} does nothing in {method}: leave it out")
        for name, training in (("expert_training", settings.expert_training), ("training", settings.training)):
            if training.batch_size % count:
                raise UserError(
                    f"{name}: batch_size must be a multiple of the number of processes, {count}, "
                    f"got {training.batch_size}"
                )
        if "semckd" in settings.methods and settings.training.batch_size // count < 2:
            raise UserError(
                f"training: SemCKD compares images of a batch and needs 2 or more in each of the {count} processes, "
                f"got a batch_size of {settings.training.batch_size}: make it larger or leave semckd out"
            )

    @cached_property
    def _expert_config(self) -> BaseConfig:
        file = self.plan[0].trained
        return DETECTORS[self.settings.expert] if file is None else load_detector(file).config

    def _check_expert(self) -> None:
        """Refuse an expert that does not fit; each network sees images of the height that it was trained on."""
        expert = self._expert_config
        expert_size(DETECTORS[self.settings.apprentice], expert)
        for method in self.settings.methods:
            if method != "none" and registry.METHODS[method].load().needs_scores and not expert.has_scores:
                raise UserError(
                    f"methods: {method} needs the expert's class scores on its maps, which two-stage detectors have, "
                    f"got {self.plan[0].trained or self.settings.expert}"
                )

    def _do(self, run: Run, detector: BaseDetector, expert: BaseDetector | None) -> RunResult | None:
        """Train, unless it is trained already, and evaluate."""
        if run.trained is not None:
            return self.runner.evaluate(run, detector)
        rows = self.runner.train(run, detector, expert)
        self.logs.append(TrainingLog(run.method, run.seed, [losses_of(row, "step", "total") for row in rows]))
        return self.runner.evaluate(run, detector, rows)

    def _note_start(self, name: str, detector: BaseDetector) -> None:
        """Note what a backbone started from; networks that started differently cannot be compared."""
        start = backbone_start(detector)
        if name not in self.started_from:
            self._say(f"{name}: {detector.config.backbone.name}, {detector.init_source}")
        elif self.started_from[name] != start:
            raise UserError(
                f"{name}: backbones of all runs must start alike: {self.started_from[name]} before, now "
                f"{detector.init_source}; repeat the command when the weights can be loaded again"
            )
        self.started_from[name] = start

    def _config(self) -> dict[str, Any]:
        config = {**asdict(self.settings), "started_from": self.started_from, "expert_file": None}
        config |= {
            "init": self.init and (self.init.name if self.init.is_dir() else _short(self.init)),
            "extended": sorted(self.runner.extended),
        }
        file = self.plan[0].trained
        if file is not None:
            config |= {"expert": self._expert_config.to_plain(), "expert_training": None, "expert_file": _short(file)}
        return config

    def _describe_data(self) -> str:
        train, val = len(self._train_frames), len(self._val_frames)
        name = self.data.resolve().name
        both = f" ({self._shared} of them in both)" if self._shared else ""
        return (
            f"{name}: {train} frames of {self.splits[0]} to learn from, {val} of {self.splits[1]} to evaluate on{both}"
        )

    def _models(self) -> tuple[ModelFigures, ...]:
        folders = (self.plan[0].name, run_name(self.settings.methods[0], self.settings.seeds[0]))
        detectors = [load_detector(self.out / folder / "detector.pt") for folder in folders]
        models: list[Model] = [*detectors, *self._exported(detectors)]
        costs = benchmark(models, self._val_frames[0], self.processes.device, progress=not self.quiet)
        onnx = [*(cost.median_ms for cost in costs[2:]), None, None][:2]
        return tuple(
            ModelFigures(
                name=name,
                backbone=detector.config.backbone.name,
                parameters=cost.parameters,
                gflops=cost.gflops,
                latency_ms=cost.median_ms,
                latency_p90_ms=cost.p90_ms,
                onnx_ms=milliseconds,
            )
            for name, detector, cost, milliseconds in zip(
                ("expert", "apprentice"), detectors, costs[:2], onnx, strict=True
            )
        )

    def _exported(self, detectors: Sequence[BaseDetector]) -> list[OnnxDetector]:
        """The same in ONNX Runtime; none where they cannot be."""
        if not self.onnx:
            return []
        from rakd.detector.export import exported

        device = self.processes.device
        try:
            with TemporaryDirectory() as folder:
                return [exported(own, Path(folder) / f"{i}.onnx", device) for i, own in enumerate(detectors)]
        except Exception as error:  # a latency is no reason to lose the report of trainings that took hours
            self._say(f"no latency in ONNX Runtime: {error}")
            return []

    def _draw_frames(self) -> None:
        titles = {"expert": "expert", "none": "apprentice alone", "rakd": "apprentice with RAKD"}
        seed = self.settings.seeds[0]
        runs = {run.method: self.out / run.name for run in self.plan if run.seed == seed}
        models = {title: runs[method] / "detections" for method, title in titles.items() if method in runs}
        models = {title: folder for title, folder in models.items() if folder.is_dir()}  # copies may lack them
        if models:
            draw_frames(self.out / "frames.png", self._val_frames, models)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


def _short(file: Path) -> str:
    """A file with its folder's name, which tells the run that it is of."""
    return f"{file.resolve().parent.name}/{file.name}"
