"""Feature distillation alone: an apprentice pyramid learns a frozen expert's features in the labelled boxes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor, nn

from rakd.data.frames import Frame
from rakd.data.kitti import Batch, KittiDataset, collate
from rakd.data.targets import pooling_boxes
from rakd.detector.pyramid import STRIDES, Pyramid
from rakd.distill import Weights
from rakd.distill.distiller import Distiller
from rakd.distill.methods import RegionDistillation
from rakd.errors import UserError
from rakd.files import replacing, write_text
from rakd.progress import bar
from rakd.training.settings import TrainSettings
from rakd.training.trainer import Trainer


@dataclass(frozen=True)
class FeatureDistillation:
    """Settings of a run. A run can only be resumed with the settings it began with.

    Attributes:
        data: Folder in KITTI's layout.
        split: List in ImageSets; None: all frames.
        expert: torchvision's name of the expert's backbone.
        apprentice: The apprentice's.
        weights: See `rakd.detector.pyramid.Pyramid`.
        height: Images are resized to this height.
        batch_size: Frames a step.
        steps: Steps in all.
        learning_rate: Of AdamW, after `warm_up` steps, falling along a half cosine.
        warm_up: Steps over which the learning rate rises.
        seed: Of the weights and the order of frames.
    """

    data: str
    split: str | None = None
    expert: str = "resnet50"
    apprentice: str = "resnet18"
    weights: Weights = "pretrained"
    height: int = 192
    batch_size: int = 2
    steps: int = 100
    learning_rate: float = 1e-3
    warm_up: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("warm_up", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        steps: Loss of each step.
        before: Mean loss over all frames before the first step, apprentice in eval mode.
        after: The same after the last.
    """

    steps: list[float]
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times the loss over all frames has fallen."""
        return self.before / self.after if self.after else float("inf")


def object_boxes(batch: Batch) -> list[Tensor]:
    """The boxes of all labelled objects but DontCare regions, ``[K_b, 4]`` per image, in the images' pixels."""
    boxes = []
    for sample in batch.samples:
        if sample.objects is None:
            raise ValueError(f"frame {sample.id} has no labels to take boxes from")
        wanted = sample.objects.select(~sample.objects.is_type("DontCare"))
        boxes.append(torch.from_numpy(wanted.boxes).float())
    return boxes


class FeatureModel(nn.Module):
    """The distillation loss alone, for `rakd.training.trainer.Trainer`.

    Args:
        apprentice: What learns.
        expert: What teaches; frozen.
    """

    def __init__(self, apprentice: Pyramid, expert: Pyramid) -> None:
        super().__init__()
        self.apprentice = apprentice
        self.distiller = Distiller(expert, RegionDistillation(strides=STRIDES))

    def forward(self, batch: Batch, _seeds: Sequence[int] = ()) -> dict[str, Tensor]:
        """The loss of a batch."""
        device = next(self.apprentice.parameters()).device
        images = batch.images.to(device)
        boxes = pooling_boxes([rows.to(device) for rows in object_boxes(batch)])
        return {"loss": self.distiller(images, boxes, self.apprentice.extract_features(images))}


class FeatureRun:
    """A feature distillation in a folder, from its start or from the last checkpoint there.

    Writes ``checkpoint.pt``, ``log.csv``, ``apprentice.pt``, ``loss.png`` and ``summary.json``.

    Args:
        settings: What to do.
        out: The run's folder.
        device: Where to compute.

    Raises:
        ValueError: No frame has an object.
        FileNotFoundError: The data are not there.
    """

    def __init__(self, settings: FeatureDistillation, out: Path, device: torch.device) -> None:
        self.settings = settings
        self.out = out
        self.device = device
        self.dataset = KittiDataset(settings.data, settings.split, height=settings.height)
        self.dataset.frames = [frame for frame in self.dataset.frames if _has_objects(frame)]
        if not self.dataset.frames:
            raise ValueError(f"{settings.data} has no frame with a labelled object")
        self.expert = Pyramid(settings.expert, settings.weights, settings.seed).to(device)
        self.apprentice = Pyramid(settings.apprentice, settings.weights, settings.seed + 1).to(device)

    def run(self) -> Outcome:
        """Train to the end and write the results.

        Raises:
            ValueError: The folder holds a run with other settings, or the loss is not finite.
        """
        settings = self.settings
        # Done again on resuming: it gives the same, and what it gives need not be kept.
        for pyramid in (self.expert, self.apprentice):
            if pyramid.loaded != "ImageNet weights":
                pyramid.calibrate(batch.images.to(self.device) for batch in self._all_frames("calibrating"))
        model = FeatureModel(self.apprentice, self.expert)
        before = self._evaluate(model, "loss before")
        trainer = Trainer(
            model,
            self.dataset,
            TrainSettings(
                steps=settings.steps,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                optimizer="adamw",
                warm_up=settings.warm_up,
                schedule="cosine",
                seed=settings.seed,
                checkpoint_every=20,
                log_every=1,
            ),
            self.out,
            self.device,
            name="distilling",
            fingerprint={"expert": settings.expert, "apprentice": settings.apprentice, "weights": settings.weights},
        )
        rows = trainer.run()
        outcome = Outcome([row["loss"] for row in rows], before, self._evaluate(model, "loss after"))
        self._write_results(outcome)
        return outcome

    def _all_frames(self, what: str) -> Iterator[Batch]:
        for index in bar(range(len(self.dataset)), desc=what, unit="frame", leave=False, delay=2):
            yield collate([self.dataset[index]])

    @torch.no_grad()
    def _evaluate(self, model: FeatureModel, what: str) -> float:
        """Mean loss over all frames, apprentice in eval mode."""
        model.eval()
        losses = [float(model(batch)["loss"]) for batch in self._all_frames(what)]
        return sum(losses) / len(losses)

    def _write_results(self, outcome: Outcome) -> None:
        with replacing(self.out / "apprentice.pt") as path:
            torch.save(self.apprentice.state_dict(), path)
        summary = {
            "settings": asdict(self.settings),
            "frames": len(self.dataset),
            "expert_started_from": self.expert.loaded,
            "apprentice_started_from": self.apprentice.loaded,
            "loss_before": outcome.before,
            "loss_after": outcome.after,
            "times_fallen": outcome.ratio,
            "torch": torch.__version__,
        }
        write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        with replacing(self.out / "loss.png") as path:
            draw_curve(outcome, self.settings).savefig(path, dpi=120)


def _has_objects(frame: Frame) -> bool:
    return bool((~frame.read_labels().is_type("DontCare")).any())


def draw_curve(outcome: Outcome, settings: FeatureDistillation) -> Figure:
    """Draw the loss of each step, and the loss over all frames before and after."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axis = figure.add_subplot()
        steps = range(1, len(outcome.steps) + 1)
        axis.plot(steps, outcome.steps, color="#2a6f97", linewidth=1.4, label="each step's frames")
        last = len(outcome.steps)
        axis.plot(
            [0, last], [outcome.before, outcome.after], "o", color="#d1495b", label="all frames, before and after"
        )
        for x, value, shift in ((0, outcome.before, (7, 4)), (last, outcome.after, (7, -4))):
            axis.annotate(f"{value:.3g}", (x, value), xytext=shift, textcoords="offset points", color="#d1495b")
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step")
        axis.set_ylabel("distillation loss (RAKD, soft)")
        axis.set_title(f"{settings.apprentice} learns the features of {settings.expert}", loc="left")
        axis.grid(True, which="both", axis="y", alpha=0.25)
        axis.legend(frameon=False)
    return figure
