"""The real CUDA kernels, run on the CPU: against the reference, for several block sizes and schedules.

Everything a kernel may not do is an error here: reading memory that nothing wrote gives NaN, writing outside of an
array or leaving an output element unwritten is seen, barriers must be met by all threads, and threads run in orders
that differ from seed to seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import build
import numpy as np
import pytest
import torch
from torch import Tensor

from rakd_ops import reference
from rakd_ops.levels import ASSIGNMENTS

BINDING, KERNELS = build.HERE / "kernels_binding.cpp", build.HERE / "kernels.cpp"
TYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-2, "bfloat16": 1e-2}
DEFAULT_THREADS = (64, 128, 256, 256, 128)
OTHER_THREADS = ((32, 32, 32, 32, 32), (128, 64, 1024, 64, 64), (96, 224, 96, 128, 256), (256, 512, 512, 256, 512))
FORMS = ("shape", "pooled", "gram")  # csrc/cuda/launch_gram.h: Form


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    return build.load(BINDING, [KERNELS])


@pytest.fixture
def module(compiled: ModuleType) -> Iterator[ModuleType]:
    yield compiled
    compiled.schedule()


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's bits as numpy knows them, with its strides."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.element_size() == 2 else tensor.numpy()


def pyramid(
    dtype: torch.dtype,
    strides: Sequence[float],
    layout: str,
    seed: int,
    batch: int,
    channels: int,
    size: tuple[int, int],
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for stride in strides:
        shape = (batch, channels, max(1, -int(-size[0] // stride)), max(1, -int(-size[1] // stride)))
        feature = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        maps.append(feature.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else feature)
    return maps


def boxes_in(size: tuple[int, int], count: int, batch: int, seed: int) -> Tensor:
    """Boxes of all kinds: inside, reaching out, outside, points, huge."""
    generator = torch.Generator().manual_seed(seed)
    corners = (torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * 1.5 - 0.25) * torch.tensor(
        size[::-1]
    )
    image = torch.randint(0, batch, (count, 1), generator=generator).double()
    rows = torch.cat([image, corners.amin(1), corners.amax(1)], 1)
    odd = [[0, 5, 5, 5, 5], [batch - 1, -900, -900, -800, -800], [0, -1e6, -40.0, 1e6, size[0]], [0, 8, 4, 24, 20]]
    return torch.cat([rows, torch.tensor(odd, dtype=torch.float64)]) if count else rows


class Call:
    """One call's inputs, its expected results, and how to run it in the emulator."""

    def __init__(
        self,
        dtype: str = "float32",
        *,
        layout: str = "contiguous",
        strides: tuple[float, ...] = (4, 8),
        expert_strides: tuple[float, ...] | None = None,
        output_size: tuple[int, int] = (3, 2),
        sampling_ratio: int = 2,
        assignment: str = "soft",
        threads: tuple[int, ...] = DEFAULT_THREADS,
        channels: int = 35,
        boxes: int = 5,
        seed: int = 0,
        batch: int = 2,
        size: tuple[int, int] = (44, 148),
        form: str = "pooled",
    ) -> None:
        self.dtype = dtype
        steps = expert_strides or strides
        shapes = (batch, channels, size)
        self.apprentice = pyramid(TYPES[dtype], strides, layout, seed, *shapes)
        self.expert = pyramid(TYPES[dtype], steps, layout, seed + 1, *shapes)
        self.boxes = boxes_in(size, boxes, batch, seed)
        self.coefficients = torch.linspace(-0.5, 1.5, len(self.boxes), dtype=torch.float64)
        # Levels such that the small boxes here spread over them.
        self.rule = {"assignment": assignment, "sigma": 0.8, "canonical_size": 30.0, "canonical_level": 2.5}
        self.geometry = {"strides": strides, "output_size": output_size, "sampling_ratio": sampling_ratio, **self.rule}
        self.expert_strides = expert_strides
        self.options = {
            **self.geometry,
            "strides": list(map(float, strides)),
            "expert_strides": list(map(float, steps)),
            "assignment": ASSIGNMENTS.index(assignment),
            "threads": list(threads),
            "form": FORMS.index(form),
        }

    def distill(self, module: ModuleType, wanted: tuple[bool, bool] = (True, True)) -> list[Tensor]:
        """Per-box losses, total, gradients of apprentice and expert. The Gram form has no per-box losses: NaN."""
        gradients = [
            [torch.zeros_like(m) for m in side] if w else [] for side, w in zip(self.maps, wanted, strict=True)
        ]
        losses, total = torch.zeros(len(self.boxes), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        self.took_gram = getattr(module, f"distill_{self.dtype}")(
            self.options,
            *([to_numpy(m) for m in side] for side in self.maps),
            self.boxes.numpy(),
            self.coefficients.numpy(),
            *([to_numpy(m) for m in side] for side in gradients),
            losses.numpy(),
            total.numpy(),
        )
        return [losses, total, *gradients[0], *gradients[1]]

    @property
    def maps(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.apprentice, self.expert

    def expected_distill(self) -> list[Tensor]:
        exact = [[m.double().requires_grad_() for m in side] for side in self.maps]
        losses = reference.soft_roi_distill(
            *exact, self.boxes, **self.geometry, expert_strides=self.expert_strides, reduction="none",
            box_weights=self.coefficients,
        )  # fmt: skip
        return [losses.detach(), losses.detach().sum()[None], *torch.autograd.grad(losses.sum(), exact[0] + exact[1])]

    def align(self, module: ModuleType) -> list[Tensor]:
        """Pooled features, and gradients for a fixed gradient of theirs."""
        output = torch.zeros(len(self.boxes), self.apprentice[0].shape[1], *self.geometry["output_size"])
        output = output.to(TYPES[self.dtype])
        rows = self.boxes.numpy()
        getattr(module, f"align_{self.dtype}")(
            self.options, [to_numpy(m) for m in self.apprentice], rows, to_numpy(output)
        )
        gradients = [torch.zeros_like(m) for m in self.apprentice]
        getattr(module, f"align_backward_{self.dtype}")(
            self.options, to_numpy(self.output_gradient(output)), rows, [to_numpy(m) for m in gradients]
        )
        return [output, *gradients]

    def output_gradient(self, output: Tensor) -> Tensor:
        return torch.linspace(-1.0, 2.0, output.numel(), dtype=torch.float64).view(output.shape).to(TYPES[self.dtype])

    def expected_align(self) -> list[Tensor]:
        exact = [m.double().requires_grad_() for m in self.apprentice]
        output = reference.multilevel_roi_align(exact, self.boxes, **self.geometry)
        gradient = self.output_gradient(output).double()
        return [output.detach(), *torch.autograd.grad(output, exact, gradient)]

    def check(self, got: list[Tensor], expected: list[Tensor]) -> None:
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            if a.numel() == 0:
                continue
            error, largest = float((a.double() - b).abs().max()), float(b.abs().max())
            slack = 1e-6 if self.dtype == "float16" else 0.0  # float16 is no finer
            assert error <= TOLERANCE[self.dtype] * largest + slack, (error, largest)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes_and_layouts(module: ModuleType, dtype: str, layout: str) -> None:
    call = Call(dtype, layout=layout)
    call.check(call.distill(module), call.expected_distill())
    call.check(call.align(module), call.expected_align())


@pytest.mark.parametrize("options", [
    {"output_size": (7, 7), "channels": 3, "boxes": 3},
    {"output_size": (1, 5), "sampling_ratio": 1},
    {"sampling_ratio": 0},
    {"sampling_ratio": 5, "strides": (2,)},
    {"assignment": "hard", "strides": (4, 8, 16)},
    {"assignment": "uniform", "strides": (4, 16)},
    {"expert_strides": (3.0, 7.0)},
    {"expert_strides": (2.0, 4.0), "sampling_ratio": 0, "dtype": "float64"},
    {"batch": 3, "channels": 32},
    {"boxes": 40, "channels": 2, "size": (20, 40)},
    {"boxes": 0},
    {"size": (3, 200)},
    {"size": (200, 3)},
])  # fmt: skip
def test_options(module: ModuleType, options: dict[str, Any]) -> None:
    call = Call(**options)
    call.check(call.distill(module), call.expected_distill())
    call.check(call.align(module), call.expected_align())


@pytest.mark.parametrize("options", [
    {"output_size": (41, 45), "channels": 3, "boxes": 2},
    {"output_size": (29, 30), "channels": 2, "boxes": 2, "dtype": "float64", "layout": "channels_last"},
    {"output_size": (2, 3000), "channels": 2, "boxes": 1, "size": (20, 40)},  # tables beyond shared memory
    {"output_size": (1500, 1), "channels": 33, "boxes": 1, "size": (20, 40), "dtype": "float64"},
    {"output_size": (1, 1200), "channels": 2, "boxes": 1, "expert_strides": (3.0, 7.0), "dtype": "float64"},
    {"output_size": (2, 2), "sampling_ratio": 0, "channels": 1, "boxes": 2, "strides": (1,), "size": (4, 6000)},
])  # fmt: skip
def test_output_sizes_and_maps_of_any_size(module: ModuleType, options: dict[str, Any]) -> None:
    """Where pooled values, or the tables themselves, exceed what a block can hold."""
    call = Call(**options)
    call.check(call.distill(module), call.expected_distill())
    call.check(call.distill(module, (False, False))[:2], call.expected_distill()[:2])
    call.check(call.align(module), call.expected_align())


def launches(module: ModuleType, run: Callable[[], object]) -> int:
    module.counts()
    run()
    count: int = module.counts()["launches"]
    return count


@pytest.mark.parametrize("options", [{}, {"expert_strides": (3.0, 7.0)}, {"output_size": (2, 2000), "channels": 2}])
def test_launches(module: ModuleType, options: dict[str, Any]) -> None:
    """A training step is two; there are no launches that only fill or add."""
    call = Call(boxes=2, **options)
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        assert launches(module, lambda wanted=wanted: call.distill(module, wanted)) == 2
    assert launches(module, lambda: call.align(module)) == 3  # forward one, backward two
    nothing = Call(boxes=0, **options)
    assert launches(module, lambda: nothing.distill(module)) == 1


def test_boxes_of_hardly_any_extent(module: ModuleType) -> None:
    """A few units in the last place around cells' borders: rounding may put a sample past the start of the next bin."""
    steps = [(cell, low, extent) for cell in (1, 2, 6) for low in (-2, -1, 0) for extent in (0, 1, 2, 5, 9)]
    spans = [[(4.0 * c + 2.0) * (1 + j * 2**-52) for j in (low, low + extent)] for c, low, extent in steps]
    rows = [[0, x[0], y[0], x[1], y[1]] for x, y in zip(spans, spans[::-1], strict=True)]
    for ratio, size in ((2, (3, 7)), (3, (7, 5)), (5, (3, 7))):
        call = Call("float64", strides=(4,), channels=1, sampling_ratio=ratio, output_size=size, size=(40, 60), batch=1)
        call.boxes = torch.tensor(rows, dtype=torch.float64)
        call.coefficients = torch.ones(len(rows), dtype=torch.float64)
        call.check(call.distill(module), call.expected_distill())
        call.check(call.align(module), call.expected_align())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cells_that_no_sample_touches_may_hold_anything(module: ModuleType, layout: str) -> None:
    """Bins of two cells and more: one sample leaves cells unread, and some bins weigh fewer cells than others."""
    call = Call(layout=layout, strides=(4,), channels=2, sampling_ratio=1, output_size=(3, 5), batch=1)
    call.boxes = torch.tensor([[0.0, 9.3, 7.1, 61.7, 33.9], [0.0, 21.0, 5.0, 117.5, 38.0]], dtype=torch.float64)
    call.coefficients = torch.ones(2, dtype=torch.float64)
    clean = call.distill(module)
    call.check(clean, call.expected_distill())
    call.apprentice[0][:, :, ~clean[2].abs().sum(dim=(0, 1)).bool()] = float("inf")
    assert not torch.isfinite(call.apprentice[0]).all()
    for again, before in zip(call.distill(module), clean, strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize("threads", OTHER_THREADS)
def test_block_sizes(module: ModuleType, threads: tuple[int, ...]) -> None:
    call = Call(threads=threads)
    call.check(call.distill(module), call.expected_distill())
    call.check(call.align(module), call.expected_align())


def test_every_schedule_gives_the_same_bits(module: ModuleType) -> None:
    call = Call(boxes=6, channels=5)
    first = call.distill(module) + call.align(module)
    for seed in range(1, 6):
        module.schedule(seed, shuffle_blocks=True)
        assert all(torch.equal(a, b) for a, b in zip(first, call.distill(module) + call.align(module), strict=True))


def test_only_the_gradients_asked_for(module: ModuleType) -> None:
    for steps in (None, (3.0, 7.0)):
        call = Call(expert_strides=steps, channels=4)
        whole = call.distill(module)
        for wanted, kept in (((True, False), (0, 1, 2, 3)), ((False, True), (0, 1, 4, 5)), ((False, False), (0, 1))):
            other = call.distill(module, wanted)
            assert all(torch.equal(a, whole[i]) for a, i in zip(other, kept, strict=True))


NAN, INF = float("nan"), float("inf")


def test_boxes_that_make_no_sense_stay_in_bounds_and_count_nothing(module: ModuleType) -> None:
    """Wrong batch indices and coordinates that are not numbers: no access outside, and no effect on the others."""
    wrong = [
        [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0.5, 0, 0, 9, 9], [NAN, 0, 0, 9, 9], [INF, 0, 0, 9, 9], [1e300, 0, 0, 9, 9],
        [0, NAN, 0, 9, 9], [0, 0, NAN, 9, 9], [0, 0, 0, NAN, 9], [0, 0, 0, 9, INF], [0, -INF, 0, 9, 9],
        [0, -INF, -INF, INF, INF], [0, 0, 0, 1e308, 9], [0, -1e308, 0, 1e308, 9],
        [1, 30, 30, 10, 10], [0, 1e18, 0, 2e18, 9],
    ]  # fmt: skip
    for ratio in (0, 2):
        call = Call(sampling_ratio=ratio, channels=3)
        sensible = len(call.boxes)
        expected_losses = call.distill(module)[0]
        call.boxes = torch.cat([call.boxes, torch.tensor(wrong, dtype=torch.float64)])
        call.coefficients = torch.cat([call.coefficients, torch.ones(len(wrong), dtype=torch.float64)])
        losses, *others = call.distill(module)
        assert torch.equal(losses[:sensible], expected_losses)
        nonsense = ~call.boxes.isfinite().all(1) | (call.boxes[:, 0] != call.boxes[:, 0].clamp(0, 1).floor())
        assert int(nonsense.sum()) == 12
        assert torch.count_nonzero(losses[nonsense]) == 0
        for tensor in (losses, *others, *call.align(module)):
            assert tensor.isfinite().all()
