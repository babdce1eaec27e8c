"""The workloads that performance is measured on, and the bytes that each must move.

Images of 512×1760, strides 4 to 32, C = 256, expert frozen. Bytes: the cells of each map that some box's RoIAlign
weighs, read once, and the gradient maps, which are dense and written once whatever the boxes. Cells are counted singly
although memory comes in cache lines: where the channels do not lie together (NCHW), more must be read in truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rakd_ops import level_weights
from rakd_ops.reference import axis_matrix

STRIDES = (4, 8, 16, 32)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORWARD, TRAINING = PASSES = ("forward", "forward+backward")

OBJECTS_PER_IMAGE = 6  # that proposals gather around
OBJECT_HEIGHTS = (25.0, 250.0)  # pixels
OBJECT_ASPECTS = (0.4, 2.5)  # width over height
CENTRE_JITTER = 0.1  # of a proposal's centre, in units of its object's size
SIZE_JITTER = 0.15  # of the logarithm of a proposal's sides
MAX_JITTER = 2.5  # standard deviations


@dataclass(frozen=True)
class Workload:
    """Sizes of one workload.

    Kinds of boxes: ``"proposals"`` (jittered copies of 6 objects an image), ``"objects"`` (objects alone) or
    ``"uniform"`` (random, up to the whole image).
    """

    batch: int  # images
    boxes_per_image: int
    output_size: int  # bins along each axis
    kind: str
    channels: int = 256  # of all maps
    height: int = 512  # of the images, pixels
    width: int = 1760
    sampling_ratio: int = 2  # samples per bin and axis

    @property
    def boxes(self) -> int:
        """Boxes of the whole batch."""
        return self.batch * self.boxes_per_image

    def map_size(self, stride: int) -> tuple[int, int]:
        """Height and width, in cells, of the map of a stride."""
        return -(-self.height // stride), -(-self.width // stride)


DISTILL_WORKLOADS = {
    "train": Workload(2, 128, 7, "proposals"),
    "train19": Workload(2, 128, 19, "proposals"),
    "gt": Workload(2, 8, 7, "objects"),
    "large": Workload(2, 128, 7, "uniform"),
    "batch8": Workload(8, 128, 7, "proposals"),
}
ALIGN_WORKLOADS = {
    "pool": Workload(2, 500, 7, "proposals"),
    "pool14": Workload(2, 500, 14, "proposals"),
}
WORKLOADS = {"distill": DISTILL_WORKLOADS, "align": ALIGN_WORKLOADS}

SCALING = "scaling-"  # begins the names of workloads that vary one size of BASE
BASE = DISTILL_WORKLOADS["train"]
# More bins and samples also read more of the cells that boxes cover. The dense axes vary them where all of these are
# read from the first point on: bins with adaptive sampling, and samples of small bins.
AXES = {
    "boxes": [replace(BASE, boxes_per_image=value) for value in (4, 16, 64, 128, 256, 512)],
    "bins": [replace(BASE, output_size=value) for value in (3, 7, 14, 19, 28)],
    "dense-bins": [replace(BASE, output_size=value, sampling_ratio=0) for value in (3, 7, 14, 19, 28)],
    "samples": [replace(BASE, sampling_ratio=value) for value in (1, 2, 3, 4, 8)],
    "dense-samples": [replace(BASE, output_size=28, sampling_ratio=value) for value in (2, 3, 4, 8)],
    "channels": [replace(BASE, channels=value) for value in (32, 64, 128, 256, 512)],
    "image": [replace(BASE, height=n, width=n * BASE.width // BASE.height) for n in (256, 384, 512, 768, 1024)],
    "threads": [BASE],  # varies torch's threads instead
}


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def draw_objects(count: int, workload: Workload, generator: torch.Generator) -> Tensor:
    """Draw ground-truth-like boxes ``[count, 4]``: heights uniform, aspect ratios log-uniform.

    A box too large for the image, which only small test images meet, is scaled to fit.
    """
    height = _uniform(count, *OBJECT_HEIGHTS, generator)
    low, high = map(math.log, OBJECT_ASPECTS)
    width = height * _uniform(count, low, high, generator).exp()
    fit = torch.minimum(workload.width / width, workload.height / height).clamp(max=1.0)
    width, height = width * fit, height * fit
    x = _uniform(count, 0.0, 1.0, generator) * (workload.width - width)
    y = _uniform(count, 0.0, 1.0, generator) * (workload.height - height)
    return torch.stack([x, y, x + width, y + height], dim=1)


def draw_proposals(count: int, workload: Workload, generator: torch.Generator) -> Tensor:
    """Draw boxes ``[count, 4]`` jittered around a few objects; as a detector's, they may leave the image."""
    return jitter_boxes(draw_objects(OBJECTS_PER_IMAGE, workload, generator), count, generator)


def jitter_boxes(objects: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw boxes ``[count, 4]``, float64, around objects ``[N, 4]``, N > 0: each in turn, moved and resized."""
    copies = objects.double()[torch.arange(count) % len(objects)]
    noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    noise = noise.clamp(-MAX_JITTER, MAX_JITTER)
    size = copies[:, 2:] - copies[:, :2]
    centre = (copies[:, :2] + copies[:, 2:]) / 2 + CENTRE_JITTER * noise[:, :2] * size
    size = size * torch.exp(SIZE_JITTER * noise[:, 2:])
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def draw_uniform(count: int, workload: Workload, generator: torch.Generator) -> Tensor:
    """Draw boxes ``[count, 4]`` between two points anywhere in the image."""
    extent = torch.tensor([workload.width, workload.height], dtype=torch.float64)
    corners = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * extent
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)


_DRAW = {"objects": draw_objects, "proposals": draw_proposals, "uniform": draw_uniform}


def draw_boxes(workload: Workload, generator: torch.Generator) -> Tensor:
    """Draw the boxes ``[K, 5]`` of a workload: ``(image, x1, y1, x2, y2)``, float32 on the CPU."""
    rows = []
    for image in range(workload.batch):
        boxes = _DRAW[workload.kind](workload.boxes_per_image, workload, generator)
        rows.append(torch.cat([torch.full((boxes.shape[0], 1), float(image), dtype=torch.float64), boxes], dim=1))
    return torch.cat(rows).float()


@dataclass
class Inputs:
    """Tensors of one measurement: the apprentice's maps want gradients, the expert's do not."""

    apprentice: list[Tensor]  # [B, C, H_l, W_l]
    expert: list[Tensor]  # the same; empty where pooling alone is measured
    boxes: Tensor  # [K, 5], grouped by image

    def box_list(self) -> list[Tensor]:
        """Return the boxes as most trainers have them: ``[K_b, 4]`` per image."""
        images = self.apprentice[0].shape[0]
        return [self.boxes[self.boxes[:, 0] == image, 1:].contiguous() for image in range(images)]


def make_inputs(workload: Workload, dtype: str, layout: str, device: str, seed: int, networks: int = 2) -> Inputs:
    """Make random maps and boxes of a workload, on a device; with 1 network there is no expert."""
    generator = torch.Generator().manual_seed(seed)
    boxes = draw_boxes(workload, generator).to(device)

    def draw(stride: int) -> Tensor:
        shape = (workload.batch, workload.channels, *workload.map_size(stride))
        feature = torch.randn(shape, generator=generator).to(device, DTYPES[dtype])
        return feature.contiguous(memory_format=LAYOUTS[layout])

    apprentice = [draw(stride).requires_grad_() for stride in STRIDES]
    return Inputs(apprentice, [draw(stride) for stride in STRIDES] if networks == 2 else [], boxes)


def support_cells(boxes: Tensor, stride: int, workload: Workload) -> int:
    """Count the cells, over all images, of one level's map that the RoIAlign of at least one of the boxes weighs."""
    boxes = boxes.detach().cpu().double()
    rows, columns = (
        (axis_matrix(low, high, stride, side, workload.output_size, workload.sampling_ratio) != 0).any(dim=1).float()
        for low, high, side in zip(
            (boxes[:, 2], boxes[:, 1]), (boxes[:, 4], boxes[:, 3]), workload.map_size(stride), strict=True
        )
    )
    total = 0
    for image in range(workload.batch):
        here = boxes[:, 0] == image
        total += int((rows[here].T @ columns[here] > 0).sum())
    return total


@dataclass(frozen=True)
class BoundBytes:
    """Bytes that any implementation must move."""

    forward: int  # to compute the op's output
    training: int  # to compute output and gradients


def count_bytes(op: str, boxes: Tensor, workload: Workload, dtype: str) -> BoundBytes:
    """Count the bytes that must move for boxes ``[K, 5]``.

    ``"distill"``: cells of both networks read, the apprentice's gradient written. ``"align"``: cells read, output
    written; then its gradient read, the maps' gradients written.
    """
    cell = workload.channels * DTYPES[dtype].itemsize
    dense = workload.batch * sum(math.prod(workload.map_size(stride)) for stride in STRIDES) * cell
    if op == "distill":
        read = 2 * sum(support_cells(boxes, stride, workload) for stride in STRIDES) * cell
        return BoundBytes(read, read + dense)
    chosen = level_weights(boxes, strides=STRIDES, assignment="hard") > 0
    cells = sum(support_cells(boxes[chosen[:, level]], stride, workload) for level, stride in enumerate(STRIDES))
    output = workload.boxes * workload.output_size**2 * cell
    forward = cells * cell + output
    return BoundBytes(forward, forward + output + dense)
