"""Inputs shared by the tests of the ops: random pyramids, boxes, and hypothesis strategies for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from rakd_ops import available_backends, multilevel_roi_align, soft_roi_distill

# Triton's interpreter (TRITON_INTERPRET=1) takes tensors on the CPU.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_OF = {"cpu": "cpu", "cuda": "cuda", "triton": TRITON_DEVICE, "reference": "cpu"}


def backend_params(*names: str) -> list[Any]:
    """Parametrise over backends; one that cannot run here is skipped, and the skip says why."""
    state = available_backends()
    return [
        pytest.param(name, marks=() if state[name] is True else pytest.mark.skip(reason=f"{name}: {state[name]}"))
        for name in names
    ]


def pyramid(
    batch: int = 2,
    channels: int | Sequence[int] = 5,
    height: int = 64,
    width: int = 96,
    strides: tuple[float, ...] = (4, 8, 16, 32),
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float64,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> list[Tensor]:
    """Random maps of an image of the given size, in one of the memory layouts people have.

    Channels and dtypes are one for all levels, or one each.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = [channels] * len(strides) if isinstance(channels, int) else channels
    dtypes = [dtype] * len(strides) if isinstance(dtype, torch.dtype) else dtype
    maps = []
    for stride, width_of_level, kind in zip(strides, widths, dtypes, strict=True):
        shape = (batch, width_of_level, max(1, -int(-height // stride)), max(1, -int(-width // stride)))
        feature = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, kind)
        maps.append(as_layout(feature, layout).requires_grad_(requires_grad))
    return maps


def as_layout(feature: Tensor, layout: str) -> Tensor:
    """Copy a map into the layout, detached from the original."""
    if layout == "channels_last":
        return feature.detach().clone(memory_format=torch.channels_last)
    if layout == "strided":  # every stride unusual, none of them 1
        wide = feature.new_full([2 * n for n in feature.shape], float("nan"))
        view = wide[::2, ::2, ::2, ::2]
        view.copy_(feature.detach())
        return view.detach()
    if layout == "transposed":  # rows inside columns
        return feature.detach().transpose(2, 3).contiguous().transpose(2, 3)
    return feature.detach().clone(memory_format=torch.contiguous_format)


LAYOUTS = ("contiguous", "channels_last", "strided", "transposed")


def random_boxes(
    count: int,
    batch: int = 2,
    height: int = 64,
    width: int = 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Random boxes [K, 5], some reaching outside the image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, batch, (count, 1), generator=generator).double()
    size = torch.tensor([width, height], dtype=torch.float64)
    corners = (torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * size
    return torch.cat([image, corners.amin(dim=1), corners.amax(dim=1)], dim=1).to(dtype)


@dataclass
class Case:
    """One drawn call: shapes, options, boxes, and the seed of the maps."""

    batch: int
    channels: int | tuple[int, ...]  # one for all levels, or one each
    height: int
    width: int
    strides: tuple[float, ...]
    layouts: tuple[str, str]
    expert_scale: float
    boxes: Tensor
    box_weights: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    reduction: str = "mean"
    seed: int = 0
    level_weights: Tensor | None = None

    def maps(
        self,
        dtype: torch.dtype | Sequence[torch.dtype],
        device: str = "cpu",
        expert_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        common: dict[str, Any] = {"device": device, "requires_grad": True}
        apprentice = pyramid(
            self.batch,
            self.channels,
            self.height,
            self.width,
            self.strides,
            dtype,
            self.layouts[0],
            seed=self.seed,
            **common,
        )
        expert = pyramid(
            self.batch,
            self.channels,
            self.height,
            self.width,
            self.expert_strides or self.strides,
            dtype if expert_dtype is None else expert_dtype,
            self.layouts[1],
            seed=self.seed + 1,
            **common,
        )
        return apprentice, expert

    @property
    def expert_strides(self) -> tuple[float, ...] | None:
        return None if self.expert_scale == 1.0 else tuple(s * self.expert_scale for s in self.strides)

    def distill_options(self) -> dict[str, Any]:
        return {
            **self.options,
            "expert_strides": self.expert_strides,
            "box_weights": self.box_weights,
            "level_weights": self.level_weights,
            "reduction": self.reduction,
        }

    def align_options(self) -> dict[str, Any]:
        return {**self.options, "level_weights": self.level_weights}

    def one_width(self) -> Case:
        """The same with one number of channels for all levels, as pooling them into one tensor asks for."""
        return self if isinstance(self.channels, int) else replace(self, channels=self.channels[0])


@st.composite
def box_rows(draw: st.DrawFn, batch: int, height: int, width: int) -> list[float]:
    """One box: inside, across the border, outside, huge, without area, on integer cells or anywhere."""
    image = draw(st.integers(0, batch - 1))
    kind = draw(st.sampled_from(["inside", "anywhere", "integer", "point", "huge", "outside"]))
    limit = float(max(height, width))
    if kind == "outside":
        x, y = limit * draw(st.sampled_from([-9.0, 5.0])), draw(st.floats(-limit, limit))
        return [image, x, y, x + 7.0, y + 7.0]
    if kind == "huge":
        return [image, -draw(st.floats(0, 30 * limit)), -3.0, draw(st.floats(1, 30 * limit)), limit]
    low, high = (0.0, 1.0) if kind == "inside" else (-0.5, 1.5)
    values = [draw(st.floats(low, high, allow_nan=False)) * side for side in (width, height, width, height)]
    if kind == "integer":
        values = [float(round(v)) for v in values]
    x1, x2 = sorted((values[0], values[2]))
    y1, y2 = sorted((values[1], values[3]))
    return [image, x1, y1, x1, y1] if kind == "point" else [image, x1, y1, x2, y2]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A whole call, over all options."""
    batch = draw(st.integers(1, 3))
    height, width = draw(st.integers(5, 90)), draw(st.integers(5, 90))
    strides = draw(st.sampled_from([(4, 8, 16, 32), (8,), (2, 4), (4, 16), (3.0, 6.5, 14.0)]))
    rows = draw(st.lists(box_rows(batch, height, width), min_size=0, max_size=7))
    boxes = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    weights = None
    if draw(st.booleans()):
        weights = torch.tensor([draw(st.integers(-8, 16)) / 8 for _ in rows], dtype=torch.float64)
    widths = st.sampled_from([1, 2, 3, 8, 9, 17, 33])
    channels = draw(st.one_of(widths, st.tuples(*[widths] * len(strides))))
    of_levels = None
    if draw(st.integers(0, 3)) == 0:  # zeros among them: such a level is not read
        numbers = st.lists(st.integers(0, 8), min_size=len(strides), max_size=len(strides))
        of_levels = torch.tensor([draw(numbers) for _ in rows], dtype=torch.float64).reshape(-1, len(strides)) / 4
    return Case(
        batch,
        channels,
        height,
        width,
        strides,
        (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        draw(st.sampled_from([1.0, 1.0, 0.5, 1.5])),
        boxes,
        weights,
        {
            "strides": strides,
            "output_size": draw(st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 8), st.integers(1, 4)))),
            "sampling_ratio": draw(st.integers(0, 3)),
            "assignment": draw(st.sampled_from(["soft", "hard", "uniform"])),
            "sigma": draw(st.sampled_from([1e-6, 0.3, 1.0, 50.0])),
            "canonical_size": draw(st.sampled_from([20.0, 224.0])),
            "canonical_level": draw(st.sampled_from([3, 4, 4.5])),
        },
        draw(st.sampled_from(["mean", "sum", "none"])),
        draw(st.integers(0, 1000)),
        of_levels,
    )


def assert_close(got: Tensor, expected: Tensor, scale: Tensor, tolerance: float, slack: float = 0.0) -> None:
    """Assert that no entry is further off than the tolerance times the largest magnitude of ``scale``."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == expected.shape
    if got.numel() == 0:
        return
    error, largest = float((got - expected).abs().max()), float(scale.detach().abs().max())
    # Written so that NaN fails.
    assert error <= tolerance * largest + slack, f"error {error:.3e} against values up to {largest:.3e}"


def gpu_inputs(device: str = "cuda", images: int = 2) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Maps of an apprentice and an expert on a GPU, and boxes."""
    maps = pyramid(images, 40, 256, 512, dtype=torch.float32, device=device, requires_grad=True)
    expert = pyramid(images, 40, 256, 512, dtype=torch.float32, device=device, seed=1)
    return maps, expert, random_boxes(60, images, 256, 512).to(device)


def gpu_step(maps: list[Tensor], expert: list[Tensor], boxes: Tensor, backend: str = "cuda") -> list[Tensor]:
    """A loss, pooled features, and the gradients of both."""
    loss = soft_roi_distill(maps, expert, boxes, backend=backend)
    pooled = multilevel_roi_align(maps, boxes, backend=backend)
    return [loss, pooled, *torch.autograd.grad(loss + pooled.square().mean(), maps)]


def gpu_warm_up(*call: Any) -> None:
    """A step on another stream, as it must be before one is captured in a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gpu_step(*call)
    torch.cuda.current_stream().wait_stream(side)
