"""``rakd distill``, the main job: an expert teaches apprentices by several methods, which are then compared."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from rakd.distill import MethodName, Regions
from rakd.errors import UserError
from rakd.files import check_folder
from rakd.scenes import make_scenes
from rakd.study.settings import PAPER_METHODS, STUDIES, StudyName
from rakd.training.settings import TrainSettings

_SCENES = 200  # frames rendered where no data are given


@dataclass(frozen=True)
class Distill:
    """Train an expert and apprentices, alone and taught by several methods; compare them as the paper does.

    Without arguments it renders street scenes and runs on two processor cores in minutes. Writes tables (Markdown,
    CSV, JSON), training curves, pictures of detections and all weights to the run's folder, and prints the tables.
    An interrupted run is continued by repeating the command. Once the expert is trained, methods and seeds can be
    shared out over commands with one folder; repeat it with all of them in the end for the tables. On several GPUs or
    machines start it with torchrun: torchrun --nproc-per-node 4 -m rakd distill --study kitti --data KITTI
    """

    study: StudyName = "tiny"
    """Settings to start from. tiny: MobileNetV3 learns from ResNet-18 on images 128 px high. kitti: the paper's,
    ResNet-18 learns from ResNet-50 on images 512 px high. waymo: the same on images 768 x 512, for 30 epochs.
    monodetr-tiny and monodetr-kitti: the same backbones as MonoDETRs, on images 128 and 384 px high."""

    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder in KITTI's layout, or Waymo's parquet files, which are converted into the run's folder. Without it street
    scenes are rendered into the run's folder (studies tiny and monodetr-tiny)."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/distill")
    """Folder of the run."""

    splits: Annotated[tuple[str, str], arg(metavar="TRAIN VAL")] = ("train", "val")
    """Names of the frame lists in ImageSets to learn from and to evaluate on."""

    methods: Annotated[tuple[MethodName, ...], arg(metavar="METHOD...")] = PAPER_METHODS
    """What apprentices are trained with."""

    seeds: Annotated[tuple[int, ...], arg(metavar="N...")] = (0,)
    """Each method is run with each seed; tables give mean and spread."""

    expert: Annotated[Path | None, arg(metavar="FILE")] = None
    """File of a trained expert (detector.pt of a run); without it one is trained."""

    expert_steps: Annotated[int | None, arg(metavar="N")] = None
    """Training steps of the expert instead of the study's."""

    steps: Annotated[int | None, arg(metavar="N")] = None
    """Training steps of each apprentice instead of the study's."""

    batch_size: Annotated[int | None, arg(metavar="N")] = None
    """Frames a step over all processes, for expert and apprentices, instead of the study's."""

    weight: Annotated[float | None, arg(metavar="W")] = None
    """Weight of the distillation loss, for all methods, instead of the study's."""

    regions: Regions | None = None
    """Where RAKD and its ablations compare features: the apprentice's proposals that lie on objects, the labelled
    boxes (objects), or the boxes of an expert's matched queries. Default: the study's, which is proposals for two
    stages and objects for MonoDETR."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs if there are any."""

    def run(self) -> None:
        """Render, train, evaluate, report."""
        from rakd.commands.waymo_data import is_converted, kitti_layout, write_waymo_tables
        from rakd.distributed import barrier, start_processes
        from rakd.study.experiment import Experiment
        from rakd.study.report import format_tables

        base = STUDIES[self.study]
        weights = base.weights if self.weight is None else dict.fromkeys(base.weights, self.weight)
        settings = replace(
            base,
            methods=tuple(self.methods),
            seeds=tuple(self.seeds),
            regions=self.regions or base.regions,
            weights=weights,
            training=_replaced(base.training, self.steps, self.batch_size),
            expert_training=_replaced(base.expert_training, self.expert_steps, self.batch_size),
        )
        if self.expert is not None and not self.expert.is_file():
            raise UserError(f"--expert: {self.expert} is not there")
        if self.data is None and not self.study.endswith("tiny"):
            raise UserError(
                f"--data: --study {self.study} needs a folder in KITTI's layout or of Waymo's parquet files; scenes "
                "are rendered for tiny and monodetr-tiny only"
            )
        check_folder(self.out, "--out")
        with start_processes(self.device) as processes:
            data = self.data
            if data is None:
                data = self.out / "scenes"
                if processes.is_main:
                    print(f"no data given: learning from {_SCENES} rendered street scenes in {data}", flush=True)
                    make_scenes(data, _SCENES, 0, workers=os.cpu_count() or 1, progress=True)
                barrier(processes)
            data = kitti_layout(data, self.out / "data", processes)
            study = Experiment(settings, data, self.out, processes, expert=self.expert, splits=self.splits).run()
            if processes.is_main:
                print()
                print(format_tables(study))
                if is_converted(data):
                    runs = [path.parent for path in sorted(self.out.glob("*/result.json"))]
                    write_waymo_tables(self.out / "waymo.md", data, self.splits[1], runs)
                print(f"tables, curves and pictures are in {self.out}")


def _replaced(training: TrainSettings, steps: int | None, batch_size: int | None) -> TrainSettings:
    training = training if steps is None else replace(training, steps=steps)
    return training if batch_size is None else replace(training, batch_size=batch_size)
