"""A study in several processes, for ``torchrun distributed_study.py SCENES OUT CONFIG``.

A test looks at what it leaves. ``CONFIG`` is a pickled `rakd.detector.configs.DetectorConfig` of the apprentice.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist

from rakd.detector.configs import DETECTORS
from rakd.detector.detector import Detector
from rakd.distributed import Processes, start_processes
from rakd.study import experiment as module
from rakd.study.experiment import Experiment
from rakd.study.plan import Run
from rakd.study.runner import Runner
from rakd.study.settings import StudySettings
from rakd.training.settings import TrainSettings

SCENES, OUT = Path(sys.argv[1]), Path(sys.argv[2])
TRAINING = TrainSettings(steps=2, batch_size=2, learning_rate=1e-3, optimizer="adamw", warm_up=0, log_every=1)


class Noting(Runner):
    """Notes the weights, buffers among them, that each training left in this process."""

    weights: ClassVar[dict[str, str]] = {}

    def evaluate(self, run: Run, detector: Detector, *rest: Any) -> Any:
        state = b"".join(value.numpy().tobytes() for value in detector.state_dict().values())
        self.weights[run.method] = hashlib.sha256(state).hexdigest()
        return super().evaluate(run, detector, *rest)


def main(processes: Processes) -> None:
    reports: list[str] = []
    write = module.write_report

    def noted(*arguments: Any) -> None:
        reports.append("written")
        write(*arguments)

    module.write_report = noted
    module.Runner = Noting
    settings = StudySettings(
        expert="mini-expert",
        apprentice="mini",
        expert_training=TRAINING,
        training=TRAINING,
        weights={"rakd": 1.0},
        methods=("none", "rakd"),
    )
    result = Experiment(settings, SCENES, OUT / "study", processes, quiet=True).run()
    report = {
        "count": processes.count,
        "reports": len(reports),
        "weights": Noting.weights,
        "runs": [run.method for run in result.runs],
        "finished": (OUT / "study" / "study.json").exists(),
    }
    (OUT / f"report-{processes.rank}.json").write_text(json.dumps(report))


apprentice = pickle.loads(Path(sys.argv[3]).read_bytes())
# As the detectors for small images have it: with running means, which every process makes of its own images.
backbone = replace(apprentice.backbone, channels=24, frozen_norm=False)
DETECTORS.update({"mini": apprentice, "mini-expert": replace(apprentice, backbone=backbone)})
with start_processes("cpu") as joined:
    main(joined)
assert not dist.is_initialized()
