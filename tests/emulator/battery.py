"""What judges mutants of the CUDA kernels: a short run over all that the kernels do, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import ModuleType

import build
import test_kernels
import test_prepare
import torch
from kernel_calls import BINDING, KERNELS, Call


def battery(module: ModuleType) -> None:
    """A short run over what the kernels do; raises where something is wrong."""
    for seed in range(3):
        module.schedule(seed, shuffle_blocks=True)
        for options in (
            {"boxes": 6},
            {"expert_strides": (3.0, 8.0), "channels": (33, 5)},
            {"threads": (32, 64, 64)},
            {"channels": (5, 40, 3), "strides": (4, 8, 16), "boxes": 2},
            {"output_size": (20, 2), "channels": 3, "boxes": 2},  # passes through the stage in several parts
            {"sampling_ratio": 4, "strides": (2,), "output_size": (1, 1), "channels": 2},  # a bin weighs eight cells
            {"expert_dtype": "bfloat16", "dtype": ("float32", "bfloat16"), "channels": (3, 40)},
        ):
            Call(**options).right(module)  # type: ignore[arg-type]
    call = Call(boxes=3, channels=2)
    call.boxes[1, 0] = 5.0
    assert call.losses(module)[0][1] == 0.0
    test_kernels.test_boxes_of_hardly_any_extent(module)
    test_kernels.test_cells_that_no_sample_touches_may_hold_anything(module, "contiguous")
    test_kernels.test_a_level_of_weight_zero_is_not_read(module)
    test_kernels.test_a_factor_that_is_not_finite_reaches_what_counts(module)
    test_kernels.test_an_index_that_lies_stays_in_bounds(module)
    for of_box in (False, True):
        test_kernels.test_factor(module, torch.float16, of_box)
    test_prepare.test_boxes_in_no_order(module, 300, 2)
    test_prepare.test_boxes_in_no_order(module, 0, 2)
    test_prepare.test_boxes_of_no_image_come_last(module)
    test_prepare.test_wrong_boxes_of_a_list_count_nothing(module)
    test_prepare.test_lists(module, (3, 0, 5))
    test_prepare.test_lists(module, (1, 0, 3) * 50)
    test_prepare.test_wrong_weights_count_nothing(module)
    test_prepare.test_dtypes(module, torch.bfloat16)
    test_prepare.test_level_weights(module, 0, torch.float32)


def _judge(source: Path, log: Path) -> None:
    with log.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    # Most mutants are caught at once: compiling them is what takes the time.
    battery(build.load(BINDING, [KERNELS], include=[source], flags=["-Og"]))


def judge(source: Path, log: Path) -> int:
    """Compile kernels and run the battery over them, in a process of its own, which a mutant may well crash.

    Args:
        source: Folder of the sources, a copy of csrc/.
        log: Where what is printed to stderr goes. Not made where the process fails before it comes to the kernels.

    Returns:
        The exit status, 0 if nothing was found wrong.
    """
    # The server has imported what takes long, and nothing else: a child of this process would share its threads' locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", "rakd_ops"])
    child = context.Process(target=_judge, args=(source, log))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode
