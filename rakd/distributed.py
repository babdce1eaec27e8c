"""What several processes that train one network must agree on."""

import torch
import torch.distributed
from torch import Tensor


def shared_mean_count(count: Tensor | int, device: torch.device) -> Tensor:
    """Average a count over all processes: what each divides its sum by, so that together they give the global mean.

    DistributedDataParallel averages gradients over processes. Were each process to divide its sum by its own count,
    that average would be a mean of means, and an object on a process with few of them would weigh more than one on a
    process with many. Dividing by the mean count instead gives the gradients of one process with the whole batch.

    Without `torch.distributed`, or with one process, this is the count itself. Else it is a collective: every
    process must call it, equally often, also with a count of 0 and also under `torch.no_grad`.

    Args:
        count: Of this process: an integer, or a tensor of no dimensions on any device. No gradient flows to it.
        device: Where the result is wanted; with NCCL, this process's GPU.

    Returns:
        A float64 scalar; 1 where the mean count is 0, so that a sum of nothing divided by it is 0. float64 without
        dimensions leaves the dtype of whatever it divides as it is.

    Raises:
        ValueError: The count is negative or not a scalar.
        TypeError: The count is neither an integer nor a tensor.
    """
    if isinstance(count, Tensor):
        if count.dim() != 0:
            raise ValueError(f"count: expected a tensor without dimensions, got shape {list(count.shape)}")
        mean = count.detach().to(device, torch.float64, copy=True)
    elif isinstance(count, int) and not isinstance(count, bool):
        if count < 0:
            raise ValueError(f"count: expected 0 or more, got {count}")
        mean = torch.full((), count, dtype=torch.float64, device=device)
    else:
        raise TypeError(f"count: expected an integer or a tensor, got {type(count).__name__}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            torch.distributed.all_reduce(mean)
            mean = mean / processes
    return torch.where(mean == 0, torch.ones_like(mean), mean)


def shared_mean(values: Tensor) -> Tensor:
    """Average numbers over all processes; without `torch.distributed`, or with one process, they are as they were.

    A collective: every process must call it, equally often, with equal shapes. No gradient flows.
    """
    mean = values.detach()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            mean = mean.clone()
            torch.distributed.all_reduce(mean)
            mean = mean / processes
    return mean
