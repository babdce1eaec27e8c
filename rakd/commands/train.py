"""``rakd train``: a detector on its own."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from rakd.detector.configs import DETECTORS, DetectorName
from rakd.errors import UserError
from rakd.files import check_folder
from rakd.training.settings import Optimizer, Precision, Schedule, TrainSettings

if TYPE_CHECKING:
    from rakd.data.kitti import KittiDataset
    from rakd.detector.base import BaseDetector
    from rakd.distributed import Processes
    from rakd.training.log import Row


@dataclass(frozen=True)
class Train:
    """Train a detector, such as an expert, and write its weights and its detections.

    Writes detector.pt, checkpoint.pt (to go on from), log.csv, log.jsonl, detections/NNNNNN.txt, result.json and
    config.json (these options) to the run's folder, and prints the evaluation. An interrupted run is continued by
    repeating the command; on several GPUs or machines start it with torchrun.
    """

    data: Annotated[Path, arg(metavar="DIR")]
    """Folder in KITTI's layout, or Waymo's parquet files, which are converted into the run's folder first."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder of the run."""

    detector: DetectorName = "kitti-r50"
    """Name of the detector."""

    splits: Annotated[tuple[str, str], arg(metavar="TRAIN VAL")] = ("train", "val")
    """Names of the frame lists in ImageSets to learn from and to evaluate on."""

    steps: int = 60_000
    """Training steps."""

    extend: bool = False
    """Let a finished run go on to more steps. The learning rate follows the schedule of the new number of steps from
    there, so it rises again where it had fallen: not the same as a run of so many steps from the start."""

    init: Annotated[Path | None, arg(metavar="FILE")] = None
    """Detector file (detector.pt of a run) whose weights to start from, for fine-tuning."""

    batch_size: int = TrainSettings.batch_size
    """Frames a step, over all processes."""

    learning_rate: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate after the warm-up. Without it, the detector's own: 2e-4 for MonoDETR, 0.02 for the others."""

    optimizer: Annotated[Optimizer | None, arg(metavar="{sgd,adamw}")] = None
    """sgd (momentum 0.9) or adamw. Without it, the detector's own: adamw for MonoDETR, sgd for the others."""

    schedule: Schedule = TrainSettings.schedule
    """steps: the rate falls to a tenth after 2/3 and 8/9 of the steps. cosine: it falls along a half cosine."""

    warm_up: int = TrainSettings.warm_up
    """Steps over which the learning rate rises."""

    amp: Precision = TrainSettings.amp
    """Mixed precision of the networks; boxes, depths and losses stay float32. auto: bfloat16 on CUDA, off on a CPU.
    float16 scales the loss."""

    validate_every: int = TrainSettings.validate_every
    """Steps between evaluations while training; 0: none. best.pt is the detector with the highest Car 3D AP (R40,
    moderate, IoU 0.7) of these and the last step. It is chosen on the frames that it is evaluated on."""

    augment: bool = True
    """Mirror images and distort light and colour; MonoDETR zooms them, too."""

    workers: int = TrainSettings.workers
    """Processes that load frames."""

    seed: int = TrainSettings.seed
    """Seed of weights, order and augmentation."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes GPUs if there are any."""

    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """File of options (config.json of a run); options of the command line override it."""

    def run(self) -> None:
        """Train, write and evaluate."""
        from rakd.checkpoints import file_digest
        from rakd.commands.config import check_command, write_options
        from rakd.commands.waymo_data import kitti_layout
        from rakd.data.augment import Augmentation
        from rakd.data.checks import check_frames
        from rakd.data.frames import digest
        from rakd.data.kitti import KittiDataset, cache_share
        from rakd.detector.files import start_from
        from rakd.distributed import barrier, start_processes
        from rakd.study.runner import backbone_start
        from rakd.study.validation import CarValidation
        from rakd.training.model import DistillationModel
        from rakd.training.trainer import Trainer

        check_folder(self.out, "--out")
        check_command(self, self.out)
        if (self.out / "result.json").exists() and not (self.out / "checkpoint.pt").exists():
            raise UserError(
                f"--out: {self.out} is finished, but its checkpoint.pt is gone: put it back, or choose another folder"
            )
        config = DETECTORS[self.detector]
        options = {f.name: getattr(self, f.name) for f in fields(TrainSettings) if hasattr(self, f.name)}
        for name in ("optimizer", "learning_rate"):
            options[name] = getattr(config, name) if options[name] is None else options[name]
        settings = TrainSettings(**options)
        settings.warn_of_warm_up()
        with start_processes(self.device) as processes:
            data = kitti_layout(self.data, self.out / "data", processes)
            dataset = KittiDataset(
                data,
                self.splits[0],
                height=config.height,
                augmentation=Augmentation() if self.augment else None,
                seed=self.seed,
                cache_bytes=cache_share(self.workers),
                rules=config.rules,
            )
            val = KittiDataset(data, self.splits[1], height=config.height)
            if processes.is_main:
                check_frames(dataset.frames, val.frames, [(config.height, config.width)])
            detector = config.build(self.seed) if self.init is None else start_from(self.init, config)
            if processes.is_main:
                start = detector.init_source if self.init is None else f"starts from {self.init}"
                print(f"{self.detector}: {start}", flush=True)
            # best.pt is that of the best figure, and figures on other frames do not compare.
            evaluated = {"evaluated_frames": digest(val.frames)}
            init = {} if self.init is None else {"init": file_digest(self.init)}
            trainer = Trainer(
                DistillationModel(detector),
                dataset,
                settings,
                self.out,
                processes.device,
                name=self.detector,
                fingerprint={
                    "detector": config.to_plain(),
                    "started_from": backbone_start(detector),
                    **init,
                    **evaluated,
                },
                image_size=config.image_size,
                validation=CarValidation(detector, val, self.out, processes) if settings.validate_every else None,
                extend=self.extend,
            )
            # Not before the trainer has accepted what is in the folder.
            if processes.is_main:
                write_options(self, self.out / "config.json")
                if trainer.step < settings.steps:
                    (self.out / "result.json").unlink(missing_ok=True)  # of a run that is extended
            rows = trainer.run()
            self._finish(detector.eval(), val, data, processes, rows)
            # The main process holds the connection: it must not leave earlier.
            barrier(processes)

    def _finish(
        self, detector: "BaseDetector", val: "KittiDataset", data: Path, processes: "Processes", rows: "list[Row]"
    ) -> None:
        """Write weights and detections, which all processes make, and print their evaluation."""
        from rakd.commands.waymo_data import format_waymo_tables, is_converted
        from rakd.detector.files import save_detector
        from rakd.detector.inference import write_detections
        from rakd.evaluation.report import format_ceilings, format_table
        from rakd.study.evaluation import evaluate_run
        from rakd.study.results import write_run
        from rakd.training.log import last_losses

        if processes.is_main:
            save_detector(self.out / "detector.pt", detector)
        write_detections(detector, val, self.out / "detections", processes.device, processes=processes)
        if not processes.is_main:
            return
        frames = [frame.id for frame in val.frames]
        folders = data / "training" / "label_2", self.out / "detections"
        figures, result = evaluate_run(
            "none", self.seed, *folders, frames, seconds=rows[-1]["seconds"], losses=last_losses(rows), progress=True
        )
        write_run(self.out / "result.json", figures)
        texts = [format_table(result, "R40"), format_table(result, "R11"), format_ceilings(result)]
        if is_converted(data):
            texts = [format_waymo_tables(data, self.out / "detections", frames)]
        for text in filter(None, texts):
            print(f"\n{text}")
        print(f"\nweights: {self.out / 'detector.pt'}; detections: {self.out / 'detections'}")
