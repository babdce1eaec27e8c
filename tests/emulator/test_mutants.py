"""Mutants of the CUDA kernels: each must be caught by a short run over what the kernels do."""

from __future__ import annotations

from pathlib import Path

import build
import pytest
import test_kernels
from battery import battery, judge

# Name: (file, text, what replaces it), ...
MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "barrier between mixing and spreading removed": [(
        "cuda/spread.cuh", "__syncwarp();\n        for (; done", "for (; done",
    )],
    "barrier after spreading removed": [("cuda/spread.cuh", "__syncwarp();  // the mixed row is written anew", "")],
    "barrier of the block sum removed": [(
        "cuda/pool.cuh",
        "sums[threadIdx.x / 32] = value;\n  __syncthreads();", "sums[threadIdx.x / 32] = value;",
    )],
    "barrier of the ranks removed": [(
        "cuda/spread.cuh", "if (lane == 31) counts[warp] = sum;\n  __syncthreads();",
        "if (lane == 31) counts[warp] = sum;",
    )],
    "barrier before the meetings are read removed": [(
        "cuda/spread.cuh", "meetings[place] = own;\n    __syncthreads();", "meetings[place] = own;",
    )],
    "barrier before bins are linked removed": [(
        "cuda/tables.cuh", "__syncthreads();\n  for (int32_t i = threadIdx.x; i < (last",
        "for (int32_t i = threadIdx.x; i < (last",
    )],
    "barrier before bins are filled removed": [(
        "cuda/tables.cuh", "__syncthreads();\n  for_each_bin([&]", "for_each_bin([&]",
    )],
    "barrier after tables removed": [("cuda/tables.cuh", "  });\n  __syncthreads();\n}", "  });\n}")],
    "barrier before the stage is read removed": [(
        "cuda/pool.cuh", "if (!call.pooled) continue;\n        __syncthreads();", "if (!call.pooled) continue;",
    )],
    "barrier after the stage is read removed": [(
        "cuda/pool.cuh", "to[i * kSlab] = from[i * kPitch];\n        }\n        __syncthreads();",
        "to[i * kSlab] = from[i * kPitch];\n        }",
    )],
    "a row's sum taken for another's": [("cuda/pool.cuh", "before_ = value_;", "")],
    "off by one in the tile's overlap": [(
        "cuda/spread.cuh", "extent[2 * boxes] < tile.top", "extent[2 * boxes] <= tile.top",
    )],
    "boxes of other images": [("cuda/spread.cuh", "if (extent[0] != tile.image) return false;", "")],
    "bounds check of the tile missing": [("cuda/spread.cuh", "if (y >= height || x >= width) return;", "")],
    "bounds check of channels missing": [("cuda/spread.cuh", "if (c < channels) narrow", "narrow")],
    "a tile's last column missed": [(
        "cuda/spread.cuh", "t < count && cells[t] < low + size;", "t < count && cells[t] < low + size - 1;",
    )],
    "a cell's own bit counted": [("cuda/spread.cuh", "(uint32_t(1) << place) - 1", "(uint32_t(2) << place) - 1")],
    "bins beyond the kept ones forgotten": [(
        "cuda/spread.cuh", "for (int32_t i = kKept; i < feed.count; ++i)", "for (int32_t i = 9; i < 9; ++i)",
    )],
    "a second bin of y forgotten": [("cuda/spread.cuh", "mix_kept<2>(", "mix_kept<1>(")],
    "bins of x beyond the first four mixed wrongly": [("cuda/spread.cuh", "row[b] += kTogether * kSlab;", ";")],
    "a third bin of x forgotten": [("cuda/spread.cuh", "table(1).weight(p, column)", "T(0)")],
    "feeds of another box": [("cuda/spread.cuh", "row_feeds[uint64_t(box) * feeds_apart + row]", "row_feeds[row]")],
    "cells beyond the kept ones forgotten": [(
        "cuda/pool.cuh", "for (int32_t t = kKept; t < taps_; ++t)", "for (int32_t t = taps_; t < taps_; ++t)",
    )],
    "cells kept that the bin does not weigh": [("cuda/pool.cuh", "if (t >= taps_) continue;", "")],
    "wrong weight": [("axis_table.h", "+= T(tap.weight_high / share)", "+= T(tap.weight_low / share)")],
    "a shared cell counted twice": [("axis_table.h", "count += cells - repeated;", "count += cells;")],
    "reordered samples": [("axis_table.h", "if (tap.low > 0 && next", "if (false && next")],
    "border rule": [("geometry.h", "position >= -1.0 &&", "position > -1.0 && position >= 0.0 &&")],
    "unwritten output": [(
        "cuda/spread.cuh", "if (!view.data ||", "if (!view.data || (tables.boxes > 0 && tile.top > 0) ||",
    )],
    "loss of one group lost": [("cuda/pool.cuh", "if (threadIdx.x == 0) *partial = scale * sum;",
                                "if (threadIdx.x == 0) *partial = blockIdx.x == 0 ? scale * sum : 0.0;")],
    "losses not added": [(
        "cuda/spread.cuh", "if (slab == 0 && call.sum.total) add_losses", "if (slab == 1) add_losses",
    )],
    "batch index trusted": [("cuda/tables.cuh", "row[0] < static_cast<double>(tables.images)", "row[0] < 1e9")],
    "tables of the other side": [("cuda/pool.cuh", "const int side = kTwoSides ? 1 : 0;", "const int side = 0;")],
    "Gram: barrier before pieces are applied removed": [(
        "cuda/gram.cuh", "        __syncthreads();\n        for (int32_t n = 0; n < warps",
        "        for (int32_t n = 0; n < warps",
    )],
    "Gram: barrier in a piece removed": [("cuda/gram_piece.cuh", "  __syncwarp();\n  if (t < at", "  if (t < at")],
    "Gram: a tile's last column missed": [(
        "cuda/gram_piece.cuh", "lower_bound(cells, begin, most, low + size)",
        "lower_bound(cells, begin, most, low + size - 1)",
    )],
    "Gram: a row of the tile missed": [(
        "cuda/gram_tables.cuh", "return CellRange{begin[cells.begin], end[cells.end - 1]};",
        "return CellRange{begin[cells.begin], end[cells.end - 1] - 1};",
    )],
    "Gram: bounds check of columns missing": [("cuda/gram.cuh", "if (real && x < width)", "if (real)")],
    "Gram: bounds check of rows missing": [("cuda/gram.cuh", "if (y >= height) break;", "")],
    "Gram: bounds check of the stage missing": [(
        "cuda/gram.cuh", "int64_t(needed.rows()) * needed.columns() <= cells;", "cells > 0;",
    )],
    "Gram: stage taken for larger than it is": [(
        "cuda/gram_piece.cuh", "const bool staged = held.holds(needed);",
        "const bool staged = held.holds(needed) || held.columns() > 0;",
    )],
    "Gram: past the last channel": [(
        "cuda/gram_piece.cuh", "values.value[c] = c < channels_ ? widen(from[c * channel_stride_]) : T(0);",
        "values.value[c] = widen(from[c * channel_stride_]);",
    )],
    "Gram: cells of the stage divided wrongly": [("cuda/gram.cuh", "(1 << kShift) + columns - 1", "1 << kShift")],
    "Gram: wrong weight": [("gram_table.h", "table.weight(bin, u));", "table.weight(bin, t));")],
    "Gram: narrow band": [(
        "gram_table.h", "if (end > band.end) band.end = end;", "if (end > band.end) band.end = end - 1;",
    )],
    "Gram: bands of several parts lost": [("cuda/gram.cuh", "parts = max(parts, piece.parts);", "")],
    "Gram: unwritten output": [("cuda/gram.cuh", "if (!view.data) continue;", "if (!view.data || !met) continue;")],
    "Gram: sign of the expert": [("cuda/gram.cuh", "output == 0 ? T(1) : T(-1)", "T(1)")],
    "Gram: counter not set": [("cuda/gram_tables.cuh", "*finished = 0;", "*finished = 1;")],
    "Gram: loss twice": [("cuda/gram.cuh", "= 0.5 * loss;", "= loss;")],
    "tables not kept": [("cuda/tables.cuh", "kept.weights[i] = room.weights[i];", "kept.weights[i] = T(0);")],
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
    battery(build.load(test_kernels.BINDING, [test_kernels.KERNELS]))
