"""Distributed training: processes that ``torchrun`` started, on one machine or many, and one process without it.

::

    torchrun --nproc-per-node 4 train.py          # or python -m torch.distributed.run
    with start_processes() as processes:
        rows = Trainer(learner, dataset, settings, out, processes.device).run()
        if processes.main:
            ...                                   # evaluate, write
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rakd.errors import UserError

T = TypeVar("T")

# The others wait while the first process evaluates and writes; torch's ten minutes would not do for a large data set.
_PATIENCE = timedelta(hours=2)


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
    def main(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0


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
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda: torch finds no CUDA device")
    cuda = device != "cpu" and torch.cuda.is_available()
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield Processes(torch.device("cuda" if cuda else "cpu"))
        return
    rank, count, local = (_variable(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK is {local}, but this machine has {torch.cuda.device_count()} CUDA devices")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if cuda else "gloo", rank=rank, world_size=count, device_id=chosen if cuda else None, timeout=_PATIENCE
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
    if dist.is_available() and dist.is_initialized():
        return Processes(device, dist.get_rank(), dist.get_world_size())
    return Processes(device)


def from_main(processes: Processes, make: Callable[[], T]) -> T:
    """Call a function in the main process and give its result, which must be picklable, to all."""
    if processes.count == 1:
        return make()
    box = [make() if processes.main else None]
    with _on(processes.device):
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def from_all(processes: Processes, value: T) -> list[T]:
    """Give each process's value, which must be picklable, to all, in the order of their ranks."""
    if processes.count == 1:
        return [value]
    box: list[T | None] = [None] * processes.count
    with _on(processes.device):
        dist.all_gather_object(box, value)
    return box  # type: ignore[return-value]


def copy_from_main(processes: Processes, tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, the same number and shapes in every process, with those of the main process."""
    if processes.count > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def mean_over(processes: Processes, values: Tensor) -> Tensor:
    """The mean of a tensor over the processes, in place; what is not finite in one is not finite in the mean."""
    if processes.count > 1:
        dist.all_reduce(values)
        values /= processes.count
    return values


def wait_for_all(processes: Processes) -> None:
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
