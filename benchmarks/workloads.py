"""The workloads that performance is measured on: 512×1760 images, strides 4 to 32, C = 256, expert frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRIDES = (4, 8, 16, 32)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Workload:
    """Sizes of one workload.

    Attributes:
        batch: Images.
        boxes_per_image: Boxes in each of them.
        output_size: Bins along each axis.
        kind: ``"proposals"`` (jittered copies of 6 objects an image), ``"objects"`` (objects alone) or ``"uniform"``
            (random, up to the whole image).
        channels: Channels of all maps.
        height: Image height, pixels.
        width: Image width, pixels.
        sampling_ratio: Samples per bin and axis.
    """

    batch: int
    boxes_per_image: int
    output_size: int
    kind: str
    channels: int = 256
    height: int = 512
    width: int = 1760
    sampling_ratio: int = 2

    @property
    def boxes(self) -> int:
        """Boxes of the whole batch."""
        return self.batch * self.boxes_per_image


WORKLOADS = {
    "train": Workload(2, 128, 7, "proposals"),
    "train19": Workload(2, 128, 19, "proposals"),
    "gt": Workload(2, 8, 7, "objects"),
    "large": Workload(2, 128, 7, "uniform"),
    "batch8": Workload(8, 128, 7, "proposals"),
}


def draw_objects(count: int, workload: Workload, generator: torch.Generator) -> Tensor:
    """Draw ground-truth-like boxes ``[count, 4]``: 25 to 250 px high, width over height 0.4 to 2.5 (log-uniform)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    height = uniform(25.0, 250.0)
    ratio = torch.exp(uniform(0.0, 1.0) * (torch.tensor(2.5).log() - torch.tensor(0.4).log()) + torch.tensor(0.4).log())
    width = height * ratio
    x = uniform(0.0, 1.0) * (workload.width - width).clamp(min=0)
    y = uniform(0.0, 1.0) * (workload.height - height).clamp(min=0)
    return torch.stack([x, y, x + width, y + height], dim=1)


def draw_boxes(workload: Workload, generator: torch.Generator) -> Tensor:
    """Draw the boxes ``[K, 5]`` of a workload, float32 on the CPU."""
    rows = []
    for image in range(workload.batch):
        count = workload.boxes_per_image
        if workload.kind == "objects":
            boxes = draw_objects(count, workload, generator)
        elif workload.kind == "proposals":
            objects = draw_objects(6, workload, generator)
            copies = objects[torch.arange(count) % 6]
            size = copies[:, 2:] - copies[:, :2]
            noise = torch.randn(count, 4, generator=generator, dtype=torch.float64).clamp(-2.5, 2.5)
            centre = (copies[:, :2] + copies[:, 2:]) / 2 + 0.1 * noise[:, :2] * size
            size = size * torch.exp(0.15 * noise[:, 2:])
            boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
        else:
            extent = torch.tensor([workload.width, workload.height], dtype=torch.float64)
            corners = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * extent
            boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
        rows.append(torch.cat([torch.full((count, 1), float(image), dtype=torch.float64), boxes], dim=1))
    return torch.cat(rows).float()


@dataclass
class Inputs:
    """Tensors of one measurement: the apprentice's maps want gradients, the expert's do not."""

    apprentice: list[Tensor]
    expert: list[Tensor]
    boxes: Tensor


def make_inputs(workload: Workload, dtype: torch.dtype, layout: str, device: str, seed: int = 0) -> Inputs:
    """Make random maps and boxes of a workload."""
    generator = torch.Generator().manual_seed(seed)
    boxes = draw_boxes(workload, generator).to(device)
    networks = []
    for _ in range(2):
        maps = []
        for stride in STRIDES:
            shape = (
                workload.batch,
                workload.channels,
                -(-workload.height // stride),
                -(-workload.width // stride),
            )
            feature = torch.randn(shape, generator=generator).to(device, dtype)
            maps.append(feature.contiguous(memory_format=LAYOUTS[layout]))
        networks.append(maps)
    return Inputs([m.requires_grad_() for m in networks[0]], networks[1], boxes)
