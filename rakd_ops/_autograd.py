"""The ops on checked arguments, with their gradients (``torch.autograd.Function``).

``autograd.Function`` does not see tensors inside lists, so maps are passed flat: the apprentice's, then the expert's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rakd_ops import reference
from rakd_ops._inputs import BoxInputs, Distillation, refuse_values
from rakd_ops._layout import is_channels_last, is_dense
from rakd_ops._options import LevelRule, RoIOptions, check_options
from rakd_ops._schemas import call


def _explain(inputs: BoxInputs) -> None:
    """Word an error of faulty values, which compiled code looks for on the CPU alone; elsewhere it is another."""
    if not torch.compiler.is_compiling() and inputs.boxes[0].device.type == "cpu":
        refuse_values(inputs)


def prepare(inputs: BoxInputs, options: RoIOptions, backend: str) -> tuple[Tensor, Tensor]:
    """Rows and index of checked boxes; see ``_schemas.py``."""
    if backend == "triton":
        return reference.prepare_boxes(inputs, options)
    rule, of_levels = options.rule, inputs.level_weights
    if torch.compiler.is_compiling() and of_levels is None:
        # An op fixes the value of a float that is handed to it, and each other value would be compiled anew. The rule
        # in plain PyTorch is traced into the graph instead, where an annealed sigma is a number like any other.
        of_levels, rule = reference.weights_by_rule(inputs.boxes, options), check_options().rule
    try:
        rows, index = call(
            "prepare_boxes",
            backend,
            inputs.boxes,
            inputs.box_weights,
            of_levels,
            inputs.images,
            inputs.mean,
            options.strides,
            *rule,
        )
    except RuntimeError:
        _explain(inputs)
        raise
    return rows, index


def weigh_levels(inputs: BoxInputs, strides: tuple[float, ...], rule: LevelRule) -> Tensor:
    """Level weights ``[K, L]`` of checked boxes by compiled code."""
    try:
        weights: Tensor = torch.ops.rakd_ops.level_weights(inputs.boxes, strides, *rule)
    except RuntimeError:
        _explain(inputs)
        raise
    return weights


def _graph_is_kept() -> bool:
    """Whether the running backward retains its graph; True where this torch cannot tell."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def _saving_is_hooked() -> bool:
    """Whether hooks see what is saved now (``torch.autograd.graph.saved_tensors_hooks``), and may keep it."""
    query = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return query is not None and not torch.compiler.is_compiling() and query(True) is not None


def _clone_inference_tensors(values: Sequence[Any]) -> Sequence[Any]:
    """Copy tensors made under ``torch.inference_mode``, which autograd refuses to keep (an expert's maps, say)."""
    if torch.compiler.is_compiling():  # which cannot ask; torch's own error then says what to do
        return values
    return [v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in values]


def _refuse_transforms(gradient: Tensor | None = None) -> None:
    """Say by ourselves that ``torch.func`` cannot see through the ops; torch's message names classes inside."""
    if torch.compiler.is_compiling():
        return
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    if (active is not None and active()) or (gradient is not None and is_batched is not None and is_batched(gradient)):
        raise RuntimeError(
            "rakd_ops: torch.func transforms (grad, vmap, jacrev, jvp) and batched gradients do not see through the "
            "compiled ops; use torch.autograd, or backend='reference'"
        )


def _refuse_in_backward(gradient: Tensor) -> None:
    """Refuse batched gradients, and ``create_graph=True``: these gradients would be taken for constants there."""
    _refuse_transforms(gradient)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "rakd_ops: the gradients of soft_roi_distill and multilevel_roi_align cannot be differentiated again "
            "(double backward, create_graph=True); use backend='reference' where that is needed"
        )


def _skips_autograd_function(maps: Sequence[Tensor]) -> bool:
    """Whether the op alone will do: without gradients under ``torch.compile``.

    Dynamo there calls ``forward`` itself, and leaves its ``ctx`` out where the number of maps makes the arguments as
    many as the parameters. Elsewhere the Function also refuses forward-mode derivatives, which the op would take for
    zero.
    """
    return torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(m.requires_grad for m in maps))


def _multiply_in_place(values: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Multiply in the loss's dtype, as where the values are kept: the same bits."""
    if dtype == torch.float64 and values.dtype != dtype:  # mul_ would round the factor to float32
        return values.copy_(values.to(dtype).mul_(factor))
    return values.mul_(factor)


def _place_gradients(gradients: Sequence[Tensor], wanted: tuple[bool, bool], levels: int) -> tuple[Tensor | None, ...]:
    """Arrange gradients as (apprentice's, expert's), None for a side that was not wanted."""
    remaining = iter(gradients)
    return tuple(next(remaining) if side else None for side in wanted for _ in range(levels))


def _loss_alone(
    apprentice: Sequence[Tensor],
    expert: Sequence[Tensor],
    rows: Tensor,
    index: Tensor,
    geometry: tuple[Any, ...],
    backend: str,
    *,
    reduce: bool,
) -> Tensor:
    """Sum of the boxes' losses, or each, without a gradient."""
    if reduce and backend == "cpu":  # which need not compute the boxes' losses to have their sum
        total, _ = call("distill_gradient", backend, apprentice, expert, rows, index, None, *geometry, False, False)
        return total
    total, losses = call("distill_loss", backend, apprentice, expert, rows, index, *geometry)
    return total if reduce else losses


class _GradientInForward(torch.autograd.Function):
    """Sum of the losses; the gradient is computed with the loss and only scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor,
        geometry: tuple[Any, ...],
        wanted: tuple[bool, bool],
        backend: str,
        *maps: Tensor,
    ) -> Tensor:
        levels = len(maps) // 2
        total, gradients = call(
            "distill_gradient", backend, maps[:levels], maps[levels:], rows, index, None, *geometry, *wanted
        )
        ctx.save_for_backward(*gradients)
        ctx.hooked = _saving_is_hooked()
        ctx.backend = backend
        ctx.wanted = wanted
        ctx.levels = levels
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_in_backward(gradient)
        saved = ctx.saved_tensors
        scaled: Sequence[Tensor]
        # Where nobody will read the saved tensors again, they become the result: no further memory, and no pass over
        # it where the factor is 1.
        last = not torch.compiler.is_compiling() and not ctx.hooked and not _graph_is_kept()
        if last and gradient.is_cuda:  # a captured backward may be replayed without the forward that left them
            last = not torch.cuda.is_current_stream_capturing()
        if last and ctx.backend == "cuda" and all(map(is_dense, saved)):  # hooks on saved tensors may change layouts
            call("scale_gradients", "cuda", saved, gradient)
            scaled = saved
        elif not last or gradient.device.type != "cpu" or type(gradient) is not Tensor:  # a fake one has no value
            # The product in the loss's dtype: a scalar rounded to bfloat16 would put all gradients off alike.
            scaled = [(g.to(gradient.dtype) * gradient).to(g.dtype) for g in saved]
        else:
            factor = gradient.item()
            scaled = saved if factor == 1.0 else [_multiply_in_place(g, factor, gradient.dtype) for g in saved]
        return None, None, None, None, None, *_place_gradients(scaled, ctx.wanted, ctx.levels)


class _GradientInBackward(torch.autograd.Function):
    """Losses per box, or their sum; the gradient is computed on the way back, when its scale is known.

    For ``reduction="none"``, and for float16: gradients of a mean over boxes and channels lie below float16's range
    until the loss scale of mixed-precision training, which arrives with the backward pass, lifts them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor,
        geometry: tuple[Any, ...],
        wanted: tuple[bool, bool],
        backend: str,
        reduce: bool,
        *maps: Tensor,
    ) -> Tensor:
        levels = len(maps) // 2
        pyramids = maps[:levels], maps[levels:]
        result = _loss_alone(*pyramids, rows, index, geometry, backend, reduce=reduce)
        ctx.save_for_backward(rows, index, *maps)
        ctx.geometry = geometry
        ctx.wanted = wanted
        ctx.backend = backend
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_in_backward(gradient)
        rows, index, *maps = ctx.saved_tensors
        levels = len(maps) // 2
        _, gradients = call(
            "distill_gradient",
            ctx.backend,
            maps[:levels],
            maps[levels:],
            rows,
            index,
            gradient,
            *ctx.geometry,
            *ctx.wanted,
        )
        return None, None, None, None, None, None, *_place_gradients(gradients, ctx.wanted, levels)


class _Align(torch.autograd.Function):
    """Multi-level RoIAlign."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, geometry: tuple[Any, ...], backend: str, *maps: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, index)
        ctx.geometry = geometry
        ctx.backend = backend
        ctx.shapes = [size for feature in maps for size in feature.shape]
        ctx.channels_last = [is_channels_last(feature) for feature in maps]
        output: Tensor = call("align", backend, maps, rows, index, *geometry)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_in_backward(gradient)
        rows, index = ctx.saved_tensors
        gradients = call(
            "align_backward", ctx.backend, gradient, rows, index, ctx.shapes, ctx.channels_last, *ctx.geometry
        )
        return None, None, None, None, *gradients


def distill(inputs: Distillation, options: RoIOptions, reduction: str, backend: str) -> Tensor:
    """``soft_roi_distill`` by the registered ops, on checked arguments."""
    _refuse_transforms()
    rows, index = prepare(inputs.boxes, options, backend)
    maps = (*inputs.apprentice, *inputs.expert)
    geometry = options.for_distill()
    wanted = (any(m.requires_grad for m in inputs.apprentice), any(m.requires_grad for m in inputs.expert))
    differentiated = torch.is_grad_enabled() and any(wanted)
    if _skips_autograd_function(maps):
        pyramids = inputs.apprentice, inputs.expert
        return _loss_alone(*pyramids, rows, index, geometry, backend, reduce=reduction != "none")
    differentiated_maps = (*(inputs.apprentice if wanted[0] else ()), *(inputs.expert if wanted[1] else ()))
    if not differentiated or reduction == "none" or any(m.dtype == torch.float16 for m in differentiated_maps):
        arguments = (rows, index, geometry, wanted, backend, reduction != "none")
        if differentiated:
            return _GradientInBackward.apply(*arguments, *_clone_inference_tensors(maps))
        return _GradientInBackward.apply(*arguments, *maps)
    return _GradientInForward.apply(rows, index, geometry, wanted, backend, *maps)


def align(maps: list[Tensor], boxes: BoxInputs, options: RoIOptions, backend: str) -> Tensor:
    """``multilevel_roi_align`` by the registered ops, on checked arguments."""
    _refuse_transforms()
    rows, index = prepare(boxes, options, backend)
    geometry = options.for_align()
    if _skips_autograd_function(maps):
        return call("align", backend, maps, rows, index, *geometry)
    return _Align.apply(rows, index, geometry, backend, *maps)
