"""Small networks, images and boxes for the tests of the distiller."""

from typing import Any

import torch
from torch import Tensor, nn

SIZE = (32, 48)
BOXES = [torch.tensor([[2.0, 3.0, 40.0, 14.0]]), torch.tensor([[0.0, 0.0, 32.0, 16.0], [30.0, 12.0, 46.0, 30.0]])]
ROWS = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], dim=1) for i, b in enumerate(BOXES)])


def images(count: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A convolution with batch normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, stride, stride=stride)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Head(nn.Module):
    """Takes all maps in a list, as a YOLO's Detect does; class logits by one convolution a level."""

    def __init__(self, channels: tuple[int, ...], classes: int = 2) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(c, classes, 1) for c in channels)
        self.runs = 0

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return [layer(feature) for layer, feature in zip(self.scores, maps, strict=True)]


class Network(nn.Module):
    """A detector in small: maps of strides 4, 8, 16, whose numbers of channels differ, then a head."""

    def __init__(self, channels: tuple[int, ...] = (4, 6, 8), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        inputs = (3, *channels[:-1])
        self.stages = nn.ModuleList(
            Block(i, o, 4 if n == 0 else 2) for n, (i, o) in enumerate(zip(inputs, channels, strict=True))
        )
        self.head = Head(channels)

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Any:
        return {"boxes": self.head(self.features(x))}


STAGES = ["stages.0", "stages.1", "stages.2"]


def same_state(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
