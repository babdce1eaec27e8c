"""Trainings in several processes, for ``torchrun distributed_training.py SCENES OUT``; tests look at what they leave.

``OUT/one_to_two`` holds a checkpoint of one process to go on from.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy_model import Scripted, ToyModel, make_trainer

from rakd.data.kitti import Batch
from rakd.distributed import Processes, start_processes

SCENES, OUT = Path(sys.argv[1]), Path(sys.argv[2])


class Copying(ToyModel):
    """Keeps the checkpoint that stands before its 6th step."""

    def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
        if len(self.seen) == 5 and dist.get_rank() == 0:
            for name in ("two_to_two", "two_to_one"):
                shutil.copytree(OUT / "two", OUT / name)
        return super().forward(batch, seeds)


class Unlucky(ToyModel):
    """Loses its way in the second process alone."""

    def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
        losses = super().forward(batch, seeds)
        if len(self.seen) == 3 and dist.get_rank() == 1:
            losses["height"] = losses["height"] * float("nan")
        return losses


class Uneven(ToyModel):
    """Has a part that the second process never uses, as a head is not used in images without objects."""

    may_leave_parameters_unused = True

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(2, 2))

    def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
        losses = super().forward(batch, seeds)
        if dist.get_rank() == 0:
            losses["count"] = losses["count"] + self.extra.square().sum()
        return losses


def changed_scenes() -> Path:
    """A copy of the scenes with other labels."""
    copy = shutil.copytree(SCENES, OUT / "changed")
    for path in (copy / "training" / "label_2").iterdir():
        path.write_text(path.read_text() + "DontCare -1 -1 -10 0 0 5 5 -1 -1 -1 -1000 -1000 -1000 -10\n")
    return copy


def failure(model: nn.Module, name: str, scenes: Path = SCENES, **options: int) -> str:
    try:
        make_trainer(scenes, OUT / name, model, **options).run()
    except ValueError as error:
        return str(error)
    return "none"


def main(processes: Processes) -> None:
    model = Copying(torch.float64)
    rows = make_trainer(SCENES, OUT / "two", model).run()
    resumed = make_trainer(SCENES, OUT / "two_to_two", ToyModel(torch.float64))
    at = resumed.step
    resumed.run()
    make_trainer(SCENES, OUT / "one_to_two", ToyModel(torch.float64)).run()
    uneven = Uneven()
    make_trainer(SCENES, OUT / "uneven", uneven, steps=3).run()
    # The second process measures something else, which does not count.
    validation = Scripted(*((1.0, 3.0, 2.0, 2.5) if processes.is_main else (9.0, 8.0, 7.0, 6.0)))
    validated = make_trainer(
        SCENES, OUT / "validated", ToyModel(torch.float64), validation=validation, validate_every=3
    )
    validation.trainer = validated
    validated.run()
    report = {
        "validations": [row["figure"] for row in validated.log.validations],
        "kept": validation.kept,
        "count": processes.count,
        "rows": rows,
        "seen": model.seen,
        "resumed_at": at,
        "not_finite": failure(Unlucky(), "unlucky"),
        "odd": failure(ToyModel(), "odd", batch_size=3),
        "unlike": failure(ToyModel(), "unlike", scenes=SCENES if processes.is_main else changed_scenes()),
        "other": failure(ToyModel(torch.float64), "two", steps=11),
        "extra": uneven.extra.tolist(),
    }
    (OUT / f"report-{processes.rank}.json").write_text(json.dumps(report))


with start_processes("cpu") as joined:
    main(joined)
assert not dist.is_initialized()
