"""Feature distillation alone: an apprentice pyramid learns a frozen expert's features in the labelled boxes."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from rakd.data.kitti import Batch, KittiDataset, collate
from rakd.detector.pyramid import STRIDES, Pyramid
from rakd.distill import Weights
from rakd.files import replacing, write_text
from rakd_ops import soft_roi_distill


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
        learning_rate: Of AdamW, after `warm_up` steps, falling to a tenth by the end.
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
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
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


class FeatureTrainer:
    """Runs a feature distillation in a folder, from its start or from the last checkpoint there.

    Writes ``checkpoint.pt`` (while running), ``apprentice.pt``, ``loss.csv``, ``loss.png`` and ``summary.json``.

    Args:
        settings: What to do.
        out: The run's folder.
        device: Where to compute.
        checkpoint_every: Steps between checkpoints.

    Raises:
        ValueError: The folder holds a run with other settings, or no frame has an object.
        FileNotFoundError: The data are not there.
    """

    def __init__(
        self, settings: FeatureDistillation, out: Path, device: torch.device, checkpoint_every: int = 20
    ) -> None:
        self.settings = settings
        self.checkpoint_every = checkpoint_every
        self.out = out
        self.device = device
        self.dataset = KittiDataset(settings.data, settings.split, height=settings.height)
        self.frames = [i for i in range(len(self.dataset)) if self._has_objects(i)]
        if not self.frames:
            raise ValueError(f"{settings.data} has no frame with a labelled object")
        self.expert = Pyramid(settings.expert, settings.weights, settings.seed).to(device)
        self.apprentice = Pyramid(settings.apprentice, settings.weights, settings.seed + 1).to(device)
        self.optimizer = torch.optim.AdamW(self.apprentice.parameters(), lr=settings.learning_rate)
        self.losses: list[float] = []
        self.before = float("nan")
        self.resumed = self._resume()

    def _has_objects(self, index: int) -> bool:
        objects = self.dataset.frames[index].read_labels()
        return bool((~objects.is_type("DontCare")).any())

    def run(self) -> Outcome:
        """Train to the end and write the results."""
        if not self.resumed:
            for pyramid in (self.expert, self.apprentice):
                if pyramid.loaded != "ImageNet weights":
                    pyramid.calibrate(batch.images.to(self.device) for batch in self._all_frames("calibrating"))
        self.expert.eval().requires_grad_(False)
        if not self.resumed:
            self.before = self.evaluate("loss before")
        self.apprentice.train()
        progress = tqdm(initial=len(self.losses), total=self.settings.steps, desc="distilling", unit="step")
        with progress:
            for step in range(len(self.losses), self.settings.steps):
                self.losses.append(self._step(step))
                progress.update()
                progress.set_postfix(loss=f"{self.losses[-1]:.4f}")
                if (step + 1) % self.checkpoint_every == 0:
                    self._save_checkpoint()
        outcome = Outcome(self.losses, self.before, self.evaluate("loss after"))
        self._write_results(outcome)
        return outcome

    def _step(self, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        loss = self._loss(self._batch(self._order(step)))
        if not loss.isfinite():
            ids = ", ".join(self.dataset.frames[i].id for i in self._order(step))
            raise ValueError(f"the loss is {loss.item()} in step {step}: frames {ids}")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(self.apprentice.parameters(), 10.0)
        self.optimizer.step()
        return loss.item()

    def _learning_rate(self, step: int) -> float:
        settings = self.settings
        warm = min(1.0, (step + 1) / (settings.warm_up + 1))
        cosine = 0.5 * (1.0 + float(torch.tensor(torch.pi * step / settings.steps).cos()))
        return settings.learning_rate * warm * (0.1 + 0.9 * cosine)

    def _order(self, step: int) -> list[int]:
        """The frames of a step: shuffled anew every epoch, from the seed and the step alone."""
        rows = []
        for position in range(step * self.settings.batch_size, (step + 1) * self.settings.batch_size):
            epoch, place = divmod(position, len(self.frames))
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            rows.append(self.frames[int(torch.randperm(len(self.frames), generator=generator)[place])])
        return rows

    def _batch(self, indices: list[int]) -> Batch:
        return collate([self.dataset[i] for i in indices])

    def _loss(self, batch: Batch) -> Tensor:
        images = batch.images.to(self.device)
        boxes = [rows.to(self.device) for rows in object_boxes(batch)]
        with torch.no_grad():
            expert = self.expert.extract_features(images)
        return soft_roi_distill(self.apprentice.extract_features(images), expert, boxes, strides=STRIDES)

    def _all_frames(self, what: str) -> Iterator[Batch]:
        for index in tqdm(self.frames, desc=what, unit="frame", leave=False, delay=2):
            yield self._batch([index])

    @torch.no_grad()
    def evaluate(self, what: str) -> float:
        """Mean loss over all frames, apprentice in eval mode."""
        self.apprentice.eval()
        losses = [self._loss(batch).item() for batch in self._all_frames(what)]
        return sum(losses) / len(losses)

    def _save_checkpoint(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "expert": self.expert.state_dict(),
            "apprentice": self.apprentice.state_dict(),
            "loaded": (self.expert.loaded, self.apprentice.loaded),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "before": self.before,
        }
        with replacing(self.out / "checkpoint.pt") as path:
            torch.save(state, path)

    def _resume(self) -> bool:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        ours = asdict(self.settings)
        other = {name: value for name, value in state["settings"].items() if ours.get(name) != value}
        if other:
            raise ValueError(f"{self.out} holds a run with other settings: {other}; choose another folder")
        self.expert.load_state_dict(state["expert"])
        self.apprentice.load_state_dict(state["apprentice"])
        self.expert.loaded, self.apprentice.loaded = state["loaded"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.before = float(state["before"])
        return True

    def _write_results(self, outcome: Outcome) -> None:
        self._save_checkpoint()
        with replacing(self.out / "apprentice.pt") as path:
            torch.save(self.apprentice.state_dict(), path)
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["step", "loss", "learning_rate"])
        writer.writerows(
            [i + 1, f"{loss:.8g}", f"{self._learning_rate(i):.8g}"] for i, loss in enumerate(outcome.steps)
        )
        write_text(self.out / "loss.csv", rows.getvalue())
        summary = {
            "settings": asdict(self.settings),
            "frames": len(self.frames),
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
        axis.set_xlabel("step")
        axis.set_ylabel("distillation loss (RAKD, soft)")
        axis.set_title(f"{settings.apprentice} learns the features of {settings.expert}", loc="left")
        axis.grid(True, which="both", axis="y", alpha=0.25)
        axis.legend(frameon=False)
    return figure
