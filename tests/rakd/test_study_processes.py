"""A study that two processes, started by ``torchrun``, make together."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rakd.detector.configs import DetectorConfig
from rakd.study.results import read_study

SCRIPT = Path(__file__).with_name("distributed_study.py")


@pytest.mark.slow
def test_two_processes_make_one_study(scenes: Path, tmp_path: Path, small_config: DetectorConfig) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(replace(small_config, width=224)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(scenes), str(tmp_path), str(tmp_path / "config")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert first["count"] == second["count"] == 2
    # The first process reports, once; the other one waits for it.
    assert (first["reports"], second["reports"]) == (1, 0)
    assert first["finished"] and second["finished"]
    assert first["runs"] == ["expert", "none", "rakd"] and second["runs"] == []
    assert [run.method for run in read_study(tmp_path / "study" / "study.json").runs] == first["runs"]
    # The expert teaches the same in both, and both have the same apprentices.
    assert list(first["weights"]) == first["runs"]
    assert len(set(first["weights"].values())) == 3
    assert second["weights"] == first["weights"]
    for name in ("expert-seed0", "none-seed0", "rakd-seed0"):
        inside = {path.name for path in (tmp_path / "study" / name).iterdir()}
        every = {"checkpoint.pt", "log.csv", "log.jsonl", "settings.json", "detector.pt", "detections", "result.json"}
        assert inside == every | ({"expert.txt"} if name == "rakd-seed0" else set())
