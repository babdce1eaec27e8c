"""One process fails while the other waits for it, for ``torchrun distributed_failure.py``; a test looks at the end."""

import torch

from rakd.errors import UserError
from rakd.training.processes import mean_over, start_processes

with start_processes("cpu") as processes:
    mean_over(processes, torch.ones(1))
    if not processes.main:
        raise UserError("the second process has its own trouble")
    mean_over(processes, torch.ones(1))
