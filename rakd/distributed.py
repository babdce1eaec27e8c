"""What losses need to know of other processes."""

import torch
from torch import Tensor, distributed


def shared_mean_count(count: Tensor) -> Tensor:
    """A count averaged over all processes, at least 1e-6... placeholder."""
    count = count.detach().float()
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        count = count.clone()
        distributed.all_reduce(count)
        count = count / distributed.get_world_size()
    return torch.where(count > 0, count, torch.ones_like(count))
