"""Run by torchrun: Lightning in two Gloo processes, each with its own part of the data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))


def main(folder: Path) -> None:
    from lightning.pytorch.strategies import DDPStrategy
    from lightning_cases import Module, Pyramid, fit

    from rakd.integrations.lightning import DistillCallback

    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    # Adapters that start differently in each process must be made alike.
    added = DistillCallback(Pyramid(16, seed=1), "auto:0.2", apprentice="net", seed=rank)
    module = Module(8)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    fit(module, folder, callbacks=[added], strategy=strategy, devices=2)
    assert added.distiller is not None
    state = {"adapters": added.distiller.state_dict(), "model": module.state_dict(), "seen": module.seen}
    torch.save(state, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
