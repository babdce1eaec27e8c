"""Who is measured: the package's backends, and what people write with torchvision instead.

A contender is a function without arguments that returns the op's output on tensors it already holds. All
contenders of one measurement hold the same tensors.

The peers in bfloat16 and float16 bring the maps to float32 first, as torchvision's own autocast rule does:
its CPU operator lacks bfloat16, and pooling accumulated in half precision would not be the same computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import (  # type: ignore[import-untyped, unused-ignore]
    MultiScaleRoIAlign,
    roi_align,
)

import rakd_ops
from benchmarks.workloads import STRIDES, Inputs, Workload

PEERS = {
    "distill": ("torchvision", "difference", "torchvision-compiled", "difference-compiled"),
    "align": ("torchvision",),
}


@dataclass(frozen=True)
class Contender:
    """One implementation, ready to run.

    Attributes:
        name: ``"rakd:<backend>"`` or a peer's name.
        forward: Computes the op's output.
    """

    name: str
    forward: Callable[[], Tensor]


def _pool(feature: Tensor, boxes: Tensor, stride: int, workload: Workload) -> Tensor:
    size = (workload.output_size, workload.output_size)
    pooled: Tensor = roi_align(feature.float(), boxes, size, 1.0 / stride, workload.sampling_ratio, aligned=True)
    return pooled


def torchvision_loss(inputs: Inputs, workload: Workload) -> Tensor:
    """Compute the loss as people write it: RoIAlign per level and network, the rest in eager PyTorch."""
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


def _distill_peer(peer: str, inputs: Inputs, workload: Workload) -> Callable[[], Tensor]:
    loss = _LOSSES[peer.removesuffix("-compiled")]
    if peer.endswith("-compiled"):
        loss = torch.compile(loss)
    return lambda: loss(inputs, workload)


def _distill_backend(backend: str, inputs: Inputs, workload: Workload) -> Callable[[], Tensor]:
    return lambda: rakd_ops.soft_roi_distill(
        inputs.apprentice,
        inputs.expert,
        inputs.boxes,
        strides=STRIDES,
        output_size=workload.output_size,
        sampling_ratio=workload.sampling_ratio,
        backend=backend,
    )


def _align_peer(_: str, inputs: Inputs, workload: Workload) -> Callable[[], Tensor]:
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


def _align_backend(backend: str, inputs: Inputs, workload: Workload) -> Callable[[], Tensor]:
    return lambda: rakd_ops.multilevel_roi_align(
        inputs.apprentice,
        inputs.boxes,
        strides=STRIDES,
        output_size=workload.output_size,
        sampling_ratio=workload.sampling_ratio,
        backend=backend,
    )


def make_contenders(
    op: str, inputs: Inputs, workload: Workload, backends: Sequence[str], peers: Sequence[str]
) -> list[Contender]:
    """Make the contenders of one measurement.

    Args:
        op: ``"distill"`` or ``"align"``.
        inputs: The tensors that all of them work on.
        workload: The tensors' sizes.
        backends: Backends of ``rakd_ops``.
        peers: Some of ``PEERS[op]``.

    Returns:
        The backends in the order given, then the peers.
    """
    torch.compiler.reset()  # another shape would make torch.compile generalise over shapes
    backend_maker, peer_maker = {
        "distill": (_distill_backend, _distill_peer),
        "align": (_align_backend, _align_peer),
    }[op]
    contenders = [Contender(f"rakd:{name}", backend_maker(name, inputs, workload)) for name in backends]
    return contenders + [Contender(name, peer_maker(name, inputs, workload)) for name in peers]
