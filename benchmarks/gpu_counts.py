"""What the designs of the CUDA loss load and compute, counted exactly from boxes; ``gpu_design`` makes times of it.

Designs, each with one owner for every element of the gradient:

- ``pooled`` (csrc/cuda/pool.cuh, spread.cuh): pooled differences go through the workspace to a second launch.
- ``gram`` (csrc/cuda/gram.cuh): per box, ``G_y S G_x`` on a tile's cells, with the Gram matrices ``G = R^T R`` of
  either axis and the difference ``S`` of the maps staged in shared memory.
- ``assembled`` (not built): per tile, the sum over boxes of ``G_y`` times ``G_x``, made once for all channels.

Instructions are those of the inner loops as ptxas makes them for sm_90 (float32), read off once by ``cuobjdump -sass``,
times the loops' counts; they are good to a few tens of percent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import STRIDES, Workload

# csrc/cuda: channels of a slab, rows and columns of a tile, bins of x mixed between barriers and at once, bins of y in
# the stage, threads of a pooling block, and the number of pooling blocks beyond which each takes more channels.
ASSEMBLED_SLAB = 16  # of the form that is not built
SLAB, TILE_ROWS, TILE_COLUMNS, MIX_BINS, MIXED_AT_ONCE, STAGE_BINS, POOL_THREADS = 32, 8, 32, 16, 4, 8, 128
ENOUGH_BLOCKS = 4096
# Of the Gram form: channels, rows and columns of a tile, threads, cells that fit the stage (float32), cells around the
# tile that are staged where not all fit, and bins from which it is chosen.
GRAM_SLAB, GRAM_ROWS, GRAM_COLUMNS, GRAM_THREADS, STAGE_CELLS, HALO, GRAM_BINS = 32, 8, 16, 128, 321, 3, 256

# Instructions of a warp: of a tap of a row's sum (up to four of them), of such a sum, of a tap of a bin, of a bin, of
# writing 32 pooled values; of four bins of x mixed together, of each bin of y that they are mixed from; where those are
# more than two, of each bin of x and of each further bin of y; of a row of a box in a tile, of each bin of x that feeds
# a cell, and more from the third on.
TAP, ROW_SUM, BIN_TAP, BIN, STORE, MIX, MIX_BIN, MIX_MANY, MIX_FURTHER = 8, 17, 14, 35, 16, 14, 9, 58, 35
SPREAD_ROW, SPREAD_BIN, SPREAD_FURTHER = 85, 57, 50
# Of a needed row of a piece, of a cell of the widest band; of making a piece, of a warp's beginning with it; of 32
# staged quads; of a quad that is loaded because it is not staged.
GRAM_ROW, GRAM_CELL, MAKE_PIECE, TAKE_PIECE, STAGE, DIRECT_CELL = 55, 9, 500, 100, 80, 80


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


@dataclass
class Work:
    """Sums over levels and images of one design.

    Attributes:
        loads: From the maps and the workspace, of one channel.
        shared: From shared memory, of one channel; what all of a warp's threads load from one place does not count.
        multiply_adds: And subtractions of maps, of one channel.
        once: Multiply-adds that are not a channel's.
        warps: Instructions of warps, of all channels; 0: not built.
        largest_stage: Cells that a tile needs.
        entries: Of assembled operators.
    """

    loads: int = 0
    shared: int = 0
    multiply_adds: int = 0
    once: int = 0
    warps: float = 0.0
    largest_stage: int = 0
    entries: int = 0


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


def in_tiles(cells: Tensor, tile: int) -> Tensor:
    """``[..., cells]`` as ``[..., tiles, tile]``, zeros added."""
    padded = torch.nn.functional.pad(cells, (0, -cells.shape[-1] % tile))
    return padded.reshape(*cells.shape[:-1], -1, tile)


def count_pooled(workload: Workload, patches: list[Patches]) -> Shipped:
    """Count launches, blocks and barriers of a training step in the pooled form, as launch.h divides the work."""
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
        bins_of_tile = in_tiles(patch.x, TILE_COLUMNS).any(-1).sum(1)  # [K, tiles]
        mixed = -(-bins_of_tile // MIX_BINS)
        warp_barriers += int((patch.y.any(1).sum(-1) * mixed.sum(-1)).sum()) * 2 * slabs
    return Shipped(2, entries * groups + (tiles + 1) * slabs, barriers, warp_barriers)


def count_gram(workload: Workload, patches: list[Patches]) -> Shipped:
    """The same in the Gram form, as launch_gram.h divides the work; for a sampling ratio of at most 2."""
    entries, slabs = workload.boxes * len(STRIDES), -(-workload.channels // GRAM_SLAB)
    sizes = [workload.map_size(stride) for stride in STRIDES]
    tiles = workload.batch * sum(-(-height // GRAM_ROWS) * -(-width // GRAM_COLUMNS) for height, width in sizes)
    pieces = batches = 0
    for number, patch in enumerate(patches):
        meets = _meetings(patch).reshape(workload.boxes_per_image, -1).long()
        pieces += int(meets.sum())
        first = number % workload.batch * workload.boxes_per_image
        for found in _rounds(meets, first, GRAM_THREADS):
            batches += int((-(-found // (GRAM_THREADS // 32))).sum())
    # Two around each round's list, two around each batch of pieces, two of the block's loss, two of the last block's.
    barriers = slabs * (tiles * (2 * -(-workload.boxes // GRAM_THREADS) + 2) + 2 * batches) + 2
    return Shipped(2, entries + tiles * slabs, 3 * entries + barriers, pieces * slabs)


def _meetings(patch: Patches) -> Tensor:
    """``[K, tiles of y, tiles of x]`` bool: which tiles of the Gram form each box touches."""
    rows, columns = in_tiles(patch.y.any(1), GRAM_ROWS).any(-1), in_tiles(patch.x.any(1), GRAM_COLUMNS).any(-1)
    return rows[:, :, None] & columns[:, None, :]


def _rounds(meets: Tensor, first: int, size: int) -> list[Tensor]:
    """Sums over the boxes of each round of candidates; ``meets[0]`` is of candidate ``first``."""
    padded = torch.nn.functional.pad(meets, (0, 0, first, 0))
    return [padded[begin : begin + size].sum(0) for begin in range(0, len(padded), size)]


def pooled_work(workload: Workload, patches: list[Patches]) -> Work:
    """Count the pooled form."""
    work, bins = Work(), workload.output_size
    channels, slabs = workload.channels, -(-workload.channels // SLAB)
    columns = min(POOL_THREADS // SLAB, bins)
    idle = -(-bins // columns) * columns / bins  # of the pooling threads' columns, the last ones may be no bins
    for patch in patches:
        rows, taps_y, taps_x = patch.y.any(1).sum(-1), patch.y.sum((1, 2)), patch.x.sum((1, 2))
        bins_of_tile = in_tiles(patch.x, TILE_COLUMNS).any(-1).sum(1)
        mixed = taps_y * bins_of_tile.sum(-1)
        work.loads += int((2 * rows * taps_x + mixed).sum())
        work.shared += int((rows * taps_x).sum())
        pooling = 2 * rows * taps_x + taps_y * bins
        work.multiply_adds += int((pooling + mixed + rows * taps_x).sum())
        pool = rows * (TAP * taps_x + ROW_SUM * bins) + BIN_TAP * taps_y * bins + (BIN + STORE) * bins**2
        work.warps += float(pool.sum()) * channels / 32 * idle
        of_row, many = patch.y.sum(1), patch.y.sum(1) > 2  # [K, H]: bins that feed it
        few = (MIX_BIN * of_row + MIX * (of_row > 0)) * ~many
        mix = (-(-bins_of_tile // MIXED_AT_ONCE)).sum(-1) * few.sum(-1)
        mix += bins_of_tile.sum(-1) * (many * (MIX_MANY + MIX_FURTHER * (of_row - 2))).sum(-1)
        most = in_tiles(patch.x.sum(1), TILE_COLUMNS).amax(-1)
        further = SPREAD_FURTHER * (most - 2).clamp(min=0)
        spread = rows * (SPREAD_ROW * (most > 0) + SPREAD_BIN * most + further).sum(-1)
        work.warps += float((mix + spread).sum()) * slabs
    return work


def _couplings(axis: Tensor) -> Tensor:
    """``[K, cells, cells]`` bool: which cells share a bin, from ``[K, bins, cells]``."""
    weights = axis.float()
    return weights.transpose(1, 2) @ weights > 0


def _ends(cells: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last set of ``[K, cells, tiles]``; for none, the first is past the last."""
    place = torch.arange(cells.shape[1])[None, :, None]
    return torch.where(cells, place, cells.shape[1]).amin(1), torch.where(cells, place + 1, 0).amax(1)


def gram_work(workload: Workload, patches: list[Patches]) -> Work:
    """Count the Gram form as built: what is staged, what a box needs beyond that, and the passes of each piece."""
    work, warps = Work(), GRAM_THREADS // 32
    slabs, loaded = -(-workload.channels // GRAM_SLAB), 0
    for patch in patches:
        gram_y, gram_x = _couplings(patch.y), _couplings(patch.x)
        band_y, band_x = (
            in_tiles(gram_y, GRAM_ROWS).any(-1),
            in_tiles(gram_x, GRAM_COLUMNS).any(-1),
        )  # [K, cells, tiles]
        needed = band_y.sum(1)[:, :, None]
        passes = needed * in_tiles(gram_x, GRAM_COLUMNS).sum((1, 3))[:, None, :]  # multiply-adds along x
        widest = in_tiles(gram_x.sum(1), GRAM_COLUMNS).amax(-1)[:, None, :]
        columns = in_tiles(patch.x.any(1), GRAM_COLUMNS).sum(-1)[:, None, :]
        meets = _meetings(patch)
        work.multiply_adds += int((passes + in_tiles(gram_y, GRAM_ROWS).sum((1, 3))[:, :, None] * columns).sum())
        top, bottom = _ends(band_y)
        left, right = _ends(band_x)
        for y, x in meets.any(0).nonzero().tolist():
            boxes = meets[:, y, x]
            ends = (top[boxes, y], left[boxes, x], bottom[boxes, y], right[boxes, x])
            held = [int(ends[0].min()), int(ends[1].min()), int(ends[2].max()), int(ends[3].max())]
            work.largest_stage = max(work.largest_stage, (held[2] - held[0]) * (held[3] - held[1]))
            if (held[2] - held[0]) * (held[3] - held[1]) > STAGE_CELLS:
                corner = (y * GRAM_ROWS, x * GRAM_COLUMNS)
                held[:2] = [max(h, c - HALO) for h, c in zip(held[:2], corner, strict=True)]
                sizes = (GRAM_ROWS, GRAM_COLUMNS)
                held[2:] = [min(h, c + s + HALO) for h, c, s in zip(held[2:], corner, sizes, strict=True)]
            staged = (ends[0] >= held[0]) & (ends[1] >= held[1]) & (ends[2] <= held[2]) & (ends[3] <= held[3])
            cells, of_boxes = (held[2] - held[0]) * (held[3] - held[1]), passes[boxes, y, x]
            direct, slots = int(of_boxes[~staged].sum()), widest[boxes, 0, x]
            loaded += cells
            work.loads += 2 * (cells + direct)
            work.shared += int(of_boxes[staged].sum())
            work.multiply_adds += cells + direct
            rows = needed[boxes, y, 0]
            inner = rows * (GRAM_ROW + slots * torch.where(staged, GRAM_CELL, DIRECT_CELL))
            work.warps += slabs * float(warps * inner.sum() + len(rows) * (MAKE_PIECE + warps * TAKE_PIECE))
    work.warps += slabs * loaded * (GRAM_SLAB // 4) / 32 * STAGE
    return work


def assembled_work(patches: list[Patches]) -> Work:
    """Count a form that assembles each tile's operator, on the pooled form's tiles."""
    work = Work()
    for patch in patches:
        gram_y, gram_x = _couplings(patch.y), _couplings(patch.x)
        # [K, tiles, cells]: what the box's cells in a tile are coupled with.
        band_y = in_tiles(gram_y, TILE_ROWS).any(-1).transpose(1, 2)
        flat_x = in_tiles(gram_x, TILE_COLUMNS).any(-1).transpose(1, 2).flatten(1).float()
        for tile in range(band_y.shape[1]):
            needed = (band_y[:, tile].float().T @ flat_x > 0).reshape(gram_y.shape[2], -1, gram_x.shape[2])
            of_tile = needed.sum((0, 2))
            # Both maps are loaded, and the difference is taken, once a tile.
            work.loads += 2 * int(of_tile.sum())
            work.multiply_adds += int(of_tile.sum())
            work.largest_stage = max(work.largest_stage, int(of_tile.max()))
        codes = []
        for of_y, of_x in zip(gram_y.flatten(1).numpy(), gram_x.flatten(1).numpy(), strict=True):
            pairs_y, pairs_x = np.flatnonzero(of_y), np.flatnonzero(of_x)
            codes.append((pairs_y[:, None] * of_x.size + pairs_x).ravel())
        entries = np.unique(np.concatenate(codes)).size
        work.once += sum(len(code) for code in codes)
        work.entries += entries
        work.shared += entries
        work.multiply_adds += entries
    return work


def touched(patches: list[Patches]) -> tuple[int, int]:
    """Cells that some box touches, and 32-byte sectors of one channel's float32 plane that hold them."""
    cells = sectors = 0
    for patch in patches:
        mask = patch.y.any(1).float().T @ patch.x.any(1).float() > 0
        cells += int(mask.sum())
        sectors += int(in_tiles(mask.flatten(), 8).any(-1).sum())
    return cells, sectors


def band_bytes(workload: Workload) -> int:
    """Bytes of the Gram form's workspace in float32: touched cells and bands, by capacity (csrc/gram_table.h)."""
    total = 0
    for size in (workload.map_size(stride) for stride in STRIDES):
        for cells in size:
            most = min(2 * workload.sampling_ratio * workload.output_size, cells)
            total += 4 * (1 + 3 * most + most * min(4 * workload.sampling_ratio - 1, most))
    return total * workload.boxes
