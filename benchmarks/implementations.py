"""Implementations of the ops, backends of ``rakd_ops`` and baselines: options, making, the check that all agree.

An implementation is a function without arguments that returns the op's output on tensors it already holds; all of one
case hold the same. Baselines are written as people write the loss with torchvision: one RoIAlign per level and network
(``torchvision``), or one per level of the difference map (``difference``), each eager and compiled. In bfloat16 and
float16 they bring the maps to float32 first, as torchvision's own autocast rule does: its CPU operator lacks bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align  # type: ignore[import-untyped, unused-ignore]

import rakd_ops
from benchmarks.results import Parser
from benchmarks.timing import Advance
from benchmarks.workloads import STRIDES, Inputs, Workload
from rakd_ops import available_backends

BASELINES = {
    "distill": ("torchvision", "difference", "torchvision-compiled", "difference-compiled"),
    "align": ("torchvision",),
}
COMPILED = "-compiled"
ROWS = "-rows"  # of the name of a backend that takes boxes as one [K, 5] tensor instead of a list
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", f"cuda{ROWS}", "triton", "reference")}  # by device
# Largest difference of outputs and of gradients, relative to the largest value: several times the error of
# torchvision's float32 sample positions; the halves' is that of rounding a gradient to their 8 and 11 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
# The gradient of a mean over K C P² values lies below float16's range; training scales the loss, as here.
LOSS_SCALE = {"float16": 2.0**16}


def check_names(option: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse names that are not among those allowed; the message names the option."""
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option}: expected some of {', '.join(allowed)}, got {name!r}")


def choose_backends(backends: Sequence[str], device: str) -> tuple[str, tuple[str, ...]]:
    """Return the device, resolved if ``"auto"``, and the backends, all that run there if none is asked for.

    Raises:
        ValueError: The device is not there, or a backend cannot run on it; the message says why.
    """
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError("device: 'cuda' was asked for, but torch finds no CUDA device")
    if device == "auto":
        device = "cuda" if there else "cpu"
    state = available_backends()
    reasons = {name: state[name.removesuffix(ROWS)] for names in BACKENDS.values() for name in names}
    check_names("backends", backends, list(reasons))
    for name in backends:
        if reasons[name] is not True:
            raise ValueError(f"backends: {name!r} cannot run here: {reasons[name]}")
        if name not in BACKENDS[device]:
            raise ValueError(f"backends: {name!r} takes no tensors on the device {device!r}")
    return device, tuple(backends) or tuple(name for name in BACKENDS[device] if reasons[name] is True)


def add_options(parser: Parser) -> None:
    """Add the options that choose implementations and where they run."""
    parser.add_argument("--backends", nargs="+", default=(), metavar="NAME", help="of rakd_ops: cpu, cuda, cuda-rows "
                        "(boxes as one tensor instead of a list), triton, reference (default: those that run on the "
                        "device)")  # fmt: skip
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_threads()
    parser.add_number("--seed", 0, minimum=0, text="of boxes and maps")


class DisagreementError(ValueError):
    """Two implementations compute different things: their times must not be compared."""


@dataclass(frozen=True)
class Implementation:
    """One implementation, ready to run."""

    name: str  # "rakd:<backend>" or a baseline's
    forward: Callable[[], Tensor]  # computes the op's output


def _pool(feature: Tensor, boxes: Tensor, stride: int, workload: Workload) -> Tensor:
    size = (workload.output_size, workload.output_size)
    pooled: Tensor = roi_align(feature.float(), boxes, size, 1.0 / stride, workload.sampling_ratio, aligned=True)
    return pooled


def torchvision_loss(inputs: Inputs, workload: Workload) -> Tensor:
    """Compute the loss by RoIAlign per level and network."""
    weights = rakd_ops.level_weights(inputs.boxes, strides=STRIDES)
    total = weights.new_zeros(())
    for level, stride in enumerate(STRIDES):
        pooled = _pool(inputs.apprentice[level], inputs.boxes, stride, workload)
        difference = pooled - _pool(inputs.expert[level], inputs.boxes, stride, workload)
        total = total + (weights[:, level] * difference.square().mean(dim=(1, 2, 3))).sum()
    return total / workload.boxes


def difference_loss(inputs: Inputs, workload: Workload) -> Tensor:
    """Compute the same with one RoIAlign per level, of the difference map: RoIAlign is linear."""
    weights = rakd_ops.level_weights(inputs.boxes, strides=STRIDES)
    total = weights.new_zeros(())
    for level, stride in enumerate(STRIDES):
        pooled = _pool(inputs.apprentice[level] - inputs.expert[level], inputs.boxes, stride, workload)
        total = total + (weights[:, level] * pooled.square().mean(dim=(1, 2, 3))).sum()
    return total / workload.boxes


_LOSSES = {"torchvision": torchvision_loss, "difference": difference_loss}


def _distill_baseline(name: str, inputs: Inputs, workload: Workload) -> Callable[[], Tensor]:
    loss = _LOSSES[name.removesuffix(COMPILED)]
    if name.endswith(COMPILED):
        loss = torch.compile(loss)
    return lambda: loss(inputs, workload)


def _align_baseline(_: str, inputs: Inputs, workload: Workload) -> Callable[[], Tensor]:
    """Return torchvision's pooler, on boxes moved so that it computes the same values.

    ``MultiScaleRoIAlign`` samples half a cell further right and down than ``aligned=True`` does. Each box has
    one level, so half a cell of that level is taken off the box beforehand, outside the measured time.
    """
    names = [str(level) for level in range(len(STRIDES))]
    pool = MultiScaleRoIAlign(names, workload.output_size, workload.sampling_ratio)
    chosen = rakd_ops.level_weights(inputs.boxes, strides=STRIDES, assignment="hard")
    half_cell = chosen @ chosen.new_tensor(STRIDES) / 2
    moved = inputs.boxes[:, 1:] - half_cell[:, None]
    boxes = [moved[inputs.boxes[:, 0] == image] for image in range(workload.batch)]
    image_sizes = [(workload.height, workload.width)] * workload.batch

    def forward() -> Tensor:
        maps = {name: feature.float() for name, feature in zip(names, inputs.apprentice, strict=True)}
        pooled: Tensor = pool(maps, boxes, image_sizes)
        return pooled.to(inputs.apprentice[0].dtype)

    return forward


def _backend(op: str, name: str, inputs: Inputs, workload: Workload) -> Callable[[], Tensor]:
    backend = name.removesuffix(ROWS)
    boxes = inputs.boxes if name.endswith(ROWS) else inputs.box_list()
    call = functools.partial(rakd_ops.multilevel_roi_align, inputs.apprentice)
    if op == "distill":
        call = functools.partial(rakd_ops.soft_roi_distill, inputs.apprentice, inputs.expert)
    size, samples = workload.output_size, workload.sampling_ratio
    return lambda: call(boxes, strides=STRIDES, output_size=size, sampling_ratio=samples, backend=backend)


def make_implementations(
    op: str, inputs: Inputs, workload: Workload, backends: Sequence[str], baselines: Sequence[str]
) -> list[Implementation]:
    """Make the implementations of one case on the same tensors: the backends in the order given, then the baselines.

    Backends of ``rakd_ops`` take a list of boxes, as trainers have them; ``"cuda-rows"`` takes one ``[K, 5]`` tensor,
    as the baselines do.
    """
    torch.compiler.reset()  # another shape would make torch.compile generalise over shapes
    make_baseline = _distill_baseline if op == "distill" else _align_baseline
    ours = [Implementation(f"rakd:{name}", _backend(op, name, inputs, workload)) for name in backends]
    return ours + [Implementation(name, make_baseline(name, inputs, workload)) for name in baselines]


def run_forward(implementation: Implementation) -> Tensor:
    """Compute the output alone, as in validation: nothing is kept for a backward."""
    with torch.no_grad():
        return implementation.forward()


def run_training(implementation: Implementation, maps: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Compute the output and the gradients of maps, which are allocated anew, as in a training step.

    ``upstream`` is the gradient of the output.
    """
    return torch.autograd.grad(implementation.forward(), list(maps), upstream)


def make_upstream(op: str, implementation: Implementation, dtype: str) -> Tensor:
    """Make the gradient that flows into the op: the loss scale, or random values for pooled outputs."""
    output = run_forward(implementation)
    if op == "distill":
        return torch.full_like(output, LOSS_SCALE.get(dtype, 1.0))
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output.device, output.dtype)


def _relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    if value.shape != expected.shape:
        return float("inf")
    scale = float(expected.detach().abs().amax()) or 1.0
    error = float((value.detach().double() - expected.detach().double()).abs().amax()) / scale
    return error if error == error else float("inf")


def check_agreement(
    implementations: Sequence[Implementation], maps: Sequence[Tensor], upstream: Tensor, dtype: str, advance: Advance
) -> dict[str, str]:
    """Run every implementation once and compare its output and the maps' gradients with those of the first.

    Returns:
        The compiled baselines that torch.compile cannot make here, and why not.

    Raises:
        DisagreementError: A difference exceeds ``TOLERANCE[dtype]``; the message names implementations and place.
    """
    first = implementations[0]
    expected: list[Tensor] = []
    failed = {}
    for implementation in implementations:
        try:
            output = implementation.forward()
            gradients = torch.autograd.grad(output, list(maps), upstream.to(output.dtype))
            if implementation.name.endswith(COMPILED):
                run_forward(implementation)  # compiled apart
        except Exception as error:
            if not implementation.name.endswith(COMPILED):
                raise
            failed[implementation.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            advance(1)
            continue
        values = [output.detach(), *gradients]
        expected = expected or values
        for place, (value, wanted) in enumerate(zip(values, expected, strict=True)):
            error_size = _relative_error(value, wanted)
            if error_size > TOLERANCE[dtype]:
                where = "output" if place == 0 else f"gradient of map {place - 1}"
                raise DisagreementError(
                    f"{implementation.name} and {first.name} disagree: the {where} differs by {error_size:.1e} of its "
                    f"largest value (tolerance {TOLERANCE[dtype]:.0e}); not timed"
                )
        advance(1)
    return failed
