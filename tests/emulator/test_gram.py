"""The Gram form of a training step (csrc/cuda/gram.cuh), run on the CPU: against the reference, and when it is chosen.

What the emulator refuses, test_kernels.py says.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_calls import OTHER_THREADS, TYPES, Call, launches
from test_kernels import INF, NAN, compiled, module
from torch import Tensor

__all__ = ["compiled", "module"]  # fixtures


class GramCall(Call):
    """A call in the Gram form, wherever that can be had."""

    def __init__(self, dtype: str = "float32", **options: Any) -> None:
        super().__init__(dtype, **{"form": "gram", **options})

    def run(self, module: ModuleType, wanted: tuple[bool, bool] = (True, True), gram: bool = True) -> list[Tensor]:
        """Total and gradients."""
        results = self.distill(module, wanted)
        assert self.took_gram == gram
        return results


def right(module: ModuleType, call: GramCall) -> None:
    call.check(call.run(module), call.expected_distill())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [19, 32])  # the latter moves whole words
def test_dtypes_and_layouts(module: ModuleType, dtype: str, layout: str, channels: int) -> None:
    right(module, GramCall(dtype, layout=layout, channels=channels, output_size=(7, 5)))


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("bins", [1, 2, 7, 19])
def test_output_sizes_and_ratios(module: ModuleType, bins: int, ratio: int) -> None:
    right(module, GramCall(output_size=(bins, bins), sampling_ratio=ratio, channels=5))


@pytest.mark.parametrize("options", [
    {"output_size": (1, 5), "sampling_ratio": 1},
    {"sampling_ratio": 5, "strides": (2,)},  # bands of several parts, and rows of several parts
    {"sampling_ratio": 0, "strides": (1,), "output_size": (2, 1), "channels": 2, "boxes": 2},
    {"sampling_ratio": 0, "strides": (1,), "output_size": (1, 2), "channels": 2, "boxes": 2, "dtype": "float64"},
    {"assignment": "hard", "strides": (4, 8, 16)},
    {"assignment": "uniform", "strides": (4, 16)},
    {"batch": 3, "channels": 16},
    {"boxes": 40, "channels": 2, "size": (20, 40)},
    {"boxes": 300, "channels": 3, "size": (40, 60)},  # several rounds of candidates, and of boxes on a tile
    {"boxes": 8, "channels": 70, "strides": (8,)},  # several slabs
    {"boxes": 8, "channels": 1, "strides": (8,), "layout": "channels_last"},
    {"channels": (3, 70), "boxes": 8, "layout": "channels_last"},
    {"channels": (33, 1, 9), "strides": (4, 8, 16), "dtype": "float64"},
    {"size": (3, 200)},
    {"size": (200, 3)},
    {"size": (70, 300), "strides": (2,), "channels": 2},  # boxes that need more than the stage holds
    {"size": (70, 300), "strides": (2,), "channels": 4, "dtype": "float16", "layout": "channels_last"},
    {"output_size": (2, 3000), "channels": 2, "boxes": 1, "size": (20, 40)},  # sampling tables beyond shared memory
])  # fmt: skip
def test_options(module: ModuleType, options: dict[str, Any]) -> None:
    right(module, GramCall(**options))


@pytest.mark.parametrize("threads", OTHER_THREADS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_block_sizes(module: ModuleType, threads: tuple[int, ...], dtype: str) -> None:
    if dtype == "float64":  # twice 256 threads would need more shared memory than there is
        threads = (*threads[:3], min(threads[3], 256))
    right(module, GramCall(dtype, threads=threads, output_size=(7, 7), channels=21))


def test_every_schedule_gives_the_same_bits(module: ModuleType) -> None:
    call = GramCall(boxes=30, channels=37, output_size=(7, 7))
    first = call.run(module)
    for seed in range(1, 6):
        module.schedule(seed, shuffle_blocks=True)
        assert all(torch.equal(a, b) for a, b in zip(first, call.run(module), strict=True))


def test_gradients_do_not_depend_on_the_block_size(module: ModuleType) -> None:
    """Boxes add up in their order, however many a block treats at a time."""
    first = GramCall(boxes=30, channels=37).run(module)
    for threads in OTHER_THREADS[:3]:
        total, *gradients = GramCall(boxes=30, channels=37, threads=threads).run(module)
        torch.testing.assert_close(total, first[0], rtol=1e-6, atol=0.0)
        assert all(torch.equal(a, b) for a, b in zip(gradients, first[1:], strict=True))


def test_only_the_gradients_asked_for(module: ModuleType) -> None:
    call = GramCall(channels=4)
    whole = call.run(module)
    for wanted, kept in (((True, False), (0, 1, 2)), ((False, True), (0, 3, 4))):
        other = call.run(module, wanted)
        assert all(torch.equal(a, whole[i]) for a, i in zip(other, kept, strict=True))


@pytest.mark.parametrize("ratio", [0, 2])
def test_boxes_that_make_no_sense_count_nothing(module: ModuleType, ratio: int) -> None:
    call = GramCall(sampling_ratio=ratio, channels=3)
    expected = call.run(module)
    wrong = [
        [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0.5, 0, 0, 9, 9], [NAN, 0, 0, 9, 9], [INF, 0, 0, 9, 9], [1e300, 0, 0, 9, 9],
        [0, NAN, 0, 9, 9], [0, 0, NAN, 9, 9], [0, 0, 0, NAN, 9], [0, 0, 0, 9, INF], [0, -INF, 0, 9, 9],
        [0, -INF, -INF, INF, INF], [0, 900, 0, 950, 9], [0, 1e18, 0, 2e18, 9],
    ]  # fmt: skip
    call.boxes = torch.cat([call.boxes, torch.tensor(wrong, dtype=torch.float64)])
    call.coefficients = torch.cat([call.coefficients, torch.ones(len(wrong), dtype=torch.float64)])
    assert all(torch.equal(a, b) for a, b in zip(call.run(module), expected, strict=True))
    call.boxes = torch.tensor([[0, 0, 0, 1e308, 9], [0, -1e308, 0, 1e308, 9], [1, 30, 30, 10, 10]]).double()
    call.coefficients = torch.ones(3, dtype=torch.float64)
    assert all(tensor.isfinite().all() for tensor in call.run(module))


def test_what_no_box_touches_is_not_looked_at(module: ModuleType) -> None:
    call = GramCall(channels=3, output_size=(7, 7), sampling_ratio=1, boxes=6)
    # Without the odd boxes behind these, some of whose samples lie on cells and touch the next with weight zero.
    call.boxes, call.coefficients = call.boxes[:6], call.coefficients[:6]
    expected = call.run(module)
    for side in call.maps:
        for level, feature in enumerate(side):
            feature[expected[1 + level] == 0] = NAN
    assert all(torch.equal(a, b) for a, b in zip(call.run(module), expected, strict=True))


def test_boxes_of_hardly_any_extent(module: ModuleType) -> None:
    steps = [(cell, low, extent) for cell in (1, 2, 6) for low in (-2, -1, 0) for extent in (0, 1, 2, 5, 9)]
    spans = [[(4.0 * c + 2.0) * (1 + j * 2**-52) for j in (low, low + extent)] for c, low, extent in steps]
    rows = [[0, x[0], y[0], x[1], y[1]] for x, y in zip(spans, spans[::-1], strict=True)]
    for ratio in (2, 3, 5):
        options = {"channels": 1, "sampling_ratio": ratio, "output_size": (3, 7), "size": (40, 60), "batch": 1}
        call = GramCall("float64", strides=(4,), **options)
        call.boxes = torch.tensor(rows, dtype=torch.float64)
        call.coefficients = torch.ones(len(rows), dtype=torch.float64)
        right(module, call)


def test_chosen_by_shape(module: ModuleType) -> None:
    """From 256 bins on, for one shape of maps; asked for, wherever its workspace is bounded."""
    small = {"channels": 2, "boxes": 2}
    for options, gram in (
        ({"form": "shape", "output_size": (16, 16)}, True),
        ({"form": "shape", "output_size": (15, 17)}, False),
        ({"form": "pooled", "output_size": (10, 10)}, False),
        ({"expert_strides": (3.0, 7.0), "output_size": (10, 10)}, False),
        ({"boxes": 0}, False),
        ({"expert_dtype": "bfloat16"}, False),
        ({"dtype": ("float32", "float16"), "expert_dtype": ("float32", "float16")}, False),
        ({"dtype": "bfloat16", "channels": (2, 5)}, True),
        ({"sampling_ratio": 0, "strides": (1,), "size": (4, 1500)}, False),  # bands as wide as the map
        ({"sampling_ratio": 0, "strides": (1,), "size": (4, 200)}, True),
    ):
        call = GramCall(**{**small, **options})
        call.check(call.run(module, gram=gram), call.expected_distill())
    call = GramCall(form="shape", output_size=(10, 10), **small)
    call.losses(module)  # which says that it was not the Gram form


def test_launches(module: ModuleType) -> None:
    call = GramCall(boxes=2)
    for wanted in ((True, True), (True, False), (False, True)):
        assert launches(module, lambda wanted=wanted: call.run(module, wanted)) == 3  # with preparation
