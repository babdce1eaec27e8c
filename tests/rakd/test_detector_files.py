"""Detectors in files: what is read is what was written, and nothing else is taken for one."""

import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

import rakd.detector.backbones as backbones_module
from rakd.checkpoints import load_weights, save_checkpoint, save_weights
from rakd.detector.configs import DETECTORS, DetectorConfig
from rakd.detector.detector import Detector
from rakd.detector.files import load_detector, save_detector
from rakd.errors import UserError
from rakd.geometry import Calibration

CAMERA = Calibration(np.array([[72.0, 0, 64, 4], [0, 72, 17, 0.02], [0, 0, 1, 0.003]]))


@pytest.fixture
def detector(small_config: DetectorConfig) -> Detector:
    """With statistics of normalisation that are not those of a new one."""
    detector = Detector(small_config, seed=5)
    update_bn([torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(1))], detector.pyramid)
    return detector.eval()


def test_the_detector_read_is_the_one_written(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "new" / "detector.pt"
    save_detector(path, detector)
    read = load_detector(path)
    assert read.config == detector.config
    assert not read.training
    image = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(2))
    (a,), (b,) = (d.predict(image, [(128, 64)], [CAMERA]) for d in (detector, read))
    assert len(a) > 0
    for name in ("types", "boxes", "dimensions", "location", "rotation_y", "alpha", "scores"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert [p.name for p in path.parent.iterdir()] == ["detector.pt"]


@pytest.mark.parametrize("name", [name for name, config in DETECTORS.items() if isinstance(config, DetectorConfig)])
def test_all_settings_survive(name: str, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise AssertionError("reading a file must not download anything")

    monkeypatch.setattr(backbones_module, "get_model_weights", refused)
    config = DETECTORS[name]
    assert isinstance(config, DetectorConfig)
    # The layers' sizes are the small detector's, so that the test takes no time; all else is the named one's.
    backbone = replace(config.backbone, name=detector.config.backbone.name, channels=detector.channels)
    config = replace(config, backbone=backbone, heads=replace(config.heads, width=detector.config.heads.width))
    detector.config = config
    save_detector(tmp_path / "detector.pt", detector)
    read = load_detector(tmp_path / "detector.pt")
    assert read.config == config
    assert isinstance(read.config.proposals.pre_nms_top_n, tuple)
    # And a second trip changes nothing.
    save_detector(tmp_path / "again.pt", read)
    assert load_weights(tmp_path / "again.pt")[1] == load_weights(tmp_path / "detector.pt")[1]
    # Not in the file either, by whose digest studies know their expert.
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "detector.pt").read_bytes()


def test_other_files_are_refused(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with pytest.raises(FileNotFoundError, match=r"file\.pt is not there"):
        load_detector(path)
    others = {
        "is empty": b"",
        "is of another kind, or cut off": b"no weights at all",
    }
    save_detector(path, detector)
    whole = path.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        others[f"is of another kind, or cut off{'':{length}}"] = whole[:length]
    for message, content in others.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"file\.pt: expected a file of weights, this one {message.strip()}"):
            load_detector(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not torch's")
    with pytest.raises(ValueError, match=r"file\.pt: expected a file of weights, this cannot be read as one: \S"):
        load_detector(path)
    torch.save({"format": "rakd weights 1", "state": Path("code")}, path)
    with pytest.raises(ValueError, match=r"file\.pt: .* holds other things than tensors and text$"):
        load_detector(path)
    save_checkpoint(path, {"step": 3})
    with pytest.raises(ValueError, match=r"file\.pt: expected the format 'rakd weights 1', got 'rakd checkpoint 1'"):
        load_detector(path)


def test_a_full_disk_is_one_line(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662\nstack")

    monkeypatch.setattr(torch, "save", full)
    for save in (lambda path: save_detector(path, detector), lambda path: save_checkpoint(path, {"step": 3})):
        with pytest.raises(UserError, match=r"file\.pt: cannot be written; is the disk full\? .*pos 768 vs 662\)$"):
            save(tmp_path / "file.pt")
    assert not list(tmp_path.iterdir())


def test_broken_detectors_are_refused(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    state, config = detector.state_dict(), asdict(detector.config)
    others = {
        "no settings": (state, {}),
        "not settings": (state, {"detector": 3}),
        "unknown setting": (state, {"detector": {**config, "colour": "red"}}),
        "backbone is text": (state, {"detector": {**config, "backbone": "resnet18"}}),
        "unknown backbone": (state, {"detector": {**config, "backbone": {**config["backbone"], "name": "resnet9"}}}),
        "bad height": (state, {"detector": {**config, "height": 100}}),
        "weights of another": (state, {"detector": {**config, "backbone": {**config["backbone"], "channels": 8}}}),
        "weights missing": ({"a": torch.zeros(1)}, {"detector": config}),
    }
    for name, (weights, settings) in others.items():
        save_weights(path, weights, settings)
        with pytest.raises(ValueError, match=r"file\.pt: expected a detector's weights and settings"):
            load_detector(path)
            pytest.fail(f"{name} was taken")
