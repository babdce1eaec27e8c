"""Nothing is downloaded in these tests: frameworks that would try are told so before they are imported."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rendered frames of 160 × 96 pixels in KITTI's layout."""
    from rakd.scenes import make_scenes

    folder = tmp_path_factory.mktemp("scenes") / "kitti"
    make_scenes(folder, 10, seed=1, size=(160, 96))
    return folder
