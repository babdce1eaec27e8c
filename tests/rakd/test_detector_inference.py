"""Detections: of tensors, of frames, and what they cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rakd.data.frames import find_frames
from rakd.data.kitti import KittiDataset
from rakd.detector.configs import DetectorConfig
from rakd.detector.detector import Detector
from rakd.detector.inference import detect, detect_all, write_detections
from rakd.detector.latency import benchmark
from rakd.geometry import Calibration

SIZE = (128, 64)
CAMERA = Calibration(np.array([[72.0, 0, 64, 4], [0, 72, 17, 0.02], [0, 0, 1, 0.003]]))


@pytest.fixture
def detector(small_config: DetectorConfig) -> Detector:
    return Detector(small_config)


def images(count: int) -> Tensor:
    return torch.rand(count, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(0))


def test_predictions(detector: Detector) -> None:
    detector.eval()
    sizes = [(100, 60), (128, 64)]
    found = detector.predict(images(2), sizes, [CAMERA] * 2)
    assert all(0 < len(objects) <= detector.config.heads.detections for objects in found)
    for objects, (width, height) in zip(found, sizes, strict=True):
        assert objects.scores is not None
        assert (np.diff(objects.scores) <= 0).all()
        assert ((objects.scores > 0) & (objects.scores <= 1)).all()
        assert (objects.boxes[:, :2] >= 0).all()
        assert (objects.boxes[:, 2:] <= (width - 1, height - 1)).all()
        assert (objects.boxes[:, 2:] >= objects.boxes[:, :2]).all()
        assert (objects.location[:, 2] > 0).all()
        assert set(objects.types) <= {"Car", "Pedestrian", "Cyclist"}
        assert objects.has_box_3d.all()
    again = detector(images(2), sizes, [CAMERA] * 2)
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a.location, b.location)


def test_predictions_do_not_depend_on_the_other_images(detector: Detector) -> None:
    detector.double().eval()
    sizes = [(100, 60), (128, 64)]
    together = detector.predict(images(2).double(), sizes, [CAMERA] * 2)
    for i in range(2):
        (alone,) = detector.predict(images(2)[i : i + 1].double(), sizes[i : i + 1], [CAMERA])
        np.testing.assert_array_equal(alone.types, together[i].types)
        np.testing.assert_allclose(alone.boxes, together[i].boxes, atol=1e-3)
        np.testing.assert_allclose(alone.location, together[i].location, rtol=1e-4, atol=1e-4)


def test_nothing_found(small_config: DetectorConfig) -> None:
    shy = Detector(replace(small_config, heads=replace(small_config.heads, score_limit=0.999))).eval()
    found = shy.predict(images(2), [SIZE] * 2, [CAMERA] * 2)
    assert [len(objects) for objects in found] == [0, 0]
    assert found[0].boxes.shape == (0, 4) and found[0].scores is not None


def test_detections_of_frames_are_in_their_pixels(scenes: Path, small_config: DetectorConfig, tmp_path: Path) -> None:
    # 414 x 125 pixels, resized to 212 x 64.
    detector = Detector(replace(small_config, width=224)).eval()
    dataset = KittiDataset(scenes, "val", height=64)
    objects = detect(detector, dataset[0], torch.device("cpu"))
    batch = dataset[0]
    assert batch.image.shape[1:] == (64, 212)
    padded = torch.zeros(1, 3, 64, 224)
    padded[..., :212] = batch.image
    (small,) = detector.predict(padded, [(212, 64)], [batch.calibration])
    scale = np.array([414 / 212, 125 / 64] * 2)
    np.testing.assert_allclose(objects.boxes, (small.boxes + 0.5) * scale - 0.5)
    np.testing.assert_array_equal(objects.location, small.location)
    found = dict(detect_all(detector, dataset, torch.device("cpu"), progress=False))
    assert list(found) == [frame.id for frame in dataset.frames]
    np.testing.assert_array_equal(found[dataset.frames[0].id].boxes, objects.boxes)
    with pytest.raises(ValueError, match="frame 000004: too large: resized it is 212 x 64"):
        detect(Detector(small_config).eval(), dataset[0], torch.device("cpu"))


def test_cost(small_config: DetectorConfig, scenes: Path) -> None:
    frame = find_frames(scenes)[0]
    detector = Detector(replace(small_config, width=256))
    wide = Detector(replace(small_config, width=None, backbone=replace(small_config.backbone, name="resnet18")))
    small, large = benchmark([detector, wide], frame, torch.device("cpu"), repeats=2, warm_up=0, progress=False)
    assert small.size == (256, 64) and large.size == (256, 64)  # 212 wide, padded to a multiple of 64
    assert small.parameters == sum(p.numel() for p in detector.parameters()) < large.parameters
    assert 0 < small.gflops < large.gflops
    assert 0 < small.median_ms <= small.p90_ms
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        benchmark([detector], frame, torch.device("cpu"), repeats=0)


def test_detections_of_frames_that_are_no_longer_evaluated_go(detector: Detector, scenes: Path, tmp_path: Path) -> None:
    frames = KittiDataset(scenes, "val", height=32)
    for name in ("999999.txt", "notes.txt", "999998.png"):
        (tmp_path / name).write_text("kept or not")
    write_detections(detector.eval(), frames, tmp_path, torch.device("cpu"), progress=False)
    ids = {f"{frame.id}.txt" for frame in frames.frames}
    assert {path.name for path in tmp_path.iterdir()} == {*ids, "notes.txt", "999998.png"}
