"""Calls of the real CUDA kernels in the emulator: inputs, expected results, and how they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import build
import numpy as np
import torch
from torch import Tensor

from rakd_ops import reference
from rakd_ops._inputs import BoxInputs
from rakd_ops._options import check_options
from rakd_ops.levels import ASSIGNMENTS

BINDING, KERNELS = build.HERE / "kernels_binding.cpp", build.HERE / "kernels.cpp"
TYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# csrc/prepare.h: Number
NUMBERS = (*TYPES.values(), torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DEFAULT_THREADS = (64, 128, 256)
OTHER_THREADS = ((32, 32, 32), (128, 64, 64), (96, 224, 128), (256, 512, 256))


def typed(tensor: Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """The tensor's bits as numpy knows them, with its strides, and the number of its dtype."""
    tensor = tensor.detach()
    bits = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else None
    return tensor.numpy() if bits is None else bits, NUMBERS.index(tensor.dtype)


def every(tensors: Sequence[Tensor]) -> list[tuple[np.ndarray[Any, Any], int]]:
    return [typed(tensor) for tensor in tensors]


def pyramid(
    dtypes: Sequence[str],
    strides: Sequence[float],
    layout: str,
    seed: int,
    batch: int,
    channels: Sequence[int],
    size: tuple[int, int],
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for dtype, stride, width in zip(dtypes, strides, channels, strict=True):
        shape = (batch, width, max(1, -int(-size[0] // stride)), max(1, -int(-size[1] // stride)))
        feature = torch.randn(shape, generator=generator, dtype=torch.float64).to(TYPES[dtype])
        maps.append(feature.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else feature)
    return maps


def boxes_in(size: tuple[int, int], count: int, batch: int, seed: int) -> Tensor:
    """Boxes of all kinds: inside, reaching out, outside, points, huge; their images in no order."""
    generator = torch.Generator().manual_seed(seed)
    corners = (torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * 1.5 - 0.25) * torch.tensor(
        size[::-1]
    )
    image = torch.randint(0, batch, (count, 1), generator=generator).double()
    rows = torch.cat([image, corners.amin(1), corners.amax(1)], 1)
    odd = [[0, 5, 5, 5, 5], [batch - 1, -900, -900, -800, -800], [0, -1e6, -40.0, 1e6, size[0]], [0, 8, 4, 24, 20]]
    return torch.cat([rows, torch.tensor(odd, dtype=torch.float64)]) if count else rows


def per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value] * levels


class Call:
    """One call's inputs, its expected results, and how to run it in the emulator.

    ``dtype``, ``expert_dtype`` and ``channels`` are one for all levels, or one each.
    """

    def __init__(
        self,
        dtype: str | tuple[str, ...] = "float32",
        *,
        expert_dtype: str | tuple[str, ...] | None = None,
        layout: str = "contiguous",
        strides: tuple[float, ...] = (4, 8),
        expert_strides: tuple[float, ...] | None = None,
        output_size: tuple[int, int] = (3, 2),
        sampling_ratio: int = 2,
        assignment: str = "soft",
        threads: tuple[int, ...] = DEFAULT_THREADS,
        channels: int | tuple[int, ...] = 35,
        boxes: int = 5,
        seed: int = 0,
        batch: int = 2,
        size: tuple[int, int] = (44, 148),
    ) -> None:
        steps = expert_strides or strides
        levels = len(strides)
        shapes = (batch, per_level(channels, levels), size)
        self.apprentice = pyramid(per_level(dtype, levels), strides, layout, seed, *shapes)
        self.expert = pyramid(per_level(expert_dtype or dtype, levels), steps, layout, seed + 1, *shapes)
        dtypes = {m.dtype for side in self.maps for m in side}
        self.computed = torch.float64 if torch.float64 in dtypes else torch.float32
        self.batch = batch
        self.boxes = boxes_in(size, boxes, batch, seed)
        self.coefficients = torch.linspace(-0.5, 1.5, len(self.boxes), dtype=torch.float64)
        self.level_weights: Tensor | None = None
        self.factor: Tensor | None = None
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
            "images": batch,
            "factor": 1.0,
        }

    def prepare(self, module: ModuleType, weighted: bool = True) -> list[np.ndarray[Any, Any]]:
        """Rows and index."""
        return prepare(
            module, self.options, [self.boxes], self.coefficients if weighted else None, self.level_weights, self.batch
        )

    def losses(self, module: ModuleType) -> list[Tensor]:
        """Per-box losses and total, without gradients."""
        losses = torch.zeros(len(self.boxes), dtype=self.computed)
        total = torch.zeros(1, dtype=self.computed)
        rows = self.prepare(module)
        module.distill(self.options, *rows, *map(every, self.maps), [], [], [], typed(losses), typed(total))
        return [losses, total]

    def distill(self, module: ModuleType, wanted: tuple[bool, bool] = (True, True)) -> list[Tensor]:
        """Total, gradients of apprentice and expert."""
        gradients = [
            [torch.zeros_like(m) for m in side] if w else [] for side, w in zip(self.maps, wanted, strict=True)
        ]
        total = torch.zeros(1, dtype=self.computed)
        nothing = torch.zeros(0, dtype=self.computed)
        module.distill(
            self.options,
            *self.prepare(module),
            *map(every, self.maps),
            [] if self.factor is None else [typed(self.factor)],
            *map(every, gradients),
            typed(nothing),
            typed(total),
        )
        return [total, *gradients[0], *gradients[1]]

    @property
    def maps(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.apprentice, self.expert

    def _expected_losses(self) -> tuple[Tensor, list[Tensor]]:
        exact = [[m.double().requires_grad_() for m in side] for side in self.maps]
        losses = reference.soft_roi_distill(
            *exact, self.boxes, **self.geometry, expert_strides=self.expert_strides, reduction="none",
            box_weights=self.coefficients, level_weights=self.level_weights,
        )  # fmt: skip
        return losses, exact[0] + exact[1]

    def expected_losses(self) -> list[Tensor]:
        losses = self._expected_losses()[0].detach()
        return [losses, losses.sum()[None]]

    def expected_distill(self) -> list[Tensor]:
        losses, maps = self._expected_losses()
        total = (losses if self.factor is None else losses * self.factor.double()).sum()
        return [total.detach()[None], *torch.autograd.grad(total, maps)]

    def align(self, module: ModuleType) -> list[Tensor]:
        """Pooled features, and gradients for a fixed gradient of theirs."""
        first = self.apprentice[0]
        output = torch.zeros(len(self.boxes), first.shape[1], *self.geometry["output_size"], dtype=first.dtype)
        rows = self.prepare(module, weighted=False)
        module.align(self.options, *rows, every(self.apprentice), typed(output))
        gradients = [torch.zeros_like(m) for m in self.apprentice]
        module.align_backward(self.options, *rows, typed(self.output_gradient(output)), every(gradients))
        return [output, *gradients]

    def output_gradient(self, output: Tensor) -> Tensor:
        values = torch.linspace(-1.0, 2.0, output.numel(), dtype=torch.float64)
        return values.view(output.shape).to(self.apprentice[0].dtype)

    def expected_align(self) -> list[Tensor]:
        exact = [m.double().requires_grad_() for m in self.apprentice]
        output = reference.multilevel_roi_align(exact, self.boxes, **self.geometry, level_weights=self.level_weights)
        gradient = self.output_gradient(output).double()
        return [output.detach(), *torch.autograd.grad(output, exact, gradient)]

    def check(self, got: list[Tensor], expected: list[Tensor]) -> None:
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            if a.numel() == 0:
                continue
            error, largest = float((a.double() - b).abs().max()), float(b.abs().max())
            tolerance = max(TOLERANCE[a.dtype], TOLERANCE[self.computed])
            slack = 1e-6 if a.dtype == torch.float16 else 0.0  # float16 is no finer
            assert error <= tolerance * largest + slack, (error, largest)

    def right(self, module: ModuleType) -> None:
        """Check the loss and its gradients, and pooling where the maps agree in channels and dtype."""
        self.check(self.losses(module), self.expected_losses())
        self.check(self.distill(module), self.expected_distill())
        if len({(m.dtype, m.shape[1]) for m in self.apprentice}) == 1 and (
            self.apprentice[0].dtype == torch.float64 or self.computed == torch.float32
        ):
            self.check(self.align(module), self.expected_align())


def prepare(
    module: ModuleType,
    options: dict[str, Any],
    boxes: Sequence[Tensor],
    box_weights: Tensor | None,
    level_weights: Tensor | None,
    images: int,
) -> list[np.ndarray[Any, Any]]:
    count, levels = sum(map(len, boxes)), len(options["strides"])
    rows, index = np.zeros((count, 5 + levels)), np.zeros(images + 1 + count, dtype=np.int32)
    weights = [[] if w is None else [typed(w)] for w in (box_weights, level_weights)]
    module.prepare({**options, "images": images}, every(boxes), *weights, rows, index)
    return [rows, index]


def expected_prepare(
    options: dict[str, Any],
    boxes: Sequence[Tensor],
    box_weights: Tensor | None,
    level_weights: Tensor | None,
    images: int,
    mean: bool = False,
) -> list[Tensor]:
    names = ("strides", "sigma", "canonical_size", "canonical_level")
    checked = check_options(**{name: options[name] for name in names}, assignment=ASSIGNMENTS[options["assignment"]])
    return list(reference.prepare_boxes(BoxInputs(list(boxes), box_weights, level_weights, images, mean), checked))


def launches(module: ModuleType, run: Callable[[], object]) -> int:
    """How many kernels a call launches."""
    module.counts()
    run()
    count: int = module.counts()["launches"]
    return count
