"""Keeps what a method learns alike in all processes where nobody wraps the distiller in DistributedDataParallel."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def _processes() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


class GradientAverage:
    """Averages the gradients of a module's parameters over processes at the end of every backward.

    One collective for all of them, before gradients are clipped or looked at. An average of averages is the average:
    where DistributedDataParallel wraps the module after all, or gradients are accumulated over several backwards, the
    result is the same.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._parameters: list[nn.Parameter] = []
        self._queued = False

    def attach(self, module: nn.Module) -> None:
        """Start, unless there is one process, nothing learns, or it has been done; parameters start as rank 0's."""
        self._queued = False  # a backward that failed has left it set
        if _processes() < 2:
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        if [id(p) for p in parameters] == [id(p) for p in self._parameters]:
            return
        self.close()
        self._parameters = parameters
        with torch.no_grad():
            for tensor in (*parameters, *module.buffers()):
                torch.distributed.broadcast(tensor, 0)
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in parameters]  # type: ignore[no-untyped-call]

    def _note(self, parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            # Runs once the whole graph is done, in all processes alike, whatever order their gradients came in.
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    def _average(self) -> None:
        self._queued = False
        groups: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in groups.values():
            flat = torch.cat([g.reshape(-1) for g in gradients])
            torch.distributed.all_reduce(flat)
            flat /= _processes()
            parts = torch.split(flat, [g.numel() for g in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def close(self) -> None:
        """Stop."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._parameters = [], []

    def __getstate__(self) -> dict[str, Any]:
        """Start anew in copies."""
        return {"_handles": [], "_parameters": [], "_queued": False}
