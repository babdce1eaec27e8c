"""Data that several test files use; makes the helpers of this folder importable."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from rakd.data.frames import find_frames
from rakd.data.labels import Objects, write_objects
from rakd.detector.configs import BackboneConfig, DetectorConfig, HeadConfig, ProposalConfig
from rakd.scenes import make_scenes
from rakd.study.results import StudyResult

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

# The same examples in every run, however slow or busy the machine.
settings.register_profile("rakd", deadline=None, derandomize=True)
settings.load_profile("rakd")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered data set; not to be written to."""
    root = tmp_path_factory.mktemp("scenes") / "small"
    make_scenes(root, 10, seed=3, size=(414, 125))
    return root


@pytest.fixture(scope="session")
def results(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Perfect result files for the scenes; not to be written to."""
    folder = tmp_path_factory.mktemp("results")
    for frame in find_frames(scenes):
        objects = frame.read_labels()
        objects = objects.select(objects.has_box_3d)
        scores = np.linspace(0.9, 0.1, len(objects))
        write_objects(folder / f"{frame.id}.txt", dataclasses.replace(objects, scores=scores), decimals=2)
    return folder


@pytest.fixture
def study() -> StudyResult:
    """A study whose figures are made by hand."""
    from study_cases import example_study  # on the path that is set above

    return example_study()


@pytest.fixture(scope="session")
def waymo(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Objects]]]:
    """Rendered scenes as Waymo's files, and the objects in them; not to be written to."""
    from waymo_files import write_waymo  # on the path that is set above; it needs pyarrow

    root = tmp_path_factory.mktemp("waymo")
    return root, write_waymo(scenes, root)


@pytest.fixture(scope="session")
def kitti_root() -> Path:
    """Real KITTI frames, where RAKD_KITTI_ROOT says."""
    root = os.environ.get("RAKD_KITTI_ROOT")
    if not root:
        pytest.skip("RAKD_KITTI_ROOT is not set: it names a folder with real KITTI frames")
    return Path(root)


@pytest.fixture(scope="session")
def small_config() -> DetectorConfig:
    """A detector for images of 128 x 64 pixels that runs in milliseconds."""
    return DetectorConfig(
        BackboneConfig("mobilenet_v3_small", 16, weights="random"),
        ProposalConfig(anchor_sizes=(8, 16, 32, 64), sampled=64, pre_nms_top_n=(60, 40), post_nms_top_n=(60, 30)),
        HeadConfig(sampled=32, width=16, canonical_size=28.0, detections=12),
        height=64,
        width=128,
    )
