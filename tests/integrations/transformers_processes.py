"""Run by torchrun: transformers' Trainer in two Gloo processes, each with its own part of the data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))


def main(folder: Path) -> None:
    from detr_cases import make, trainer

    rank = int(os.environ["RANK"])
    # Adapters that start differently in each process must be made alike.
    distill = {"weight": "auto:0.2", "normalize": True, "seed": rank}
    run = trainer(
        make("rt_detr", 32), folder, expert=make("rt_detr", 64, seed=1), distill=distill, ddp_backend="gloo",
        ddp_find_unused_parameters=True,
    )  # fmt: skip
    state: dict[str, Any] = {"boxes": []}
    original = run.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, inputs, *args, **kwargs)
        state["boxes"].append(float(inputs["pixel_values"].sum()))
        if "start" not in state:
            state["start"] = {name: value.clone() for name, value in run.distiller.state_dict().items()}
        return result

    run.compute_loss = compute_loss
    run.train()
    state |= {"adapters": run.distiller.state_dict(), "model": run.model.state_dict()}
    torch.save(state, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
