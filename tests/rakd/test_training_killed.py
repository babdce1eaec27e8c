"""A training killed with SIGKILL again and again ends with the bits of one that was left alone."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from toy_model import assert_same_bits, make_trainer, weights

SCRIPT = Path(__file__).with_name("killed_training.py")


def test_a_killed_run_resumes_to_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(scenes), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ends = {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines())}
    assert len(ends) == 7
    assert all(words[0] == str(int(signal.SIGKILL)) for words in ends.values()), done.stdout
    # The kills came where they should: nothing yet, half a file, none left of it, a whole file not yet in place.
    assert ends["first_step"][1:] == []
    assert ends["half_a_checkpoint"][1:] == ["checkpoint.pt", "temporary"]
    assert ends["between_forward_and_update"][1:] == ["checkpoint.pt", "log.csv", "log.jsonl"]
    assert ends["before_the_new_checkpoint_stands"][1:] == ["checkpoint.pt", "log.csv", "log.jsonl", "temporary"]
    assert ends["after_the_last_checkpoint"][1:] == ["checkpoint.pt", "log.csv", "log.jsonl"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed ones had: torch's convolutions round differently with more
    try:
        whole = make_trainer(scenes, tmp_path / "whole", steps=24, log_every=4)
        whole.run()
        killed = make_trainer(scenes, out, steps=24, log_every=4)
        assert killed.step == 24
        killed.run()
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(weights(killed), weights(whole))
    assert sorted(file.name for file in out.iterdir()) == ["checkpoint.pt", "log.csv", "log.jsonl"]
    ours, expected = (list(csv.DictReader((folder / "log.csv").open())) for folder in (out, tmp_path / "whole"))
    assert [row["step"] for row in ours] == ["4", "8", "12", "16", "20", "24"]
    for row, other in zip(ours, expected, strict=True):
        assert all(row[name] == other[name] for name in row if "second" not in name)
    seconds = [float(row["seconds"]) for row in ours]
    assert seconds == sorted(seconds)
