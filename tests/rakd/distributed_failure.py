"""One process fails while the other waits for it, for ``torchrun distributed_failure.py``; a test looks at the end."""

import torch

from rakd.distributed import all_reduce_mean, start_processes
from rakd.errors import UserError

with start_processes("cpu") as processes:
    all_reduce_mean(torch.ones(1))
    if not processes.is_main:
        raise UserError("the second process has its own trouble")
    all_reduce_mean(torch.ones(1))
