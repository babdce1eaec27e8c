"""Mutants of the CUDA kernels: each must be caught by a short run over what the kernels do."""

from __future__ import annotations

from pathlib import Path

import build
import pytest
from battery import battery, judge
from kernel_calls import BINDING, KERNELS

# Name: (file, text, what replaces it), ...
MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "barrier between both sums of a row removed": [(
        "cuda/roi_align_backward.cuh", "__syncwarp();\n        for (; done",
        "for (; done",
    )],
    "barrier after a row of bins removed": [(
        "cuda/roi_align_backward.cuh", "__syncwarp();  // the row is written anew",
        "",
    )],
    "barrier of the block sum removed": [(
        "cuda/roi_align_forward.cuh", "sums[threadIdx.x / 32] = value;\n  __syncthreads();",
        "sums[threadIdx.x / 32] = value;",
    )],
    "barrier of the ranks removed": [(
        "cuda/roi_align_backward.cuh", "if (lane == 31) counts[warp] = sum;\n  __syncthreads();",
        "if (lane == 31) counts[warp] = sum;",
    )],
    "barrier before the tile's boxes are read removed": [(
        "cuda/roi_align_backward.cuh", "tile_boxes[place] = own;\n    __syncthreads();",
        "tile_boxes[place] = own;",
    )],
    "barrier before bins are linked removed": [(
        "cuda/tables.cuh", "__syncthreads();\n  for (int32_t i = threadIdx.x; i < shape.sides * 2",
        "for (int32_t i = threadIdx.x; i < shape.sides * 2",
    )],
    "barrier before bins are filled removed": [(
        "cuda/tables.cuh", "  }\n  __syncthreads();\n  for_each_bin(",
        "  }\n  for_each_bin(",
    )],
    "barrier before columns are found removed": [(
        "cuda/tables.cuh", "  __syncthreads();\n  for (int i = 0; i < 2 * shape.sides; ++i) {",
        "  for (int i = 0; i < 2 * shape.sides; ++i) {",
    )],
    "barrier before the stage is read removed": [(
        "cuda/roi_align_forward.cuh", "if (kLoss && !call.pooled) continue;\n        __syncthreads();",
        "if (kLoss && !call.pooled) continue;",
    )],
    "barrier after the stage is read removed": [(
        "cuda/roi_align_forward.cuh", "__syncthreads();  // the stage is written anew",
        "",
    )],
    "a row's sum taken for another's": [(
        "cuda/roi_align_forward.cuh", "before_ = value_;",
        "",
    )],
    "off by one in the tile's overlap": [(
        "cuda/roi_align_backward.cuh", "extent[2 * boxes] < tile.top",
        "extent[2 * boxes] <= tile.top",
    )],
    "boxes of other images": [(
        "cuda/roi_align_backward.cuh", "if (extent[0] != tile.image) return false;",
        "if (extent[0] < 0) return false;",
    )],
    "range of another image": [(
        "cuda/roi_align_backward.cuh", "begin = max(int64_t(tables.index[image]), int64_t(0));",
        "begin = max(int64_t(tables.index[image + 1]), int64_t(0));",
    )],
    "range cut short": [(
        "cuda/roi_align_backward.cuh", "end = min(int64_t(tables.index[image + 1]), int64_t(tables.boxes));",
        "end = min(int64_t(tables.index[image + 1]) - 1, int64_t(tables.boxes));",
    )],
    "bounds check of the range missing": [(
        "cuda/roi_align_backward.cuh", "end = min(int64_t(tables.index[image + 1]), int64_t(tables.boxes));",
        "end = tables.index[image + 1];",
    )],
    "bounds check of the range's begin missing": [(
        "cuda/roi_align_backward.cuh", "begin = max(int64_t(tables.index[image]), int64_t(0));",
        "begin = tables.index[image];",
    )],
    "bounds check of the order missing": [(
        "cuda/roi_align_backward.cuh", "return found < boxes ? found : -1;",
        "return found < boxes + (int64_t(1) << 40) ? found : -1;",
    )],
    "order of boxes not looked up": [(
        "cuda/roi_align_backward.cuh", "place < end ? order[place] : -1;",
        "place < end ? place : -1;",
    )],
    "bounds check of the tile missing": [(
        "cuda/roi_align_backward.cuh", "if (y >= height || x >= width) return;",
        "",
    )],
    "bounds check of channels missing": [(
        "cuda/roi_align_backward.cuh", "if (c < channels) from_accum",
        "from_accum",
    )],
    "a tile's last column missed": [(
        "cuda/roi_align_backward.cuh", "t < count && cells[t] < low + size;",
        "t < count && cells[t] < low + size - 1;",
    )],
    "a cell's own bit counted": [(
        "cuda/roi_align_backward.cuh", "(uint32_t(1) << place) - 1",
        "(uint32_t(2) << place) - 1",
    )],
    "bins beyond the stored ones forgotten": [(
        "cuda/roi_align_backward.cuh", "for (int32_t i = kStored; i < bins.count; ++i)",
        "for (int32_t i = 9; i < 9; ++i)",
    )],
    "a second bin of y forgotten": [(
        "cuda/roi_align_backward.cuh", "fill_row<2>(",
        "fill_row<1>(",
    )],
    "bins of x beyond the first four wrong": [(
        "cuda/roi_align_backward.cuh", "row[b] += kTogether * kChannelBlock;",
        ";",
    )],
    "a third bin of x forgotten": [(
        "cuda/roi_align_backward.cuh", "table(1).weight(p, column)",
        "T(0)",
    )],
    "last bin of x of a tile forgotten": [(
        "cuda/roi_align_backward.cuh", "found->end_bin = last.first + last.count;",
        "found->end_bin = last.first + 1;",
    )],
    "columns of another box": [(
        "cuda/roi_align_backward.cuh", "const unsigned char* of_box = slice + uint64_t(box) * slice_bytes;",
        "const unsigned char* of_box = slice + uint64_t(box * 0) * slice_bytes;",
    )],
    "channel block of the first": [(
        "cuda/roi_align_backward.cuh", "channel_block = number / images;",
        "channel_block = 0;",
    )],
    "unwritten output": [(
        "cuda/roi_align_backward.cuh", "if (!view.data ||",
        "if (!view.data || (tables.boxes > 0 && tile.top > 0) ||",
    )],
    "losses not added": [(
        "cuda/roi_align_backward.cuh", "add_losses(tables, call.sum, sums);\n    return;",
        "return;",
    )],
    "gradient in the other side's dtype": [(
        "cuda/roi_align_backward.cuh", "with_element_type<T>(call.gradient[output].type[level],",
        "with_element_type<T>(call.gradient[0].type[level],",
    )],
    "cells beyond the stored ones forgotten": [(
        "cuda/roi_align_forward.cuh", "for (int32_t t = kStored; t < taps_; ++t)",
        "for (int32_t t = taps_; t < taps_; ++t)",
    )],
    "cells read that the bin does not weigh": [(
        "cuda/roi_align_forward.cuh", "if (t >= taps_) continue;",
        "",
    )],
    "loss of one group lost": [(
        "cuda/roi_align_forward.cuh", "if (threadIdx.x == 0) call.partial[blockIdx.x] = scale * sum;",
        "if (threadIdx.x == 0) call.partial[blockIdx.x] = groups > 1 && number % groups > 0 ? 0.0 : scale * sum;",
    )],
    "losses of another level's groups": [(
        "cuda/roi_align_forward.cuh", "partial += tables.boxes * groups;",
        "partial += tables.boxes;",
    )],
    "level of a block found wrongly": [(
        "cuda/roi_align_forward.cuh", "number -= tables.boxes * groups_of(tables.level[level++], call.group);",
        "number -= tables.boxes * groups_of(tables.level[0], call.group), ++level;",
    )],
    "tables of the other side": [(
        "cuda/roi_align_forward.cuh", "pool_column<false>(tables, shape.sides - 1, level",
        "pool_column<false>(tables, 0, level",
    )],
    "different dtypes read as one": [(
        "cuda/roi_align_forward.cuh", "shape.sides == 1 && call.map[0].type[level] == call.map[1].type[level]",
        "shape.sides == 1",
    )],
    "pooled differences of another level": [(
        "cuda/roi_align_forward.cuh", "T* to = call.pooled + shape.pooled + ",
        "T* to = call.pooled + ",
    )],
    "wrong weight": [(
        "axis_table.h", "+= T(tap.weight_high / share)",
        "+= T(tap.weight_low / share)",
    )],
    "a shared cell counted twice": [(
        "axis_table.h", "count += cells - repeated;",
        "count += cells;",
    )],
    "reordered samples": [(
        "axis_table.h", "if (tap.low > 0 && next",
        "if (false && next",
    )],
    "border rule": [(
        "geometry.h", "position >= -1.0 &&",
        "position > -1.0 && position >= 0.0 &&",
    )],
    "image trusted": [(
        "cuda/tables.cuh", "row[0] < static_cast<double>(tables.images)",
        "row[0] < 1e9",
    )],
    "factor forgotten": [(
        "cuda/tables.cuh", "* call.normalizer[level] * factor : 0.0",
        "* call.normalizer[level] * (factor != 0.0 ? 1.0 : 0.0) : 0.0",
    )],
    "factor of a weight of zero": [(
        "cuda/tables.cuh", "inside && row[5 + level] != 0.0 ?",
        "inside ?",
    )],
    "channels of the first level": [(
        "cuda/tables.cuh", "* call.normalizer[level] * factor",
        "* call.normalizer[0] * factor",
    )],
    "one column of R too few": [(
        "cuda/tables.cuh", "while (end < bins && table.bin_cell[end] <= t) ++end;",
        "while (end < bins && table.bin_cell[end] < t) ++end;",
    )],
    "stride of the other side": [(
        "cuda/tables.cuh", "call.stride[side][level]",
        "call.stride[0][level]",
    )],
    "ranks without their box's place": [(
        "cuda/prepare.cuh", "image + (j < earlier ? 1 : 0)",
        "image + (j < earlier && false ? 1 : 0)",
    )],
    "ranks that count their own box": [(
        "cuda/prepare.cuh", "image + (j < earlier ? 1 : 0)",
        "image + (j <= earlier ? 1 : 0)",
    )],
    "ranks among the first boxes only": [(
        "cuda/prepare.cuh", "begin < call.boxes; begin += blockDim.x",
        "begin < 1; begin += blockDim.x",
    )],
    "barrier before images are read removed": [(
        "cuda/prepare.cuh", "    }\n    __syncthreads();\n    const int64_t left",
        "    }\n    const int64_t left",
    )],
    "barrier before images are written removed": [(
        "cuda/prepare.cuh", "__syncthreads();  // images[] is written anew",
        "",
    )],
    "wrong boxes sorted as if right": [(
        "cuda/prepare.cuh", "const bool good = box_fault(call.preparation, box) == Fault::kNone;",
        "const bool good = box[0] >= 0.0 && box[0] < 3.0;",
    )],
    "ranges not written": [(
        "cuda/prepare.cuh", "call.index[image] = rank;",
        ";",
    )],
    "a list's range of the launch before": [(
        "cuda/prepare.cuh", "call.index[call.first_image + number]",
        "call.index[number]",
    )],
    "a list's boxes of the first image": [(
        "cuda/prepare.cuh", "static_cast<double>(call.first_image + list);",
        "static_cast<double>(list);",
    )],
    "box of a list read from its launch's begin": [(
        "cuda/prepare.cuh", ".at(k - call.first_box[list], i)",
        ".at(k - call.first_box[0], i)",
    )],
    "a turned box counted": [(
        "prepare.h", "box[1] <= box[3] && box[2] <= box[4] ?",
        "true ?",
    )],
    "a negative level weight counted": [(
        "prepare.h", "weight >= 0.0 && is_finite_number(weight)",
        "is_finite_number(weight)",
    )],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(bool(build.SANITIZER), reason="mutants are judged without a sanitizer")
@pytest.mark.parametrize("name", ["none", *MUTANTS])
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    source = build.mutate(build.CSRC, MUTANTS[name], tmp_path / "source") if name in MUTANTS else build.CSRC
    status = judge(source, tmp_path / "log")
    stderr = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
    assert "BuildError" not in stderr, stderr
    assert (status != 0) == (name in MUTANTS), stderr


@pytest.mark.slow
def test_the_battery_passes_without_mutation() -> None:
    """As the other tests have the kernels, optimized."""
    battery(build.load(BINDING, [KERNELS]))
