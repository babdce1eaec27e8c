"""The floor: bytes that any implementation must move, and how fast this machine copies.

Counted are the cells of each map that some box's RoIAlign weighs, read once, and the gradient maps, which are
dense and written once whatever the boxes. Cells are counted singly although memory comes in cache lines:
where the channels do not lie together (NCHW), more must be read in truth, and the floor cannot be reached.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.workloads import DTYPES, STRIDES, Workload
from rakd_ops import level_weights
from rakd_ops.reference import axis_matrix

CPU_COPY_MIB = 256
CUDA_COPY_MIB = 1024
COPY_REPEATS = 9


@dataclass(frozen=True)
class FloorBytes:
    """Bytes that must move.

    Attributes:
        forward: To compute the op's output.
        training: To compute output and gradients (forward + backward).
    """

    forward: int
    training: int


def touched_cells(boxes: Tensor, stride: int, workload: Workload) -> int:
    """Count the cells of one level's map that the RoIAlign of at least one box weighs.

    Args:
        boxes: ``[K, 5]``, the boxes pooled from this level.
        stride: The level's stride.
        workload: Sizes.

    Returns:
        Cells, over all images; channels are not counted.
    """
    height, width = workload.map_size(stride)
    boxes = boxes.detach().cpu().double()
    bins, samples = workload.output_size, workload.sampling_ratio
    rows = (axis_matrix(boxes[:, 2], boxes[:, 4], stride, height, bins, samples) != 0).any(dim=1)
    columns = (axis_matrix(boxes[:, 1], boxes[:, 3], stride, width, bins, samples) != 0).any(dim=1)
    total = 0
    for image in range(workload.batch):
        here = boxes[:, 0] == image
        boxes_on_cell = rows[here].float().T @ columns[here].float()
        total += int((boxes_on_cell > 0).sum())
    return total


def count_distill_bytes(boxes: Tensor, workload: Workload, dtype: str) -> FloorBytes:
    """Count for the distillation loss: cells of both networks read; the apprentice's gradient written."""
    cell_bytes = workload.channels * DTYPES[dtype].itemsize
    read = 2 * sum(touched_cells(boxes, stride, workload) for stride in STRIDES) * cell_bytes
    return FloorBytes(read, read + _dense_cells(workload) * cell_bytes)


def count_align_bytes(boxes: Tensor, workload: Workload, dtype: str) -> FloorBytes:
    """Count for pooling: cells read, output written; then its gradient read, the maps' gradients written."""
    cell_bytes = workload.channels * DTYPES[dtype].itemsize
    chosen = level_weights(boxes, strides=STRIDES, assignment="hard") > 0
    cells = sum(touched_cells(boxes[chosen[:, level]], stride, workload) for level, stride in enumerate(STRIDES))
    output = workload.boxes * workload.output_size**2 * cell_bytes
    forward = cells * cell_bytes + output
    return FloorBytes(forward, forward + output + _dense_cells(workload) * cell_bytes)


COUNT_BYTES = {"distill": count_distill_bytes, "align": count_align_bytes}


def _dense_cells(workload: Workload) -> int:
    sizes = (workload.map_size(stride) for stride in STRIDES)
    return workload.batch * sum(height * width for height, width in sizes)


def measure_copy_bandwidth(device: str, mib: int | None = None) -> float:
    """Measure how fast torch copies a large buffer into another, both already touched.

    Args:
        device: A torch device.
        mib: Size of each buffer; default fits the device.

    Returns:
        Bytes read and written per second, median of several copies.
    """
    cuda = torch.device(device).type == "cuda"
    count = (mib or (CUDA_COPY_MIB if cuda else CPU_COPY_MIB)) * 2**20 // 4
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)
    target.copy_(source)
    seconds = []
    for _ in range(COPY_REPEATS):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * count / sorted(seconds)[COPY_REPEATS // 2]
