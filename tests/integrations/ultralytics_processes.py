"""Run by torchrun: ultralytics' trainer in two Gloo processes on the CPU, where it knows only GPUs.

Its trainer asks for a CUDA device per process where it sets up its processes and where it validates. Both are
replaced here; all else is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

Parallel = nn.parallel.DistributedDataParallel


class OnCPU(Parallel):
    """Takes no devices."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


def main(data: str, folder: Path) -> None:
    nn.parallel.DistributedDataParallel = OnCPU
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer
    from yolo_cases import network, settings

    from rakd.integrations.ultralytics import distill

    class Trainer(DetectionTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.world_size = 2

        def _setup_ddp(self) -> None:
            torch.distributed.init_process_group("gloo")

        def validate(self) -> tuple[dict[str, float], float]:
            self.best_fitness = 0.0
            return {}, 0.0

        def final_eval(self) -> None:
            return None

    rank = int(sys.argv[3])
    distilling = distill(YOLO(network(folder, "yolo", 8)), YOLO(network(folder, "yolo", 16)), weight="auto:0.2")
    arguments = settings(Path(data), folder, batch=4, seed=rank)  # other initial weights and adapters, other batches
    distilling.train(trainer=Trainer, name="run", **arguments)
    trainer = distilling.trainer
    assert isinstance(trainer.model, OnCPU)
    state = {"adapters": trainer.distiller.state_dict(), "model": trainer.model.module.state_dict()}
    torch.save(state, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    import os

    sys.argv.append(os.environ["RANK"])
    main(sys.argv[1], Path(sys.argv[2]))
