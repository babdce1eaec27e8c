"""Makes ``benchmarks``, which is in the sources alone, and the helpers of all tests importable. Gives sample rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.results import Row  # noqa: E402

SAMPLE = Row(
    op="distill",
    workload="train",
    kind="proposals",
    batch=2,
    boxes=256,
    output_size=7,
    sampling_ratio=2,
    channels=256,
    height=512,
    width=1760,
    dtype="float32",
    layout="nchw",
    implementation="torchvision",
    passes="forward+backward",
    median_ms=1950.5,
    p20_ms=1940.25,
    p80_ms=2023.0,
    repeats=5,
    peak_extra_mib=345.5,
    ratio=19.5,
    ratio_to="rakd:cpu",
    bound_mib=231.0,
    bound_fraction=0.0056,
    copy_gb_s=22.3,
    device="cpu",
    cpu='A "quoted", comma-ridden processor',
    threads=2,
    torch="2.13.0",
    torchvision="0.28.0",
    rakd="0.1.0",
    commit="0123456789abcdef",
    dirty=True,
    date="2026-01-02T03:04:05Z",
)


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A function that makes a sample row with some fields changed."""

    def make(**changes: Any) -> Row:
        return Row(**{**vars(SAMPLE), **changes})

    return make
