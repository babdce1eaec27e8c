"""Runs a comparison of distillation methods: trains the expert and the apprentices, evaluates them, reports.

Each training has a folder of its own in the run's folder. What is finished there is not done again, so that an
interrupted run is continued by starting it again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rakd.data.augment import Augmentation
from rakd.data.frames import digest, find_frames
from rakd.data.kitti import KittiDataset
from rakd.data.labels import Objects, read_results
from rakd.detector.base import BaseDetector
from rakd.detector.base_config import BaseConfig
from rakd.detector.configs import DETECTORS
from rakd.detector.files import load_detector, save_detector
from rakd.detector.inference import write_detections
from rakd.detector.latency import measure
from rakd.distill import registry
from rakd.distill.methods import make_method
from rakd.distill.model import make_distillation_model
from rakd.errors import MissingFileError, UserError
from rakd.evaluation.depth import depth_errors
from rakd.evaluation.kitti import DIFFICULTIES, evaluate
from rakd.files import write_text
from rakd.study.report import write_report
from rakd.study.results import ModelFigures, RunResult, StudyResult, TrainingLog, precisions_of, read_run, write_run
from rakd.study.settings import StudySettings
from rakd.study.versions import versions
from rakd.training.checkpoints import differences
from rakd.training.log import RESERVED
from rakd.training.processes import Processes, from_main, wait_for_all
from rakd.training.settings import TrainSettings
from rakd.training.trainer import Trainer
from rakd.visualize import Compared, compare_frames

_PICTURED = 2  # frames drawn as the models see them
_SHOWN_SHARE = 0.5  # of a model's highest score in a frame: pictures leave out what scores less


class Study:
    """A comparison in a folder.

    Args:
        settings: What to do.
        data: Folder in KITTI's layout, with the lists ``train`` and ``val``.
        out: The run's folder.
        processes: Where to compute, see `rakd.training.processes.start_processes`.
        expert: File of a trained expert (`rakd.detector.files.save_detector`); None: one is trained.
        splits: Names of the lists to train on and to evaluate on.
        quiet: Show no progress bars.

    Raises:
        FileNotFoundError: The data or the expert's file are not there.
        ValueError: The folder holds a run with other settings, a file does not hold what it should, or the expert
            is for images of another height than the apprentice.
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
    ) -> None:
        self.settings = settings
        self.data = data
        self.out = out
        self.processes = processes
        self.expert_file = expert
        self.splits = splits
        self.quiet = quiet or not processes.main
        self.logs: list[TrainingLog] = []
        self.started_from: dict[str, str] = {}
        self._check_batches()
        self._train_frames, self._val_frames = (find_frames(data, split) for split in splits)
        if expert is not None and not expert.is_file():
            raise MissingFileError(f"expert: {expert} is not there")

    def run(self) -> StudyResult:
        """Train, evaluate and report what is not done yet.

        Returns:
            All figures; in the main process only are they complete.
        """
        settings = self.settings
        expert = self._build_expert()
        self._claim()
        names = ["expert", *(f"{method}-seed{seed}" for seed in settings.seeds for method in settings.methods)]
        if all((self.out / name / "result.json").exists() for name in names):
            self._say("all runs are finished already: only tables and pictures are made anew")
        runs = [self._teach_expert(expert)]
        for seed in settings.seeds:
            for method in settings.methods:
                runs.append(self._apprentice(method, seed, expert))
        models: tuple[ModelFigures, ...] = ()
        if self.processes.main:
            models = self._models(expert)
        study = StudyResult(
            runs=tuple(run for run in runs if run is not None),
            models=models,
            config=self._config(expert),
            versions=versions(self.processes.device),
            seeds=settings.seeds,
            data=self._describe_data(),
        )
        if self.processes.main:
            write_report(study, self.out, self.logs)
            self._picture()
        wait_for_all(self.processes)
        return study

    def _claim(self) -> None:
        """Refuse a folder with what another expert taught or other frames measured; trainers look at the rest."""
        here = {
            "expert": "trained here" if self.expert_file is None else _digest(self.expert_file.read_bytes()),
            "evaluated frames": digest(self._val_frames),
        }
        path = self.out / "basis.json"
        there = from_main(
            self.processes, lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else here
        )
        other = differences(there, here)
        if other:
            raise UserError(f"{self.out} holds a run with other settings: {'; '.join(other)}; choose another folder")
        if self.processes.main:
            write_text(path, json.dumps(here, indent=1) + "\n")

    def _check_batches(self) -> None:
        """Say before anything is trained what would only fail hours later."""
        settings, count = self.settings, self.processes.count
        for name, training in (("expert_training", settings.expert_training), ("training", settings.training)):
            if training.batch_size % count:
                raise UserError(
                    f"{name}: batch_size must be a multiple of the number of processes, {count}, "
                    f"got {training.batch_size}"
                )
        for method in settings.methods:
            if method != "none" and registry.METHODS[method].load().needs_scores:
                raise UserError(f"methods: {method} needs an expert's class scores on its maps, which these have not")
        if "semckd" in settings.methods and settings.training.batch_size // count < 2:
            raise UserError(
                f"training: SemCKD compares images of a batch and needs 2 or more in each of the {count} processes, "
                f"got a batch_size of {settings.training.batch_size}: make it larger or leave semckd out"
            )

    def _build_expert(self) -> BaseDetector:
        """The expert as it is before training, or as its file has it."""
        if self.expert_file is not None:
            expert = load_detector(self.expert_file).to(self.processes.device)
        else:
            expert = DETECTORS[self.settings.expert].build(1000 + self.settings.expert_seed)
        self._note_start("expert", expert)
        # Both get the same images, and a network sees only objects of the sizes that it was trained on.
        wanted = DETECTORS[self.settings.apprentice].height
        if expert.config.height != wanted:
            raise UserError(
                f"expert must be for images {wanted} pixels high as the apprentice is, got one for "
                f"{expert.config.height}"
            )
        return expert

    def _teach_expert(self, expert: BaseDetector) -> RunResult | None:
        seed = self.settings.expert_seed
        if self.expert_file is not None:
            return self._evaluate("expert", seed, expert, "expert", None)
        return self._train("expert", seed, expert, None, self.settings.expert_training)

    def _apprentice(self, method: str, seed: int, expert: BaseDetector) -> RunResult | None:
        apprentice = DETECTORS[self.settings.apprentice].build(2000 + seed)
        self._note_start("apprentice", apprentice)
        return self._train(method, seed, apprentice, expert, self.settings.training)

    def _note_start(self, name: str, detector: BaseDetector) -> None:
        """Note what a backbone started from; apprentices that started differently cannot be compared."""
        start = _start(detector)
        if name not in self.started_from:
            self._say(f"{name}: {detector.config.backbone.name}, {detector.loaded}")
        elif self.started_from[name] != start:
            raise UserError(
                f"backbones of all apprentices must start alike: {self.started_from[name]} before, now "
                f"{detector.loaded}; repeat the command when the weights can be loaded again"
            )
        self.started_from[name] = start

    def _config(self, expert: BaseDetector) -> dict[str, Any]:
        config = {**asdict(self.settings), "started_from": self.started_from, "expert_file": None}
        if self.expert_file is not None:
            config |= {
                "expert": expert.config.to_plain(),
                "expert_training": None,
                "expert_file": self.expert_file.name,
            }
        return config

    def _train(
        self, method: str, seed: int, detector: BaseDetector, expert: BaseDetector | None, training: TrainSettings
    ) -> RunResult | None:
        """Train a detector in its folder, and evaluate it."""
        training = replace(training, seed=seed)
        weight = self.settings.weights.get(method, 0.0)
        term = None
        if expert is not None:
            term = make_method(
                method,
                strides=detector.strides,
                expert_channels=expert.channels,
                apprentice_channels=detector.channels,
                batch_size=training.batch_size // self.processes.count,
                seed=seed,
                canonical_size=detector.canonical_size,
            )
        name = "expert" if expert is None else f"{method}-seed{seed}"
        model = make_distillation_model(detector, expert, term, weight, self.settings.regions)
        config = detector.config
        trainer = Trainer(
            model,
            self._training_frames(config, seed),
            training,
            self.out / name,
            self.processes.device,
            name=name,
            fingerprint={
                "detector": config.to_plain(),
                "method": method,
                "weight": weight,
                "regions": self.settings.regions,
                "started_from": _start(detector),
            },
            image_size=config.image_size,
            quiet=self.quiet,
        )
        rows = trainer.run()
        self.logs.append(TrainingLog(method, seed, [_losses(row, "step", "total") for row in rows]))
        detector.eval()
        return self._evaluate(method, seed, detector, name, rows[-1]["seconds"], _last_losses(rows))

    def _evaluate(
        self,
        method: str,
        seed: int,
        detector: BaseDetector,
        name: str,
        seconds: float | None,
        losses: dict[str, float] | None = None,
    ) -> RunResult | None:
        """Evaluate a detector, unless that is done. All processes detect; the main one has the result."""
        folder = self.out / name
        result = folder / "result.json"
        if from_main(self.processes, result.exists):
            return read_run(result) if self.processes.main else None
        if self.processes.main:
            save_detector(folder / "detector.pt", detector)
        dataset = KittiDataset(self.data, self.splits[1], height=detector.config.height)
        write_detections(
            detector,
            dataset,
            folder / "detections",
            self.processes.device,
            processes=self.processes,
            progress=not self.quiet,
        )
        if not self.processes.main:
            return None
        truth = self.data / "training" / "label_2"
        frames = [frame.id for frame in dataset.frames]
        run = RunResult(
            method=method,
            seed=seed,
            precisions=precisions_of(
                official=evaluate(truth, folder / "detections", frames=frames, progress=False),
                loose=evaluate(truth, folder / "detections", frames=frames, overlaps="loose", progress=False),
            ),
            depth=depth_errors(truth, folder / "detections", frames=frames, progress=False),
            seconds=seconds,
            losses=losses or {},
        )
        write_run(result, run)
        return run

    def _training_frames(self, config: BaseConfig, seed: int) -> KittiDataset:
        settings = self.settings
        augmentation = Augmentation(flip=settings.flip, photometric=settings.photometric)
        small = len(self._train_frames) <= _KEPT_IN_MEMORY
        return KittiDataset(
            self.data,
            self.splits[0],
            height=config.height,
            augmentation=augmentation,
            seed=seed,
            cache=small,
            rules=config.rules,
        )

    def _describe_data(self) -> str:
        train, val = len(self._train_frames), len(self._val_frames)
        name = self.data.name
        return f"{name}: {train} frames of {self.splits[0]} to learn from, {val} of {self.splits[1]} to evaluate on"

    def _models(self, expert: BaseDetector) -> tuple[ModelFigures, ...]:
        apprentice = load_detector(self._folder(self.settings.methods[0]) / "detector.pt")
        costs = measure([expert, apprentice], self._val_frames[0], self.processes.device, progress=not self.quiet)
        return tuple(
            ModelFigures(
                name=name,
                backbone=detector.config.backbone.name,
                parameters=cost.parameters,
                gflops=cost.gflops,
                latency_ms=cost.median_ms,
                latency_p90_ms=cost.p90_ms,
            )
            for name, detector, cost in zip(("expert", "apprentice"), (expert, apprentice), costs, strict=True)
        )

    def _folder(self, method: str) -> Path:
        return self.out / ("expert" if method == "expert" else f"{method}-seed{self.settings.seeds[0]}")

    def _picture(self) -> None:
        """Draw the frames with most near cars as expert, apprentice and distilled apprentice see them."""
        titles = {"expert": "expert", "none": "apprentice alone", "rakd": "apprentice with RAKD"}
        models = {title: self._folder(method) / "detections" for method, title in titles.items()}
        models = {title: folder for title, folder in models.items() if (folder.parent / "result.json").exists()}
        by_objects = sorted(self._val_frames, key=lambda frame: -_large_cars(frame.read_labels()))
        frames = [
            Compared(
                frame.id,
                frame.read_image(),
                frame.read_calibration(),
                frame.read_labels(),
                {title: _best(read_results(folder / f"{frame.id}.txt")) for title, folder in models.items()},
            )
            for frame in by_objects[:_PICTURED]
        ]
        title = f"The same frames, {len(models)} models: boxes that score at least half of a model's best in the frame"
        compare_frames(self.out / "frames.png", frames, title=title)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


_KEPT_IN_MEMORY = 400  # frames; of KITTI's size they take 560 MB


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _losses(row: Mapping[str, float], *others: str) -> dict[str, float]:
    """The loss terms of a row of a log, and what else is named."""
    return {key: value for key, value in row.items() if key not in RESERVED or key in others}


def _last_losses(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each loss term over the last twentieth of the rows: single batches scatter."""
    last = [_losses(row) for row in rows[-max(1, len(rows) // 20) :]]
    return {name: sum(row[name] for row in last) / len(last) for name in last[0]}


def _start(detector: BaseDetector) -> str:
    """What a backbone started from, without the reason."""
    return detector.loaded.partition(" (")[0]


def _large_cars(objects: Objects) -> int:
    height = objects.boxes[:, 3] - objects.boxes[:, 1]
    return int((objects.is_type("Car") & (height >= DIFFICULTIES[0][0])).sum())


def _best(objects: Objects) -> Objects:
    if objects.scores is None or not len(objects):
        return objects
    return objects.select(objects.scores >= _SHOWN_SHARE * objects.scores.max())
