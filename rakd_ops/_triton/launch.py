"""The ops on the host: checks that memory safety rests on, workspaces of static size, and the launches.

Signatures are those of ``rakd_ops/_schemas.py``. Block sizes are powers of two, as Triton wants; they bound
registers, not the shapes that are taken. Triton compiles a kernel anew for each combination of sizes and strides that
are 1 or multiples of 16, in about a second: images of many sizes cost some twenty compilations, which it keeps on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rakd_ops._layout import accumulation_dtype, empty_gradient, is_channels_last
from rakd_ops._triton import kernels, sampling

BIN_BLOCK = 8  # bins and channels that are pooled together
POOL_CHANNELS = 64
CELL_BLOCK = 64  # cells whose weights are summed at a time
GATHER_TILE = (4, 8)  # cells and channels of a gradient that one program owns
GATHER_CHANNELS = 64
BOX_BLOCK = 128  # boxes, or bins of one, that one step of a search looks at


class Pyramid(NamedTuple):
    """Maps as kernels take them. Pointers of one tuple share a dtype."""

    data: tuple[Tensor, ...]  # [L] of [B, C_l, H_l, W_l]
    strides: tuple[int, ...]  # [L * 4], in elements


class Tables(NamedTuple):
    """The factors ``R_y`` and ``R_x`` of all boxes on a pyramid's levels, a line per bin and axis."""

    spans: Tensor  # [2, L, K, lines] int32: the bin's cells, first and one past the last
    extents: Tensor  # [4, L, K] int32: the box's cells, y first, y end, x first, x end
    # [L, K, lines, taps] int32, where the bin spans more than taps = 2 * sampling_ratio cells: those that have a
    # weight, else -1. Its samples then lie more than two cells apart, so no two of them share a cell. taps is 0
    # where no bin needs such a list (adaptive sampling leaves no cell out).
    cells: Tensor
    weights: Tensor  # of each cell of a bin's span, at sampling.weight_row + cell; in the accumulation dtype
    sizes: tuple[int, ...]  # [L * 2] height and width of each level
    boxes: int  # K
    bins_y: int
    bins_x: int


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the current stream of the device that its tensors are on; an empty grid launches nothing.

    Raises:
        ValueError: The grid is beyond CUDA's limits, or its product beyond the 32 bits in which triton counts it.
    """
    if math.prod(grid) >= 2**31 or max(grid[1:], default=0) >= 2**16:
        raise ValueError(f"maps and boxes: expected fewer, for {kernel.__name__} would have the grid {grid}")
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device if tensor.is_cuda else -1):
        kernel[grid](*arguments, **options)


def check_prepared(rows: Tensor, index: Tensor, levels: int, batch: int) -> None:
    """Check the form of prepared boxes; their values may be anything."""
    count = rows.shape[0] if rows.dim() else 0
    for name, values, dtype, shape in (
        ("rows", rows, torch.float64, [count, 5 + levels]),
        ("index", index, torch.int32, [batch + 1 + count]),
    ):
        if values.dtype != dtype or list(values.shape) != shape or not values.is_contiguous():
            got = f"{values.dtype} {list(values.shape)} with strides {list(values.stride())}"
            raise ValueError(f"{name}: expected contiguous {dtype} {shape}, got {got}")
    if index.device != rows.device:
        raise ValueError(f"index: expected device {rows.device} as rows, got {index.device}")


def factor_of(factor: Tensor | None, rows: Tensor) -> tuple[Tensor, int]:
    """Return what kernels take as ``factor, factor_step``; any pointer will do where there is none."""
    if factor is None:
        return rows, 0
    if (
        list(factor.shape) not in ([], [rows.shape[0]])
        or not factor.is_floating_point()
        or factor.device != rows.device
    ):
        got = f"{factor.dtype} {list(factor.shape)} on {factor.device}"
        raise ValueError(f"factor: expected floating [] or [{rows.shape[0]}] on {rows.device}, got {got}")
    return factor, factor.stride(0) if factor.dim() else 0


def check_maps(name: str, maps: Sequence[Tensor], levels: int, rows: Tensor) -> list[int]:
    """Check what the kernels take for granted of maps; return the levels' channels."""
    if len(maps) != levels or any(m.dim() != 4 for m in maps):
        raise ValueError(f"{name}: expected {levels} of [B, C, H, W], got {[list(m.shape) for m in maps]}")
    if any(m.shape[0] != maps[0].shape[0] or m.device != rows.device or not m.is_floating_point() for m in maps):
        got = [f"{m.dtype} {list(m.shape)} on {m.device}" for m in maps]
        raise ValueError(f"{name}: expected floating maps of one batch size on {rows.device}, got {got}")
    return [m.shape[1] for m in maps]


def block_of(size: int, most: int) -> int:
    """Return the smallest block that holds ``size``, up to ``most``."""
    return min(most, int(triton.next_power_of_2(size)))


def pyramid_of(maps: Sequence[Tensor], dtype: torch.dtype) -> Pyramid:
    """Return maps for a kernel, which picks a level at run time: maps of several dtypes are converted to one."""
    if any(m.dtype != maps[0].dtype for m in maps):
        maps = [m.to(dtype) for m in maps]
    return Pyramid(tuple(maps), tuple(n for m in maps for n in m.stride()))


def make_tables(
    rows: Tensor,
    shapes: Sequence[Sequence[int]],
    strides: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    dtype: torch.dtype,
) -> tuple[Tables, int]:
    """Launch ``sample_bins``; return the tables and their taps."""
    count, levels = rows.shape[0], len(strides)
    bins_y, bins_x = output_size
    lines = bins_y + bins_x
    longest = max(max(shape[2:]) for shape in shapes)
    taps = 2 * sampling_ratio if 2 * sampling_ratio < longest else 0
    tables = Tables(
        rows.new_empty((2, levels, count, lines), dtype=torch.int32),
        rows.new_empty((4, levels, count), dtype=torch.int32),
        rows.new_empty((levels, count, lines, taps), dtype=torch.int32),
        rows.new_empty(count * sum(bins_y * shape[2] + bins_x * shape[3] for shape in shapes), dtype=dtype),
        tuple(n for shape in shapes for n in shape[2:]),
        count,
        bins_y,
        bins_x,
    )
    launch(
        sampling.sample_bins,
        (count, lines, levels),
        rows,
        tables,
        sampling_ratio,
        SCALES=tuple(1.0 / stride for stride in strides),
        LEVELS=levels,
        TAPS=taps,
        TAP_BLOCK=block_of(max(taps, 1), max(2 * taps, 1)),
        BLOCK=CELL_BLOCK,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return tables, taps


def gather(
    gradients: list[Tensor],
    tables: Tables,
    rows: Tensor,
    index: Tensor,
    factor: Tensor | None,
    pooled: Tensor,
    divisors: Sequence[int],
    starts: Sequence[int],
    side: float,
) -> None:
    """Launch ``gather_tiles``, which fills the gradients, all of one dtype."""
    most = max(g.shape[1] for g in gradients)
    tile_y, tile_x = GATHER_TILE
    tiles = sum(triton.cdiv(g.shape[2], tile_y) * triton.cdiv(g.shape[3], tile_x) for g in gradients)
    block = block_of(most, GATHER_CHANNELS)
    launch(
        kernels.gather_tiles,
        (tiles * gradients[0].shape[0], triton.cdiv(most, block)),
        pyramid_of(gradients, gradients[0].dtype),
        tables,
        rows,
        index,
        *factor_of(factor, rows),
        pooled,
        gradients[0].shape[0],
        tuple(g.shape[1] for g in gradients),
        tuple(divisors),
        tuple(starts),
        side,
        LEVELS=len(gradients),
        FACTOR=factor is not None,
        TILE_Y=tile_y,
        TILE_X=tile_x,
        CHANNELS=block,
        BINS=block_of(max(tables.bins_y, tables.bins_x), BOX_BLOCK),
        BOXES=BOX_BLOCK,
    )


def distill(
    apprentice: list[Tensor],
    expert: list[Tensor],
    rows: Tensor,
    index: Tensor,
    factor: Tensor | None,
    wanted: tuple[bool, bool],
    strides: list[float],
    expert_strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Total, losses per box, and the gradients of the total with respect to the sides that are wanted."""
    levels = len(strides)
    channels = check_maps("apprentice", apprentice, levels, rows)
    batch = apprentice[0].shape[0]
    if (
        check_maps("expert", expert, levels, rows) != channels
        or expert[0].shape[0] != batch
        or len(expert_strides) != levels
    ):
        got = [list(m.shape) for m in expert]
        raise ValueError(f"expert: expected {batch} images and {channels} channels as in apprentice, got {got}")
    check_prepared(rows, index, levels, batch)
    dtype = accumulation_dtype(apprentice + expert)
    count = rows.shape[0]
    bins_y, bins_x = output_size
    shapes = [[m.shape for m in maps] for maps in (apprentice, expert)]
    shared = shapes[0] == shapes[1] and strides == expert_strides
    tables, taps = make_tables(rows, shapes[0], strides, output_size, sampling_ratio, dtype)
    expert_tables, expert_taps = tables, taps
    if not shared:
        expert_tables, expert_taps = make_tables(rows, shapes[1], expert_strides, output_size, sampling_ratio, dtype)
    block = block_of(max(channels), POOL_CHANNELS)
    channel_blocks = triton.cdiv(max(channels), block)
    divisors = [many * bins_y * bins_x for many in channels]
    starts = [count * sum(divisors[:level]) for level in range(levels)]
    keep = any(wanted)
    pooled = rows.new_empty(count * sum(divisors) if keep else 1, dtype=dtype)
    parts = rows.new_empty((count, levels * bins_y * channel_blocks), dtype=dtype)
    launch(
        kernels.distill_rows,
        (count * channel_blocks, bins_y, levels),
        pyramid_of(apprentice, dtype),
        pyramid_of(expert, dtype),
        tables,
        expert_tables,
        rows,
        *factor_of(factor, rows),
        pooled,
        parts,
        batch,
        tuple(channels),
        tuple(divisors),
        tuple(starts),
        channel_blocks,
        LEVELS=levels,
        TAPS=taps,
        EXPERT_TAPS=expert_taps,
        SHARED=shared,
        KEEP=keep,
        FACTOR=factor is not None,
        CHANNELS_LAST=apprentice[0].stride(1) == 1,
        BINS=block_of(bins_x, BIN_BLOCK),
        CHANNELS=block,
    )
    gradients = []
    sides = ((apprentice, tables, 2.0), (expert, expert_tables, -2.0))
    for (maps, side_tables, side), asked in zip(sides, wanted, strict=True):
        if asked:
            like = maps[0] if all(m.dtype == maps[0].dtype for m in maps) else pooled
            own = [empty_gradient(like, m.shape, is_channels_last(m)) for m in maps]
            gather(own, side_tables, rows, index, factor, pooled, divisors, starts, side)
            gradients += [g.to(m.dtype) for g, m in zip(own, maps, strict=True)]
    losses = parts.sum(dim=1)
    return losses.sum(), losses, gradients


def distill_loss(
    apprentice: list[Tensor], expert: list[Tensor], rows: Tensor, index: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    """See ``rakd_ops/_schemas.py``."""
    total, losses, _ = distill(apprentice, expert, rows, index, None, (False, False), *geometry)
    return total, losses


def distill_gradient(
    apprentice: list[Tensor], expert: list[Tensor], rows: Tensor, index: Tensor, factor: Tensor | None, *options: Any
) -> tuple[Tensor, list[Tensor]]:
    """See ``rakd_ops/_schemas.py``."""
    *geometry, of_apprentice, of_expert = options
    total, _, gradients = distill(apprentice, expert, rows, index, factor, (of_apprentice, of_expert), *geometry)
    return total, gradients


def align(
    features: list[Tensor],
    rows: Tensor,
    index: Tensor,
    strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
) -> Tensor:
    """See ``rakd_ops/_schemas.py``."""
    channels = check_maps("features", features, len(strides), rows)
    first = features[0]
    if any(m.dtype != first.dtype or m.shape[1] != channels[0] for m in features):
        got = [f"{m.dtype} {list(m.shape)}" for m in features]
        raise ValueError(f"features: expected one dtype and number of channels, got {got}")
    check_prepared(rows, index, len(strides), first.shape[0])
    count = rows.shape[0]
    output = first.new_empty((count, channels[0], *output_size))
    dtype = accumulation_dtype(features)
    tables, taps = make_tables(rows, [m.shape for m in features], strides, output_size, sampling_ratio, dtype)
    block = block_of(channels[0], POOL_CHANNELS)
    channel_blocks = triton.cdiv(channels[0], block)
    launch(
        kernels.align_rows,
        (count * channel_blocks, output_size[0]),
        pyramid_of(features, dtype),
        tables,
        rows,
        output,
        first.shape[0],
        channels[0],
        channel_blocks,
        LEVELS=len(strides),
        TAPS=taps,
        CHANNELS_LAST=first.stride(1) == 1,
        BINS=block_of(output_size[1], BIN_BLOCK),
        CHANNELS=block,
    )
    return output


def align_backward(
    output_gradient: Tensor,
    rows: Tensor,
    index: Tensor,
    shapes: list[int],
    channels_last: list[bool],
    strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
) -> list[Tensor]:
    """See ``rakd_ops/_schemas.py``."""
    levels = len(strides)
    maps = [shapes[4 * level : 4 * level + 4] for level in range(levels)]
    if len(shapes) != 4 * levels or any(shape[:2] != maps[0][:2] for shape in maps) or len(channels_last) != levels:
        raise ValueError(f"shapes: expected {levels} of [B, C, H, W] with one B and C, got {shapes}")
    check_prepared(rows, index, levels, maps[0][0])
    expected = [rows.shape[0], maps[0][1], *output_size]
    if list(output_gradient.shape) != expected or output_gradient.device != rows.device:
        got = f"{list(output_gradient.shape)} on {output_gradient.device}"
        raise ValueError(f"output_gradient: expected {expected} on {rows.device}, got {got}")
    gradients = [empty_gradient(output_gradient, shape, last) for shape, last in zip(maps, channels_last, strict=True)]
    dtype = accumulation_dtype([output_gradient])
    tables, _ = make_tables(rows, maps, strides, output_size, sampling_ratio, dtype)
    pooled = output_gradient.permute(0, 2, 3, 1).contiguous()  # neighbouring threads: neighbouring channels
    gather(gradients, tables, rows, index, None, pooled, [1] * levels, [0] * levels, 1.0)
    return gradients
