"""``python -m benchmarks.gpu_design``: what three designs of the CUDA loss would move and compute; needs no GPU.

A model, not a measurement. Launches, bytes and multiply-adds of one training step (float32, channels-first, expert
without gradient) are counted exactly from the boxes of each workload, and turned into times that no kernel can beat if
the assumptions of ``Machine`` hold. Designs, each with one owner for every element of the gradient:

- ``pooled`` (shipped, csrc/cuda): pooled differences go through the workspace to a second launch.
- ``factors``: per box, ``G_y S G_x`` on the box's cells, with the Gram factors ``G = R^T R`` of either axis.
- ``assembled``: per tile, the sum over boxes of ``G_y`` times ``G_x``, made once and applied to all channels.

The Gram forms keep nothing between pixels' loads and the gradient, but a tile needs the cells that its own share a bin
with. Prints a table and writes it as CSV; docs/gpu_design.md reads it.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor
from tyro.conf import arg

from benchmarks.workloads import DISTILL_WORKLOADS, STRIDES, Workload, draw_boxes
from rakd.files import write_text

# csrc/cuda: channels of a slab, rows and columns of a tile, bins of x mixed at a time, bins of y in the stage, threads
# of a pooling block, and the number of pooling blocks beyond which each takes more channels.
SLAB, TILE_ROWS, TILE_COLUMNS, MIX_BINS, STAGE_BINS, POOL_THREADS, ENOUGH_BLOCKS = 16, 8, 32, 16, 8, 128, 4096
BYTES = 4  # of a float32
SECTOR_BYTES = 32  # the least that a GPU reads from memory


@dataclass(frozen=True)
class Machine:
    """What is assumed of an H200: others have measured the copy rate, the rest are round or nominal figures.

    Attributes:
        copy: Bytes a second from and to memory, read and written.
        cache: Bytes a second from the L2 cache.
        load: Bytes a second that all threads load at most, from the L1 caches (128 a clock and processor).
        multiply_add: float32 multiply-adds a second (128 a clock and processor).
        cache_bytes: Of the L2 cache: a workspace that is smaller is taken to stay there.
        launch: Seconds that a launch adds.
    """

    copy: float = 4.3e12
    cache: float = 5.5e12
    load: float = 132 * 128 * 1.755e9
    multiply_add: float = 132 * 128 * 1.755e9
    cache_bytes: float = 50e6
    launch: float = 2.5e-6


@dataclass(frozen=True)
class Patches:
    """Which cells the boxes of one image touch on one level.

    Attributes:
        y: ``[K, P, H]`` bool, whether a bin reads a row.
        x: ``[K, P, W]`` bool, whether a bin reads a column.
    """

    y: Tensor
    x: Tensor


@dataclass(frozen=True)
class Shipped:
    """Counts of the shipped kernels that the emulator counts as well (tests/emulator/test_design.py)."""

    launches: int
    blocks: int
    barriers: int
    warp_barriers: int


@dataclass(frozen=True)
class Row:
    """One design on one workload.

    Attributes:
        workload: Its name.
        design: ``"pooled"``, ``"factors"`` or ``"assembled"``.
        launches: Of a training step.
        map_mb: Read from both networks' maps: distinct 32-byte sectors that boxes touch.
        gradient_mb: Written: the apprentice's dense gradient.
        workspace_mb: Pooled differences between the launches (written once, and read at least once).
        requested_mb: All loads of maps and workspace, wherever they are served from.
        giga_multiply_adds: Multiply-adds and subtractions of maps, and additions that assemble an operator.
        largest_stage_kb: For the Gram forms, both networks' difference on the cells that one tile needs, one slab.
        entries: For ``assembled``, of its operator per cell that boxes touch.
        memory_us: Time of what must come from or go to memory.
        cache_us: Time of the rest through L2, or of all loads through L1 if that is more.
        compute_us: Time of the multiply-adds.
        bound_us: The largest of the three, and the launches.
    """

    workload: str
    design: str
    launches: int
    map_mb: float
    gradient_mb: float
    workspace_mb: float
    requested_mb: float
    giga_multiply_adds: float
    largest_stage_kb: float
    entries: float
    memory_us: float
    cache_us: float
    compute_us: float
    bound_us: float


def touches(low: Tensor, high: Tensor, stride: float, size: int, bins: int, samples: int) -> Tensor:
    """Which cells the bins of RoIAlign read along one axis, those of weight zero included (``reference.axis_matrix``).

    Args:
        low: ``[K]`` float64, the boxes' lower ends in pixels.
        high: ``[K]`` float64, the boxes' upper ends in pixels.
        stride: Pixels per cell.
        size: Cells of the map along this axis.
        bins: Output bins along this axis.
        samples: Per bin, at least 1.

    Returns:
        ``[K, bins, size]`` bool.
    """
    start = low / stride - 0.5
    sample = (torch.arange(bins * samples, dtype=low.dtype) + 0.5) / (bins * samples)
    position = start[:, None] + sample * ((high - low) / stride)[:, None]  # [K, bins * samples]
    counts = (position >= -1.0) & (position <= size)
    lower = position.clamp(0.0, size - 1.0).floor().long()
    read = torch.zeros(low.shape[0], bins, size + 1, dtype=torch.bool)  # one cell more for samples that count nothing
    for cell in (lower, (lower + 1).clamp(max=size - 1)):
        read.scatter_(2, torch.where(counts, cell, size).reshape(-1, bins, samples), True)
    return read[:, :, :size]


def list_patches(workload: Workload, boxes: Tensor) -> list[Patches]:
    """The patches of all levels and images, level-major.

    Args:
        workload: Sizes.
        boxes: ``[K, 5]``.

    Returns:
        One for each level and image.
    """
    boxes = boxes.double()
    bins, ratio = workload.output_size, workload.sampling_ratio
    patches = []
    for stride in STRIDES:
        height, width = workload.map_size(stride)
        for image in range(workload.batch):
            here = boxes[boxes[:, 0] == image]
            y = touches(here[:, 2], here[:, 4], stride, height, bins, ratio)
            x = touches(here[:, 1], here[:, 3], stride, width, bins, ratio)
            patches.append(Patches(y, x))
    return patches


def _in_tiles(cells: Tensor, tile: int) -> Tensor:
    """``[..., cells]`` as ``[..., tiles, tile]``, zeros added."""
    padded = torch.nn.functional.pad(cells, (0, -cells.shape[-1] % tile))
    return padded.reshape(*cells.shape[:-1], -1, tile)


def count_shipped(workload: Workload, patches: list[Patches]) -> Shipped:
    """Count launches, blocks and barriers of a training step of csrc/cuda, as launch.h divides the work."""
    bins, slabs = workload.output_size, -(-workload.channels // SLAB)
    entries = workload.boxes * len(STRIDES)
    groups = min(max(ENOUGH_BLOCKS // entries, 1), slabs)
    groups = -(-slabs // -(-slabs // groups))
    columns = min(POOL_THREADS // SLAB, bins)
    # Three around the tables, one of the block's sum, two for each passage through the stage.
    barriers = entries * (4 * groups + 2 * slabs * -(-bins // columns) * -(-bins // STAGE_BINS))
    sizes = [workload.map_size(stride) for stride in STRIDES]
    tiles = workload.batch * sum(-(-height // TILE_ROWS) * -(-width // TILE_COLUMNS) for height, width in sizes)
    rounds = -(-workload.boxes // (32 * TILE_ROWS))
    barriers += tiles * slabs * 2 * rounds + 1  # the last one is of the block that adds the losses
    warp_barriers = 0
    for patch in patches:
        bins_of_tile = _in_tiles(patch.x, TILE_COLUMNS).any(-1).sum(1)  # [K, tiles]
        mixed = -(-bins_of_tile // MIX_BINS)
        warp_barriers += int((patch.y.any(1).sum(-1) * mixed.sum(-1)).sum()) * 2 * slabs
    return Shipped(2, entries * groups + (tiles + 1) * slabs, barriers, warp_barriers)


@dataclass
class _Work:
    """Sums over levels and images; loads and multiply-adds are a channel's."""

    loads: int = 0
    multiply_adds: int = 0
    once: int = 0  # multiply-adds that are not a channel's
    largest_stage: int = 0
    entries: int = 0


def _pooled(patches: list[Patches]) -> _Work:
    work = _Work()
    for patch in patches:
        rows, taps_y, taps_x = patch.y.any(1).sum(-1), patch.y.sum((1, 2)), patch.x.sum((1, 2))
        mixed = taps_y * _in_tiles(patch.x, TILE_COLUMNS).any(-1).sum((1, 2))
        work.loads += int((2 * rows * taps_x + mixed).sum())
        pooling = 2 * rows * taps_x + taps_y * patch.x.shape[1]
        work.multiply_adds += int((pooling + mixed + rows * taps_x).sum())
    return work


def _couplings(axis: Tensor) -> Tensor:
    """``[K, cells, cells]`` bool: which cells share a bin, from ``[K, bins, cells]``."""
    weights = axis.float()
    return weights.transpose(1, 2) @ weights > 0


def _gram(patches: list[Patches]) -> tuple[_Work, _Work]:
    """Count the forms with factors and with assembled operators."""
    factors, assembled = _Work(), _Work()
    for patch in patches:
        gram_y, gram_x = _couplings(patch.y), _couplings(patch.x)
        # [K, tiles, cells]: what the box's cells in a tile are coupled with.
        band_y = _in_tiles(gram_y, TILE_ROWS).any(-1).transpose(1, 2)
        band_x = _in_tiles(gram_x, TILE_COLUMNS).any(-1).transpose(1, 2)
        passes = band_y.sum((1, 2)) * gram_x.sum((1, 2))
        columns = _in_tiles(patch.x.any(1), TILE_COLUMNS).sum((1, 2))
        factors.multiply_adds += int((passes + gram_y.sum((1, 2)) * columns).sum())
        flat_x = band_x.flatten(1).float()
        staged = 0
        for tile in range(band_y.shape[1]):
            needed = (band_y[:, tile].float().T @ flat_x > 0).reshape(gram_y.shape[2], -1, gram_x.shape[2])
            of_tile = needed.sum((0, 2))
            staged += int(of_tile.sum())
            factors.largest_stage = max(factors.largest_stage, int(of_tile.max()))
        # Both maps are loaded, and the difference is taken, once a tile.
        factors.loads += 2 * staged
        factors.multiply_adds += staged
        assembled.loads += 2 * staged
        assembled.multiply_adds += staged
        codes = []
        for of_y, of_x in zip(gram_y.flatten(1).numpy(), gram_x.flatten(1).numpy(), strict=True):
            pairs_y, pairs_x = np.flatnonzero(of_y), np.flatnonzero(of_x)
            codes.append((pairs_y[:, None] * of_x.size + pairs_x).ravel())
        entries = np.unique(np.concatenate(codes)).size
        assembled.once += sum(len(code) for code in codes)
        assembled.entries += entries
        assembled.multiply_adds += entries
    assembled.largest_stage = factors.largest_stage
    return factors, assembled


def _touched(patches: list[Patches]) -> tuple[int, int]:
    """Cells that some box touches, and 32-byte sectors of one channel's plane that hold them."""
    cells = sectors = 0
    for patch in patches:
        mask = patch.y.any(1).float().T @ patch.x.any(1).float() > 0
        cells += int(mask.sum())
        sectors += int(_in_tiles(mask.flatten(), SECTOR_BYTES // BYTES).any(-1).sum())
    return cells, sectors


def model(name: str, workload: Workload, boxes: Tensor, machine: Machine) -> list[Row]:
    """Count the three designs on a workload.

    Args:
        name: The workload's name.
        workload: Its sizes.
        boxes: ``[K, 5]``.
        machine: Assumptions.

    Returns:
        A row for each design.
    """
    patches = list_patches(workload, boxes)
    cells, sectors = _touched(patches)
    maps = 2 * sectors * SECTOR_BYTES * workload.channels
    dense = workload.batch * sum(height * width for height, width in map(workload.map_size, STRIDES))
    gradient = dense * workload.channels * BYTES
    pooled_bytes = workload.boxes * len(STRIDES) * workload.output_size**2 * workload.channels * BYTES
    factors, assembled = _gram(patches)
    rows = []
    # The Gram forms need the losses of their tiles added by a second launch.
    for design, work, workspace in (
        ("pooled", _pooled(patches), pooled_bytes),
        ("factors", factors, 0),
        ("assembled", assembled, 0),
    ):
        requested = work.loads * workload.channels * BYTES
        operations = work.multiply_adds * workload.channels + work.once
        cached = workspace <= machine.cache_bytes
        memory = (maps + gradient + (0 if cached else 2 * workspace)) / machine.copy
        cache = max((2 * workspace if cached else 0) / machine.cache, requested / machine.load)
        compute = operations / machine.multiply_add
        rows.append(
            Row(
                name,
                design,
                2,
                maps / 1e6,
                gradient / 1e6,
                workspace / 1e6,
                requested / 1e6,
                operations / 1e9,
                work.largest_stage * SLAB * BYTES / 1e3,
                work.entries / cells,
                memory * 1e6,
                cache * 1e6,
                compute * 1e6,
                (max(memory, cache, compute) + 2 * machine.launch) * 1e6,
            )
        )
    return rows


def to_csv(rows: list[Row]) -> str:
    """The rows with a header, numbers to three decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in rows:
        writer.writerow([f"{value:.3f}" if isinstance(value, float) else value for value in astuple(row)])
    return text.getvalue()


def main(out: Annotated[Path, arg(metavar="CSV")] = Path("benchmarks/results/cuda_design.csv"), seed: int = 0) -> int:
    """Print and write the model of all workloads.

    Args:
        out: File to write.
        seed: Of the boxes.

    Returns:
        Exit code.
    """
    rows = []
    for name, workload in DISTILL_WORKLOADS.items():
        boxes = draw_boxes(workload, torch.Generator().manual_seed(seed))
        rows += model(name, workload, boxes, Machine())
        for row in rows[-3:]:
            print(
                f"{row.workload:8} {row.design:10} memory {row.memory_us:7.1f}  cache {row.cache_us:7.1f}  "
                f"compute {row.compute_us:7.1f}  bound {row.bound_us:7.1f} us",
                flush=True,
            )
    write_text(out, to_csv(rows))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
