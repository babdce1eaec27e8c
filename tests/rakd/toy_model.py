"""A model so small that a step takes milliseconds, and a trainer for it; imported by tests and by what they start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rakd.data.augment import Augmentation
from rakd.data.kitti import Batch, KittiDataset
from rakd.training.settings import TrainSettings
from rakd.training.trainer import Trainer, Validation

CPU = torch.device("cpu")


class ToyModel(nn.Module):
    """Guesses how many objects an image has, and how high they are on average; both losses are means over images."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.conv = nn.Conv2d(3, 4, 16, stride=16, dtype=dtype)
            self.norm = nn.GroupNorm(1, 4, dtype=dtype)
            self.head = nn.Linear(4, 2, dtype=dtype)
        self.seen: list[list[str]] = []
        self.seeds: list[list[int]] = []

    def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
        self.seen.append([sample.id for sample in batch.samples])
        self.seeds.append(list(seeds))
        weight = self.conv.weight
        images = batch.images.to(weight)
        # Random shifts per image, as a detector samples proposals.
        noise = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        images = images + 0.1 * torch.stack(noise).to(weight)[:, None, None, None]
        guess = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        boxes = [targets.boxes for targets in batch.targets(weight.device)]
        count = torch.tensor([len(rows) for rows in boxes]).to(weight)
        height = torch.stack([(rows[:, 3] - rows[:, 1]).sum() / max(len(rows), 1) for rows in boxes]).to(weight)
        return {
            "count": (guess[:, 0] - count).square().mean(),
            "height": (guess[:, 1] - height / 30).square().mean(),
        }


class Scripted:
    """A validation that measures what it is told, and notes the step that it keeps."""

    metric = "figure"

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.trainer: Trainer | None = None
        self.kept: list[int] = []
        self.training: set[bool] = set()

    def measure(self) -> float:
        assert self.trainer is not None
        self.training.add(self.trainer.model.training)
        torch.rand(3)
        return self.values.pop(0)

    def keep(self) -> None:
        assert self.trainer is not None
        self.kept.append(self.trainer.step)


def settings(**options: Any) -> TrainSettings:
    small = {"steps": 10, "batch_size": 4, "learning_rate": 0.02, "warm_up": 2, "checkpoint_every": 3, "log_every": 2}
    return TrainSettings(**{**small, **options})


def make_trainer(
    scenes: Path | str,
    out: Path | str,
    model: nn.Module | None = None,
    device: torch.device = CPU,
    *,
    validation: Validation | None = None,
    extend: bool = False,
    **options: Any,
) -> Trainer:
    """A trainer on the 8 training frames, with augmentation."""
    dataset = KittiDataset(scenes, "train", height=64, augmentation=Augmentation())
    return Trainer(
        ToyModel() if model is None else model,
        dataset,
        settings(**options),
        Path(out),
        device,
        fingerprint={"model": {"name": "toy", "post_nms_top_n": 3}},
        image_size=(224, 64),
        quiet=True,
        validation=validation,
        extend=extend,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
