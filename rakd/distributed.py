"""Distributed training: processes that ``torchrun`` started, on one machine or many, and one process without it.

::

    torchrun --nproc-per-node 4 train.py          # or python -m torch.distributed.run
    with start_processes() as processes:
        rows = Trainer(model, dataset, settings, out, processes.device).run()
        if processes.is_main:
            ...                                   # evaluate, write

Helpers carry the names of the torch functions that they wrap, and do nothing in a single process.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rakd.errors import UserError

T = TypeVar("T")

# The others wait while the first process evaluates and writes; torch's ten minutes would not do for a large data set.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them.

    Attributes:
        device: Where this one computes.
        rank: Its number.
        count: How many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; "auto" takes a GPU if there is one.

    Raises:
        UserError: A GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected auto or cpu, since torch finds no CUDA device; got cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def world_size() -> int:
    """The number of processes in torch's default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def start_processes(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, and leave them at the end of the block.

    Reads RANK, WORLD_SIZE and LOCAL_RANK (and torch MASTER_ADDR and MASTER_PORT). On CUDA each process takes the
    GPU numbered LOCAL_RANK and they talk through NCCL; on the CPU, through Gloo. Without these variables this
    process is the only one.

    Args:
        device: Where to compute; "auto" takes GPUs if there are any.

    Yields:
        This process's part.

    Raises:
        ValueError: A variable is missing or not a number, there is no CUDA device, or fewer than processes.
    """
    chosen = choose_device(device)
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield Processes(chosen)
        return
    rank, count, local = (_variable(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = chosen.type == "cuda"
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK is {local}, but this machine has {torch.cuda.device_count()} CUDA devices")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if cuda else "gloo", rank=rank, world_size=count, device_id=chosen if cuda else None, timeout=TIMEOUT
    )
    try:
        yield Processes(chosen, rank, count)
    except BaseException:
        # Not left in good order, for which the others would have to come: they wait in a collective for this one.
        # torchrun ends them when this process ends, with its own error the last that is said.
        _abort()
        raise
    dist.destroy_process_group()


def _abort() -> None:
    """Drop the connections without waiting for anybody."""
    # From torch 2.6 on; it has no public name.
    abort: Callable[[], None] | None = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if abort is not None and dist.get_backend() == "nccl":
        abort()


def current_processes(device: torch.device) -> Processes:
    """The processes that are there, started by `start_processes` or otherwise.

    Args:
        device: Where this one computes; "cuda" is the current GPU.
    """
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return Processes(device, dist.get_rank(), world_size()) if world_size() > 1 else Processes(device)


def broadcast_object(processes: Processes, make: Callable[[], T]) -> T:
    """Call a function in the main process and give its result, which must be picklable, to all."""
    if processes.count == 1:
        return make()
    box = [make() if processes.is_main else None]
    with _on(processes.device):
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def all_gather_object(processes: Processes, value: T) -> list[T]:
    """Give each process's value, which must be picklable, to all, in the order of their ranks."""
    if processes.count == 1:
        return [value]
    box: list[T | None] = [None] * processes.count
    with _on(processes.device):
        dist.all_gather_object(box, value)
    return box  # type: ignore[return-value]


def broadcast_state(processes: Processes, make: Callable[[], T]) -> T:
    """Call a function in the main process and give its result to all, the tensors in it without pickling them.

    Pickled into one object, a checkpoint would need its size once more in the main process and, through NCCL, on every
    GPU. Here one tensor is on its way at a time.

    Args:
        processes: All must call this.
        make: Gives nested dicts, lists and tuples of tensors and of what is small and picklable.

    Returns:
        The result; where there are several processes, with its tensors on the CPU, in their memory layout.
    """
    if processes.count == 1:
        return make()
    tensors: list[Tensor] = []

    def outline() -> T:
        def place(tensor: Tensor) -> Tensor:
            tensors.append(tensor.detach())
            return tensors[-1].to("meta")

        return _map_tensors(make(), place)

    def receive(place: Tensor) -> Tensor:
        sent = torch.empty_like(place, device=processes.device)
        if processes.is_main:
            sent.copy_(tensors.pop(0))
        dist.broadcast(sent, src=0)
        return sent.cpu()

    return _map_tensors(broadcast_object(processes, outline), receive)


def _map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A copy of nested dicts, lists and tuples with a function applied to each tensor, in their order."""
    made: Any = value
    if isinstance(value, Tensor):
        made = function(value)
    elif isinstance(value, dict):
        made = copy(value)  # with the versions of layers, which a module's state has as an attribute
        made.update({name: _map_tensors(inner, function) for name, inner in value.items()})
    elif isinstance(value, list | tuple):
        made = type(value)(_map_tensors(inner, function) for inner in value)
    return cast(T, made)


def broadcast_tensors(processes: Processes, tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, the same number and shapes in every process, with those of the main process."""
    if processes.count > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes, in place; what is not finite in one is not finite in the mean."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def barrier(processes: Processes) -> None:
    """Return when all processes have come here."""
    if processes.count > 1:
        with _on(processes.device):
            dist.barrier()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: NCCL sends objects through that, and whoever started the processes may not have."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _variable(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} must be set to a number by torchrun, got {text!r}")
    return int(text)


def shared_mean_count(count: int, device: torch.device) -> Tensor:
    """Average a count over all processes: what each divides its sum by, so that together they give the global mean.

    DistributedDataParallel averages gradients over processes. Were each process to divide its sum by its own count,
    that average would be a mean of means, and an object on a process with few of them would weigh more than one on a
    process with many. Dividing by the mean count instead gives the gradients of one process with the whole batch.

    Without `torch.distributed`, or with one process, this is the count itself. Else it is a collective: every
    process must call it, equally often, also with a count of 0 and also under `torch.no_grad`.

    Args:
        count: Of this process.
        device: Where the result is wanted; with NCCL, this process's GPU.

    Returns:
        A float64 scalar; 1 where the mean count is 0, so that a sum of nothing divided by it is 0. float64 without
        dimensions leaves the dtype of whatever it divides as it is.
    """
    mean = all_reduce_mean(torch.full((), count, dtype=torch.float64, device=device))
    return torch.where(mean == 0, torch.ones_like(mean), mean)


class GradientAverage:
    """Averages the gradients of a module's parameters over processes at the end of every backward.

    One collective for all of them, before gradients are clipped or looked at. An average of averages is the average:
    where gradients are accumulated over several backwards, or DistributedDataParallel wraps the module after all, the
    result is the same. That one may send gradients from where they lie, so it must be done before they are read here.

    Attributes:
        started: Whether gradients are averaged, or there is one process.
    """

    def __init__(self) -> None:
        self.started = world_size() < 2
        self._handles: list[Any] = []
        self._parameters: list[nn.Parameter] = []
        self._queued = False

    def attach(self, module: nn.Module) -> None:
        """Start, unless there is one process, nothing learns, or it has been done; parameters start as rank 0's."""
        self._queued = False  # a backward that failed has left it set
        self.started = True
        if world_size() < 2:
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        if [id(p) for p in parameters] == [id(p) for p in self._parameters]:
            return
        self._remove_hooks()
        self._parameters = parameters
        with torch.no_grad():
            for tensor in (*parameters, *module.buffers()):
                dist.broadcast(tensor, 0)
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in parameters]  # type: ignore[no-untyped-call]

    def _note(self, parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            # Runs once the whole graph is done, in all processes alike, whatever order their gradients came in; and
            # from there once more, after what others queued during backward: DistributedDataParallel's wait for its
            # own collectives is among it.
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._average))

    def _average(self) -> None:
        self._queued = False
        groups: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in groups.values():
            flat = all_reduce_mean(torch.cat([g.reshape(-1) for g in gradients]))
            parts = torch.split(flat, [g.numel() for g in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def close(self) -> None:
        """Stop."""
        self.started = world_size() < 2
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._parameters = [], []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Start anew in copies."""
        return GradientAverage, ()
