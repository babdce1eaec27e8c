"""Registered ops: schemas, shapes for tracing (fake implementations) and gradients.

The compiled libraries implement these ops for their device. All take boxes as float64 ``[K, 5]`` and, where a loss
is computed, one float64 coefficient per box (its weight and the reduction's factor). Losses come back in float64.

- ``distill_loss``: total and per-box losses.
- ``distill_gradient``: total, and the gradient of the total with respect to the maps asked for (on the CPU also none).
- ``scale_gradients``: multiplies gradients in place by a number on their device (CUDA only).
- ``align``, ``align_backward``: multi-level RoIAlign and its transpose.
- ``level_weights``: the level rule of compiled code, for the tests that hold it equal to ``levels.py``.
- ``release_memory``: gives back what the CPU library keeps between calls.

``triton_distill_loss`` and so on are the same ops as Triton kernels; apart, so that either can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rakd_ops import _backends
from rakd_ops._inputs import Distillation, Settings
from rakd_ops.levels import ASSIGNMENTS

_RULE = "int assignment, float sigma, float canonical_size, float canonical_level"
_GEOMETRY = f"int[] output_size, int sampling_ratio, {_RULE}"
_MAPS = "Tensor[] apprentice, Tensor[] expert, Tensor boxes, Tensor coefficients"
_SCHEMAS = {
    "distill_loss": f"({_MAPS}, float[] strides, float[] expert_strides, {_GEOMETRY}) -> (Tensor, Tensor)",
    "distill_gradient": (
        f"({_MAPS}, float[] strides, float[] expert_strides, {_GEOMETRY}, "
        "bool apprentice_gradient, bool expert_gradient) -> (Tensor, Tensor[])"
    ),
    "align": f"(Tensor[] features, Tensor boxes, float[] strides, {_GEOMETRY}) -> Tensor",
    "align_backward": (
        "(Tensor output_gradient, Tensor boxes, SymInt[] shapes, bool[] channels_last, float[] strides, "
        f"{_GEOMETRY}) -> Tensor[]"
    ),
    "scale_gradients": "(Tensor(a!)[] gradients, Tensor factor) -> ()",
    "level_weights": f"(Tensor boxes, float[] strides, {_RULE}) -> Tensor",
    "release_memory": "() -> ()",
}
_CPU_ONLY = ("level_weights", "release_memory")
_CUDA_ONLY = ("scale_gradients",)


def _triton_op(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        from rakd_ops import _triton  # imports triton: not before somebody needs it

        return getattr(_triton, name)(*arguments)

    return call


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"rakd_ops::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    if _name not in (*_CPU_ONLY, *_CUDA_ONLY):
        torch.library.define(f"rakd_ops::triton_{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"rakd_ops::triton_{_name}", ("cpu", "cuda"), _triton_op(_name))
_backends.load_backends()


def _op(name: str, backend: str) -> Any:
    """Return the op of a backend; the compiled libraries share theirs, told apart by the tensors' device."""
    return getattr(torch.ops.rakd_ops, f"triton_{name}" if backend == "triton" else name)


def _is_channels_last(feature: Tensor) -> bool:
    """Layout that a map's gradient takes (``csrc/maps.h`` states the same rule)."""
    return feature.stride(1) == 1 and feature.size(1) > 1 and not feature.is_contiguous()


def _is_dense(feature: Tensor) -> bool:
    return feature.is_contiguous() or feature.is_contiguous(memory_format=torch.channels_last)


def _empty_gradient(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


@torch.library.register_fake("rakd_ops::triton_distill_loss")
@torch.library.register_fake("rakd_ops::distill_loss")
def _(apprentice: list[Tensor], expert: list[Tensor], boxes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return boxes.new_empty(()), boxes.new_empty(boxes.shape[0])


@torch.library.register_fake("rakd_ops::triton_distill_gradient")
@torch.library.register_fake("rakd_ops::distill_gradient")
def _(apprentice: list[Tensor], expert: list[Tensor], boxes: Tensor, *options: Any) -> tuple[Tensor, list[Tensor]]:
    apprentice_gradient, expert_gradient = options[-2:]
    wanted = (apprentice if apprentice_gradient else []) + (expert if expert_gradient else [])
    return boxes.new_empty(()), [_empty_gradient(m, m.shape, _is_channels_last(m)) for m in wanted]


@torch.library.register_fake("rakd_ops::triton_align")
@torch.library.register_fake("rakd_ops::align")
def _(features: list[Tensor], boxes: Tensor, strides: list[float], output_size: list[int], *_: Any) -> Tensor:
    return features[0].new_empty((boxes.shape[0], features[0].shape[1], *output_size))


@torch.library.register_fake("rakd_ops::triton_align_backward")
@torch.library.register_fake("rakd_ops::align_backward")
def _(
    output_gradient: Tensor,
    boxes: Tensor,
    shapes: list[int],
    channels_last: list[bool],
    strides: list[float],
    *_: Any,
) -> list[Tensor]:
    return [
        _empty_gradient(output_gradient, shapes[4 * level : 4 * level + 4], last)
        for level, last in enumerate(channels_last)
    ]


@torch.library.register_fake("rakd_ops::scale_gradients")
def _(gradients: list[Tensor], factor: Tensor) -> None:
    return None


@torch.library.register_fake("rakd_ops::level_weights")
def _(boxes: Tensor, strides: list[float], *_: Any) -> Tensor:
    return boxes.new_empty((boxes.shape[0], len(strides)))


def _loss_dtype(maps: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if maps[0].dtype == torch.float64 else torch.float32


def _split(maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    half = len(maps) // 2
    return list(maps[:half]), list(maps[half:])


def _graph_is_kept() -> bool:
    """Whether the running backward retains its graph; True where this torch cannot tell."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def _savable(values: Sequence[Any]) -> Sequence[Any]:
    """Copy tensors made under ``torch.inference_mode``, which autograd refuses to keep (an expert's maps, say)."""
    if torch.compiler.is_compiling():
        return values
    return [v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in values]


def _place_gradients(gradients: Sequence[Tensor], wanted: tuple[bool, bool], levels: int) -> tuple[Tensor | None, ...]:
    """Arrange gradients as (apprentice's, expert's), None for a side that was not wanted."""
    remaining = iter(gradients)
    return tuple(next(remaining) if side else None for side in wanted for _ in range(levels))


class _Anchor(torch.autograd.Function):
    """An empty tensor that depends on the maps, so that second derivatives find their way to the error below."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return maps[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _RefuseDoubleBackward(torch.autograd.Function):
    """Passes gradients through; asked to differentiate them, says that this is not supported."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "rakd_ops: the gradients of soft_roi_distill and multilevel_roi_align cannot be differentiated again "
            "(double backward); use backend='reference' where that is needed"
        )


def _anchor(maps: Sequence[Tensor]) -> Tensor | None:
    """Return what a Function keeps to refuse double backward.

    torch's ``once_differentiable`` only notices when the incoming gradient requires one, and else takes our gradients
    for constants: second derivatives would be silently wrong. Keeping the maps themselves would hold their memory and
    forbid changing them in place.
    """
    if torch.compiler.is_compiling():  # refuses by itself
        return None
    anchor: Tensor = _Anchor.apply(*maps)
    return anchor


def _once(anchor: Tensor | None, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Under ``create_graph=True``, make second derivatives an error."""
    if anchor is None or not torch.is_grad_enabled():
        return gradients
    refusing: tuple[Tensor, ...] = _RefuseDoubleBackward.apply(anchor, *gradients)
    return refusing


# `autograd.Function` does not see tensors inside lists, so maps are passed flat: the apprentice's, then the expert's.
class _DistillTotal(torch.autograd.Function):
    """Sum of the losses; the gradient is computed with the loss and only scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        boxes: Tensor,
        coefficients: Tensor,
        options: tuple[Any, ...],
        wanted: tuple[bool, bool],
        backend: str,
        *maps: Tensor,
    ) -> Tensor:
        apprentice, expert = _split(maps)
        total, gradients = _op("distill_gradient", backend)(apprentice, expert, boxes, coefficients, *options, *wanted)
        ctx.save_for_backward(anchor, *gradients)
        ctx.backend = backend
        ctx.wanted = wanted
        ctx.levels = len(apprentice)
        return total.to(_loss_dtype(maps))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        anchor, *saved = ctx.saved_tensors
        scaled: Sequence[Tensor]
        # Where nobody will read the saved tensors again, they become the result: no further memory, and no pass over
        # it where the factor is 1.
        last = not torch.compiler.is_compiling() and not _graph_is_kept()
        if last and ctx.backend == "cuda" and all(map(_is_dense, saved)):  # which hooks on saved tensors may change
            _op("scale_gradients", "cuda")(saved, gradient)
            scaled = saved
        elif not last or gradient.device.type != "cpu":
            # The product in the loss's dtype: a scalar rounded to bfloat16 would put all gradients off alike.
            scaled = [(g.to(gradient.dtype) * gradient).to(g.dtype) for g in saved]
        else:
            factor = gradient.item()
            scaled = saved if factor == 1.0 else [g.mul_(factor) for g in saved]
        scaled = _once(anchor, scaled)
        return None, None, None, None, None, None, *_place_gradients(scaled, ctx.wanted, ctx.levels)


class _DistillPerBox(torch.autograd.Function):
    """Losses per box, or their sum; the gradient is computed on the way back, when its scale is known.

    For ``reduction="none"``, and for float16: gradients of a mean over boxes and channels lie below float16's range
    until the loss scale of mixed-precision training, which arrives with the backward pass, lifts them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        boxes: Tensor,
        coefficients: Tensor,
        options: tuple[Any, ...],
        wanted: tuple[bool, bool],
        backend: str,
        reduce: bool,
        *maps: Tensor,
    ) -> Tensor:
        apprentice, expert = _split(maps)
        if reduce and backend == "cpu":  # which need not compute the boxes' losses to have their sum
            result, _ = _op("distill_gradient", backend)(
                apprentice, expert, boxes, coefficients, *options, False, False
            )
        else:
            total, losses = _op("distill_loss", backend)(apprentice, expert, boxes, coefficients, *options)
            result = total if reduce else losses
        ctx.save_for_backward(anchor, boxes, coefficients, *maps)
        ctx.options = options
        ctx.wanted = wanted
        ctx.backend = backend
        return result.to(_loss_dtype(maps))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        anchor, boxes, coefficients, *maps = ctx.saved_tensors
        apprentice, expert = _split(maps)
        _, gradients = _op("distill_gradient", ctx.backend)(
            apprentice, expert, boxes, coefficients * gradient.to(torch.float64), *ctx.options, *ctx.wanted
        )
        gradients = _once(anchor, gradients)
        placed = _place_gradients(gradients, ctx.wanted, len(apprentice))
        return None, None, None, None, None, None, None, *placed


class _Align(torch.autograd.Function):
    """Multi-level RoIAlign."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor | None, boxes: Tensor, options: tuple[Any, ...], backend: str, *maps: Tensor
    ) -> Tensor:
        ctx.save_for_backward(anchor, boxes)
        ctx.options = options
        ctx.backend = backend
        ctx.shapes = [size for feature in maps for size in feature.shape]
        ctx.channels_last = [_is_channels_last(feature) for feature in maps]
        output: Tensor = _op("align", backend)(list(maps), boxes, *options)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        anchor, boxes = ctx.saved_tensors
        backward = _op("align_backward", ctx.backend)
        gradients = backward(gradient, boxes, ctx.shapes, ctx.channels_last, *ctx.options)
        return None, None, None, None, *_once(anchor, gradients)


def distill(inputs: Distillation, settings: Settings, reduction: str, backend: str) -> Tensor:
    """``soft_roi_distill`` by the registered ops, on checked arguments."""
    maps = (*inputs.apprentice, *inputs.expert)
    options = (list(settings.strides), list(inputs.expert_strides), *settings.for_op())
    wanted = (any(m.requires_grad for m in inputs.apprentice), any(m.requires_grad for m in inputs.expert))
    differentiated = torch.is_grad_enabled() and any(wanted)
    if not differentiated or reduction == "none" or maps[0].dtype == torch.float16:
        # Also where nothing is to be differentiated: the Function refuses forward-mode derivatives, which the op alone
        # would silently take for zero.
        arguments = (inputs.boxes, inputs.coefficients, options, wanted, backend, reduction != "none")
        if not differentiated:
            return _DistillPerBox.apply(None, *arguments, *maps)
        return _DistillPerBox.apply(_anchor(maps), *_savable(arguments), *_savable(maps))
    return _DistillTotal.apply(_anchor(maps), inputs.boxes, inputs.coefficients, options, wanted, backend, *maps)


def align(maps: list[Tensor], boxes: Tensor, settings: Settings, backend: str) -> Tensor:
    """``multilevel_roi_align`` by the registered ops, on checked arguments."""
    options = (list(settings.strides), *settings.for_op())
    return _Align.apply(_anchor(maps), *_savable((boxes,)), options, backend, *maps)


def compiled_level_weights(boxes: Tensor, settings: Settings) -> Tensor:
    """Level weights of checked boxes by compiled code (CPU)."""
    rule = (
        ASSIGNMENTS.index(settings.assignment),
        settings.sigma,
        settings.canonical_size,
        settings.canonical_level,
    )
    weights: Tensor = torch.ops.rakd_ops.level_weights(boxes, list(settings.strides), *rule)
    return weights
