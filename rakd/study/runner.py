"""One run of an experiment: trains a detector in its folder, and evaluates it."""

from collections.abc import Sequence
from pathlib import Path

from rakd.data.augment import Augmentation
from rakd.data.kitti import KittiDataset
from rakd.detector.base import BaseDetector
from rakd.detector.files import save_detector
from rakd.detector.inference import write_detections
from rakd.distill.methods import make_method
from rakd.distributed import Processes, broadcast_object
from rakd.evaluation.depth import depth_errors
from rakd.evaluation.kitti import evaluate
from rakd.study.plan import Run
from rakd.study.results import RunResult, precisions_of, read_run, write_run
from rakd.study.settings import StudySettings
from rakd.training.log import RESERVED, Row
from rakd.training.model import make_distillation_model
from rakd.training.trainer import Trainer

_KEPT_IN_MEMORY = 400  # frames; of KITTI's size they take 560 MB


class Runner:
    """Does the runs of an experiment, one at a time. Finished work in a run's folder is not done again.

    Args:
        settings: Of the experiment.
        data: Folder in KITTI's layout.
        out: The experiment's folder; each run has one in it.
        processes: Where to compute. All call each method alike; the main one writes.
        splits: Names of the lists to train on and to evaluate on.
        quiet: Show no progress bars.
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
    ) -> None:
        self.settings = settings
        self.data = data
        self.out = out
        self.processes = processes
        self.splits = splits
        self.quiet = quiet

    def train(self, run: Run, detector: BaseDetector, expert: BaseDetector | None) -> list[Row]:
        """Train a detector to the end of its run; give the rows of its log.

        Args:
            run: From `rakd.study.plan.make_plan`.
            detector: Before training; left in evaluation mode.
            expert: None: it is trained alone.
        """
        settings, config = self.settings, detector.config
        term = None
        if expert is not None:
            term = make_method(
                run.method,
                strides=detector.strides,
                expert_channels=expert.channels,
                apprentice_channels=detector.channels,
                batch_size=run.training.batch_size // self.processes.count,
                seed=run.seed,
                canonical_size=detector.canonical_size,
            )
        dataset = KittiDataset(
            self.data,
            self.splits[0],
            height=config.height,
            augmentation=Augmentation(flip=settings.flip, photometric=settings.photometric),
            seed=run.seed,
            rules=config.rules,
        )
        dataset.cache = len(dataset) <= _KEPT_IN_MEMORY
        trainer = Trainer(
            make_distillation_model(detector, expert, term, run.weight, settings.regions),
            dataset,
            run.training,
            self.out / run.name,
            self.processes.device,
            name=run.name,
            fingerprint={
                "detector": config.to_plain(),
                "method": run.method,
                "weight": run.weight,
                "regions": settings.regions,
                "started_from": backbone_start(detector),
            },
            image_size=config.image_size,
            quiet=self.quiet,
        )
        rows = trainer.run()
        detector.eval()
        return rows

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
        dataset = KittiDataset(self.data, self.splits[1], height=detector.config.height)
        detections = folder / "detections"
        write_detections(
            detector, dataset, detections, self.processes.device, processes=self.processes, progress=not self.quiet
        )
        if not self.processes.is_main:
            return None
        truth = self.data / "training" / "label_2"
        frames = [frame.id for frame in dataset.frames]
        figures = RunResult(
            method=run.method,
            seed=run.seed,
            precisions=precisions_of(
                official=evaluate(truth, detections, frames=frames, progress=False),
                loose=evaluate(truth, detections, frames=frames, overlaps="loose", progress=False),
            ),
            depth=depth_errors(truth, detections, frames=frames, progress=False),
            seconds=rows[-1]["seconds"] if rows else None,
            losses=_last_losses(rows) if rows else {},
        )
        write_run(result, figures)
        return figures


def losses_of(row: Row, *others: str) -> Row:
    """The loss terms of a row of a log, and the columns named besides."""
    return {key: value for key, value in row.items() if key not in RESERVED or key in others}


def backbone_start(detector: BaseDetector) -> str:
    """Weights that the backbone started from, without the reason."""
    return detector.loaded.partition(" (")[0]


def _last_losses(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of each loss term over the last twentieth of the rows: single batches scatter."""
    last = [losses_of(row) for row in rows[-max(1, len(rows) // 20) :]]
    return {name: sum(row[name] for row in last) / len(last) for name in last[0]}
