"""Every named detector as an ONNX model, against PyTorch on rendered scenes and on real frames."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rakd.commands.export import MAX_UNMATCHED, Export
from rakd.data.frames import Frame, find_frames
from rakd.data.kitti import Sample, make_sample
from rakd.detector.configs import DETECTORS
from rakd.detector.export import check_onnx, export_onnx
from rakd.detector.latency import Model
from rakd.detector.monodetr.configs import MonoDETRConfig
from rakd.detector.onnx_model import OnnxDetector
from rakd.scenes import make_scenes

pytestmark = pytest.mark.slow

FRAMES = 3


@pytest.fixture(scope="module")
def large_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of KITTI's size."""
    root = tmp_path_factory.mktemp("scenes") / "large"
    make_scenes(root, FRAMES, seed=5, workers=1, progress=False)
    return root


@pytest.fixture(scope="module", params=DETECTORS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, OnnxDetector]:
    """A detector with random weights, and the model that was made of it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'rakd[export]'")
    if DETECTORS[request.param].backbone.name.startswith("tf_"):
        pytest.importorskip("timm", reason="timm is not installed: pip install 'rakd[timm]'")
    config = DETECTORS[request.param].without_download()
    if isinstance(config, MonoDETRConfig):  # untrained, no query reaches its limit
        config = replace(config, score_limit=0.0)
    detector = config.build().eval()
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    export_onnx(detector, path)
    return detector, OnnxDetector(path)


def make(frame: Frame, detector: Model) -> Sample:
    """A frame without what lies right of a detector's images: Waymo's are narrower than KITTI's."""
    image, size = Image.fromarray(frame.read_image()), detector.config.image_size
    assert size is not None
    image = image.crop((0, 0, min(image.width, image.height * size[0] // size[1]), image.height))
    return make_sample(frame.id, image, frame.read_calibration(), None, detector.config.height)


def check(pair: tuple[Model, OnnxDetector], root: Path) -> None:
    """As strict as the command, whose limits say why they are these."""
    detector, model = pair
    found = check_onnx(detector, model, [make(frame, detector) for frame in find_frames(root)[:FRAMES]])
    print(found)
    assert found.detections > 0
    assert found.unmatched <= MAX_UNMATCHED * found.detections, found
    assert max(found.worst.values()) <= Export.tolerance, found


def test_on_rendered_scenes(pair: tuple[Model, OnnxDetector], large_scenes: Path) -> None:
    check(pair, large_scenes)


def test_on_real_frames(pair: tuple[Model, OnnxDetector], kitti_root: Path) -> None:
    check(pair, kitti_root)
