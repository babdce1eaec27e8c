"""A small network with three maps, its training in Lightning, and noise to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class Pyramid(nn.Module):
    """Maps of strides 4, 8 and 16."""

    def __init__(self, channels: int, seed: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.stages = nn.ModuleList(
                nn.Conv2d(a, channels, s, stride=s) for a, s in ((3, 4), (channels, 2), (channels, 2))
            )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            images = stage(images).relu()
            maps.append(images)
        return maps


class Module(pl.LightningModule):
    """Notes its own losses, and those that are gone back from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = Pyramid(channels)
        self.head = nn.Conv2d(channels, 1, 1)
        self.seen: list[float] = []
        self.backwards: list[float] = []

    def loss(self, images: Tensor) -> Tensor:
        loss = (self.head(self.net(images)[0]) - images.mean()).square().mean() + 1
        self.seen.append(loss.item())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch[0])

    def on_before_backward(self, loss: Tensor) -> None:
        self.backwards.append(loss.item())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]


class Manual(Module):
    """The same by hand, with a second backward that distillation has nothing to do with."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        counted = len(self.backwards)
        self.manual_backward(0 * self.head.weight.sum())
        assert self.backwards.pop() == 0 and len(self.backwards) == counted
        optimizer.step()


def items(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Images of 64 × 64 pixels, each with one or two boxes."""
    generator = torch.Generator().manual_seed(5)
    boxes = [torch.tensor([[4.0, 6, 40, 50]]), torch.tensor([[0.0, 0, 20, 30], [30, 10, 60, 60]])]
    return [(torch.rand(3, 64, 64, generator=generator), boxes[i % 2]) for i in range(count)]


def collate(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    return torch.stack([image for image, _ in batch]), [boxes for _, boxes in batch]


def fit(module: pl.LightningModule, folder: Path, *, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Two epochs of three batches of two images, on the CPU; leaves ``last.ckpt``."""
    loader = torch.utils.data.DataLoader(items(), 2, collate_fn=collate)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    settings = {"max_epochs": 2, "default_root_dir": folder, "enable_checkpointing": False, **quiet, **options}
    trainer = pl.Trainer(**settings)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer
