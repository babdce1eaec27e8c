"""Registered ops: their schemas, and shapes for tracing (fake implementations).

Steps of a call, each an op that the compiled libraries implement for their device:

1. ``prepare_boxes``: boxes, box weights, level weights and the reduction become ``rows`` (float64 ``[K, 5 + L]``:
   image, x1, y1, x2, y2, a weight a level) and ``index`` (int32 ``[images + 1 + K]``: where each image's boxes begin in
   the order that follows). It is the only op beside ``level_weights`` that knows the level rule.
2. ``distill_gradient``: the loss, and its gradient with respect to the maps asked for (on the CPU also none of them);
   ``distill_loss``: the loss and the losses of the boxes. ``factor`` multiplies all weights.
3. ``scale_gradients``: multiplies gradients in place by a number on their device (CUDA only).

``align`` and ``align_backward`` are multi-level RoIAlign and its transpose, on the same rows. ``release_memory`` gives
back the memory that the CPU library keeps between calls. ``triton_distill_loss`` and so on are the same ops as Triton
kernels; they have names of their own so that either can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rakd_ops import _backends
from rakd_ops._layout import accumulation_dtype, empty_gradient, is_channels_last
from rakd_ops._options import ALIGN_ARGUMENTS, DISTILL_ARGUMENTS

_RULE = "float[] strides, int assignment, float sigma, float canonical_size, float canonical_level"
_MAPS = "Tensor[] apprentice, Tensor[] expert, Tensor rows, Tensor index"
SCHEMAS = {
    "prepare_boxes": (
        f"(Tensor[] boxes, Tensor? box_weights, Tensor? level_weights, SymInt images, bool mean, {_RULE}) "
        "-> (Tensor, Tensor)"
    ),
    "level_weights": f"(Tensor[] boxes, {_RULE}) -> Tensor",
    "distill_loss": f"({_MAPS}, {DISTILL_ARGUMENTS}) -> (Tensor, Tensor)",
    "distill_gradient": (
        f"({_MAPS}, Tensor? factor, {DISTILL_ARGUMENTS}, "
        "bool apprentice_gradient, bool expert_gradient) -> (Tensor, Tensor[])"
    ),
    "scale_gradients": "(Tensor(a!)[] gradients, Tensor factor) -> ()",
    "align": f"(Tensor[] features, Tensor rows, Tensor index, {ALIGN_ARGUMENTS}) -> Tensor",
    "align_backward": (
        "(Tensor output_gradient, Tensor rows, Tensor index, SymInt[] shapes, bool[] channels_last, "
        f"{ALIGN_ARGUMENTS}) -> Tensor[]"
    ),
    "release_memory": "() -> ()",
}
CPU_ONLY = ("release_memory",)
TRITON = ("distill_loss", "distill_gradient", "align", "align_backward")


def _triton_op(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        from rakd_ops import _triton  # imports triton: not before somebody needs it

        return getattr(_triton, name)(*arguments)

    return call


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"rakd_ops::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    if _name in TRITON:
        torch.library.define(f"rakd_ops::triton_{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"rakd_ops::triton_{_name}", ("cpu", "cuda"), _triton_op(_name))
_backends.load_backends()


def op(name: str, backend: str) -> Any:
    """Return the op of a backend; the compiled libraries share theirs, told apart by the tensors' device."""
    return getattr(torch.ops.rakd_ops, f"triton_{name}" if backend == "triton" else name)


def call(name: str, backend: str, *arguments: Any) -> Any:
    """Call the op of a backend.

    Raises:
        torch.OutOfMemoryError: A GPU has no memory left. Through the stable ABI it comes as a RuntimeError, of which
            torch before 2.13 tells only which call failed; trainers look for the type or for these words.
        RuntimeError: The library could not do it, or an earlier kernel on that GPU had failed.
    """
    run = op(name, backend)
    if backend != "cuda" or torch.compiler.is_compiling():
        return run(*arguments)
    try:
        return run(*arguments)
    except RuntimeError as error:
        text = str(error)
        if "CUDA out of memory" in text:
            raise torch.OutOfMemoryError(text) from error
        # An allocation fails also while a graph is captured, and after an earlier kernel failed, which a query tells:
        # who then halves the batch as for want of memory would try in vain.
        if '"aten::empty"' not in text or torch.cuda.is_current_stream_capturing():
            raise
        torch.cuda.current_stream(arguments[0][0].device).query()
        raise torch.OutOfMemoryError(f"CUDA out of memory: {text}") from error


@torch.library.register_fake("rakd_ops::prepare_boxes")
def _(
    boxes: list[Tensor],
    box_weights: Tensor | None,
    level_weights: Tensor | None,
    images: int,
    mean: bool,
    strides: list[float],
    *_: Any,
) -> tuple[Tensor, Tensor]:
    count = sum(group.shape[0] for group in boxes)
    rows = boxes[0].new_empty((count, 5 + len(strides)), dtype=torch.float64)
    return rows, boxes[0].new_empty(images + 1 + count, dtype=torch.int32)


@torch.library.register_fake("rakd_ops::level_weights")
def _(boxes: list[Tensor], strides: list[float], *_: Any) -> Tensor:
    dtype = torch.float64 if boxes[0].dtype == torch.float64 else torch.float32
    return boxes[0].new_empty((sum(group.shape[0] for group in boxes), len(strides)), dtype=dtype)


@torch.library.register_fake("rakd_ops::triton_distill_loss")
@torch.library.register_fake("rakd_ops::distill_loss")
def _(apprentice: list[Tensor], expert: list[Tensor], rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(apprentice + expert)
    return rows.new_empty((), dtype=dtype), rows.new_empty(rows.shape[0], dtype=dtype)


@torch.library.register_fake("rakd_ops::triton_distill_gradient")
@torch.library.register_fake("rakd_ops::distill_gradient")
def _(apprentice: list[Tensor], expert: list[Tensor], rows: Tensor, *options: Any) -> tuple[Tensor, list[Tensor]]:
    apprentice_gradient, expert_gradient = options[-2:]
    wanted = (apprentice if apprentice_gradient else []) + (expert if expert_gradient else [])
    total = rows.new_empty((), dtype=accumulation_dtype(apprentice + expert))
    return total, [empty_gradient(m, m.shape, is_channels_last(m)) for m in wanted]


@torch.library.register_fake("rakd_ops::scale_gradients")
def _(gradients: list[Tensor], factor: Tensor) -> None:
    return None


@torch.library.register_fake("rakd_ops::triton_align")
@torch.library.register_fake("rakd_ops::align")
def _(
    features: list[Tensor], rows: Tensor, index: Tensor, strides: list[float], output_size: list[int], *_: Any
) -> Tensor:
    return features[0].new_empty((rows.shape[0], features[0].shape[1], *output_size))


@torch.library.register_fake("rakd_ops::triton_align_backward")
@torch.library.register_fake("rakd_ops::align_backward")
def _(
    output_gradient: Tensor, rows: Tensor, index: Tensor, shapes: Sequence[int], channels_last: list[bool], *_: Any
) -> list[Tensor]:
    return [
        empty_gradient(output_gradient, shapes[4 * level : 4 * level + 4], last)
        for level, last in enumerate(channels_last)
    ]
