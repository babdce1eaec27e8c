"""One run of an experiment: trains a detector in its folder, and evaluates it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rakd.checkpoints import file_digest
from rakd.data.augment import Augmentation
from rakd.data.kitti import KittiDataset, cache_share
from rakd.detector.base import BaseDetector
from rakd.detector.configs import DETECTORS
from rakd.detector.files import load_detector, save_detector, start_from
from rakd.detector.inference import write_detections
from rakd.distill.cache import FeatureCache, fingerprint
from rakd.distill.methods import make_method
from rakd.distributed import Processes, broadcast_object
from rakd.errors import UserError
from rakd.files import read_text, write_text
from rakd.study.evaluation import DRAWS, evaluate_run
from rakd.study.plan import Run
from rakd.study.results import RunResult, read_run, write_run
from rakd.study.settings import StudySettings
from rakd.study.validation import CarValidation
from rakd.study.versions import versions
from rakd.training.log import Row, last_losses
from rakd.training.model import DistillationModel, expert_size, expert_strides, make_distillation_model
from rakd.training.trainer import Trainer


class Runner:
    """Does the runs of an experiment, one at a time. Finished work in a run's folder is not done again.

    Args:
        settings: Of the experiment.
        data: Folder in KITTI's layout.
        out: The experiment's folder; each run has one in it.
        processes: Where to compute. All call each method alike; the main one writes.
        splits: Names of the lists to train on and to evaluate on.
        quiet: Show no progress bars.
        extend: Let finished runs of apprentices go on to more steps, see `rakd.training.trainer.Trainer`.
        cache_bytes: Bound of the expert's features kept in the experiment's folder, for all runs; 0: none are.

    Raises:
        UserError: Features are to be kept and light and colour are distorted: each image is then another one.
    """

    def __init__(
        self,
        settings: StudySettings,
        data: Path,
        out: Path,
        processes: Processes,
        *,
        splits: tuple[str, str] = ("train", "val"),
        quiet: bool = False,
        extend: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        if cache_bytes and settings.photometric:
            raise UserError(
                "feature_cache: expected images that mirroring alone varies (photometric 0), since distorted ones "
                f"never come again; got photometric {settings.photometric:g}"
            )
        if cache_bytes and DETECTORS[settings.apprentice].rules.zoom:
            raise UserError(
                "feature_cache: expected images that mirroring alone varies, since zoomed ones never come again; "
                f"{settings.apprentice} zooms them"
            )
        self.settings = settings
        self.data = data
        self.out = out
        self.processes = processes
        self.splits = splits
        self.quiet = quiet
        self.extend = extend
        self.extended: set[str] = set()  # names of runs that went on to more steps than they were made for
        self.cache = FeatureCache(out / "features", max_bytes=cache_bytes) if cache_bytes else None

    def build(self, run: Run) -> BaseDetector:
        """A run's detector before training, or as its file has it."""
        if run.trained is not None:
            return load_detector(run.trained).to(self.processes.device)
        config = DETECTORS[run.detector]
        return config.build(run.model_seed) if run.init is None else start_from(run.init, config)

    def train(self, run: Run, detector: BaseDetector, expert: BaseDetector | None) -> list[Row]:
        """Train a detector to the end of its run; give the rows of its log.

        Args:
            run: From `rakd.study.plan.make_plan`.
            detector: Before training; left in evaluation mode.
            expert: None: it is trained alone.
        """
        settings, config, taught = self.settings, detector.config, expert is not None
        self._claim(run, expert)
        dataset = KittiDataset(
            self.data,
            self.splits[0],
            height=config.height,
            augmentation=Augmentation(photometric=settings.photometric),
            seed=run.seed,
            cache_bytes=cache_share(run.training.workers),
            rules=config.rules,
            expert_size=None if expert is None else expert_size(config, expert.config),
        )
        folder = self.out / run.name
        # An option that is off is absent, so that a new one does not keep runs that have begun from going on.
        options: dict[str, object] = {} if run.init is None else {"init": file_digest(run.init)}
        if taught and settings.options.get(run.method):
            options["method_options"] = settings.options[run.method]
        if settings.rescale and taught:
            options["rescale"] = settings.rescale
        if self.cache is not None and taught:
            options["feature_cache"] = True  # the expert sees images one by one, which rounds otherwise
        validation = None
        if run.training.validate_every:
            validation = CarValidation(detector, self._validation_frames(detector), folder, self.processes)
        trainer = Trainer(
            self.make_model(run, detector, expert),
            dataset,
            run.training,
            folder,
            self.processes.device,
            name=run.name,
            fingerprint={
                "detector": config.to_plain(),
                "method": run.method,
                "weight": run.weight,
                "regions": settings.regions,
                "started_from": backbone_start(detector),
                **options,
            },
            image_size=config.image_size,
            quiet=self.quiet,
            validation=validation,
            extend=None if run.method == "expert" else self.extend,
        )
        if trainer.step < run.training.steps and self.processes.is_main:
            (folder / "result.json").unlink(missing_ok=True)  # of a run that is extended
        if self.processes.is_main:
            self._write_settings(run)
        if trainer.extended_from:
            self.extended.add(run.name)
        rows = trainer.run()
        detector.eval()
        return rows

    def _write_settings(self, run: Run) -> None:
        """Write what the run shares with those of other seeds, for ``rakd compare``."""
        settings = self.settings
        told = {
            "detector": settings.expert if run.method == "expert" else settings.apprentice,
            "photometric": settings.photometric,
            **asdict(run.training),
        }
        if run.taught_by:
            told |= {"weight": run.weight, "regions": settings.regions, "rescale": settings.rescale}
            told |= {"options": settings.options.get(run.method, {})}
        write_text(self.out / run.name / "settings.json", json.dumps(told, indent=1) + "\n")

    def make_model(self, run: Run, detector: BaseDetector, expert: BaseDetector | None) -> DistillationModel:
        """Make the model that a run trains: the detector, with a method where an expert teaches it.

        Raises:
            ValueError, TypeError: Detector, expert, method and regions do not fit each other.
        """
        settings, term = self.settings, None
        if expert is not None:
            term = make_method(
                run.method,
                strides=detector.strides,
                expert_strides=expert_strides(detector, expert),
                expert_channels=expert.channels,
                apprentice_channels=detector.channels,
                batch_size=run.training.batch_size // self.processes.count,
                seed=run.seed,
                **{"canonical_size": detector.canonical_size, **settings.options.get(run.method, {})},
            )
        return make_distillation_model(
            detector, expert, term, run.weight, settings.regions, self.cache, settings.rescale
        )

    def _claim(self, run: Run, expert: BaseDetector | None) -> None:
        """Note who teaches; refuse a finished run whose checkpoint is gone, and one that another expert taught."""
        folder = self.out / run.name
        digest = None if expert is None else fingerprint(list(expert.state_dict().values()), "")

        def claim() -> str | None:
            begun, path = (folder / "checkpoint.pt").exists(), folder / "expert.txt"
            if (folder / "result.json").exists() and not begun:
                return f"{folder} is finished, but its checkpoint.pt is gone: put it back, or remove the folder"
            if digest is not None and not begun:
                write_text(path, digest)
            elif digest is not None and read_text(path, "the hash of the run's expert") != digest:
                return f"{folder} holds a run taught by another expert than {run.taught_by} now is: remove it"
            return None

        fault = broadcast_object(self.processes, claim)
        if fault is not None:
            raise UserError(fault)

    def evaluate(self, run: Run, detector: BaseDetector, rows: Sequence[Row] = ()) -> RunResult | None:
        """Evaluate a detector and write what was found.

        Args:
            run: Whose folder to write to.
            detector: In evaluation mode.
            rows: Of the log of its training, for time and losses.

        Returns:
            The figures in the main process, None in the others.
        """
        folder = self.out / run.name
        result = folder / "result.json"
        if broadcast_object(self.processes, result.exists):
            return read_run(result) if self.processes.is_main else None
        if self.processes.is_main:
            save_detector(folder / "detector.pt", detector)
        dataset = self._validation_frames(detector)
        detections = folder / "detections"
        write_detections(
            detector, dataset, detections, self.processes.device, processes=self.processes, progress=not self.quiet
        )
        if not self.processes.is_main:
            return None
        truth = self.data / "training" / "label_2"
        frames = [frame.id for frame in dataset.frames]
        figures, _ = evaluate_run(
            run.method,
            run.seed,
            truth,
            detections,
            frames,
            seconds=rows[-1]["seconds"] if rows else None,
            losses=last_losses(rows) if rows else None,
            draws=0 if run.method == "expert" else DRAWS,
            progress=not self.quiet,
        )
        if rows:
            figures = replace(figures, versions=versions(self.processes.device))
        write_run(result, figures)
        return figures

    def _validation_frames(self, detector: BaseDetector) -> KittiDataset:
        return KittiDataset(self.data, self.splits[1], height=detector.config.height)


def backbone_start(detector: BaseDetector) -> str:
    """Weights that the backbone started from, without the reason."""
    return detector.init_source.partition(" (")[0]
