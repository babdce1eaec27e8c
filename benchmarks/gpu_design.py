"""``python -m benchmarks.gpu_design``: what three designs of the CUDA loss would move and compute; needs no GPU.

A model, not a measurement. Launches, bytes, multiply-adds and instructions of one training step (float32,
channels-first, expert without gradient) are counted from the boxes of each workload (``gpu_counts``, where the designs
are explained), and turned into times that no kernel can beat if the assumptions of ``Machine`` hold. Prints a table and
writes it as CSV; docs/gpu_design.md reads it.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from tyro.conf import arg

from benchmarks import gpu_counts
from benchmarks.workloads import DISTILL_WORKLOADS, STRIDES, Workload, draw_boxes
from rakd.files import write_text

BYTES = 4  # of a float32
SECTOR_BYTES = 32  # the least that a GPU reads from memory


@dataclass(frozen=True)
class Machine:
    """What is assumed of an H200: others have measured the copy rate, the rest are round or nominal figures.

    Attributes:
        copy: Bytes a second from and to memory, read and written.
        cache: Bytes a second from the L2 cache.
        load: Bytes a second that all threads load at most, from the L1 caches and shared memory, which are one (128 a
            clock and processor).
        multiply_add: float32 multiply-adds a second (128 a clock and processor).
        issue: Instructions of warps a second (4 a clock and processor).
        cache_bytes: Of the L2 cache: a workspace that is smaller is taken to stay there.
        launch: Seconds that a launch adds.
    """

    copy: float = 4.3e12
    cache: float = 5.5e12
    load: float = 132 * 128 * 1.755e9
    multiply_add: float = 132 * 128 * 1.755e9
    issue: float = 132 * 4 * 1.755e9
    cache_bytes: float = 50e6
    launch: float = 2.5e-6


@dataclass(frozen=True)
class Row:
    """One design on one workload.

    Attributes:
        workload: Its name.
        design: ``"pooled"``, ``"gram"`` or ``"assembled"``.
        shipped: Whether it is what this workload takes (csrc/cuda/launch_gram.h).
        launches: Of a training step.
        map_mb: Read from both networks' maps: distinct 32-byte sectors that boxes touch.
        gradient_mb: Written: the apprentice's dense gradient.
        workspace_mb: Between the launches: pooled differences (written once, read at least once), or Gram bands, by
            capacity.
        requested_mb: All loads of maps and pooled differences, wherever they are served from.
        shared_mb: Loads from shared memory of what is a channel's own.
        giga_multiply_adds: Multiply-adds and subtractions of maps, and additions that assemble an operator.
        mega_instructions: Of warps, by the inner loops; 0 for what is not built.
        largest_stage_kb: For the Gram forms, the difference on the cells that one tile needs, one slab of channels.
        entries: For ``assembled``, of its operator per cell that boxes touch.
        memory_us: Time of what must come from or go to memory.
        cache_us: Time of the rest through L2, or of all loads through L1 and shared memory if that is more.
        compute_us: Time of the multiply-adds.
        issue_us: Time of the instructions.
        bound_us: The largest of the four, and the launches.
    """

    workload: str
    design: str
    shipped: bool
    launches: int
    map_mb: float
    gradient_mb: float
    workspace_mb: float
    requested_mb: float
    shared_mb: float
    giga_multiply_adds: float
    mega_instructions: float
    largest_stage_kb: float
    entries: float
    memory_us: float
    cache_us: float
    compute_us: float
    issue_us: float
    bound_us: float


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
    patches = gpu_counts.list_patches(workload, boxes)
    cells, sectors = gpu_counts.touched(patches)
    maps = 2 * sectors * SECTOR_BYTES * workload.channels
    dense = workload.batch * sum(height * width for height, width in map(workload.map_size, STRIDES))
    gradient = dense * workload.channels * BYTES
    pooled_bytes = workload.boxes * len(STRIDES) * workload.output_size**2 * workload.channels * BYTES
    chosen = "gram" if workload.output_size**2 >= gpu_counts.GRAM_BINS else "pooled"
    rows = []
    for design, work, workspace, slab in (
        ("pooled", gpu_counts.pooled_work(workload, patches), pooled_bytes, gpu_counts.SLAB),
        ("gram", gpu_counts.gram_work(workload, patches), gpu_counts.band_bytes(workload), gpu_counts.GRAM_SLAB),
        ("assembled", gpu_counts.assembled_work(patches), gpu_counts.band_bytes(workload), gpu_counts.ASSEMBLED_SLAB),
    ):
        requested, shared = (count * workload.channels * BYTES for count in (work.loads, work.shared))
        operations = work.multiply_adds * workload.channels + work.once
        cached = workspace <= machine.cache_bytes
        memory = (maps + gradient + (0 if cached else 2 * workspace)) / machine.copy
        cache = max((2 * workspace if cached else 0) / machine.cache, (requested + shared) / machine.load)
        compute, issue = operations / machine.multiply_add, work.warps / machine.issue
        rows.append(
            Row(
                name,
                design,
                design == chosen,
                2,
                maps / 1e6,
                gradient / 1e6,
                workspace / 1e6,
                requested / 1e6,
                shared / 1e6,
                operations / 1e9,
                work.warps / 1e6,
                work.largest_stage * slab * BYTES / 1e3,
                work.entries / cells,
                memory * 1e6,
                cache * 1e6,
                compute * 1e6,
                issue * 1e6,
                (max(memory, cache, compute, issue) + 2 * machine.launch) * 1e6,
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
                f"compute {row.compute_us:7.1f}  issue {row.issue_us:7.1f}  bound {row.bound_us:7.1f} us",
                flush=True,
            )
    write_text(out, to_csv(rows))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
