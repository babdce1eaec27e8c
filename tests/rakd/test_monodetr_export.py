"""MonoDETR outside PyTorch: torch.export and ONNX."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monodetr_cases import CONFIG
from torch.optim.swa_utils import update_bn

from rakd.data.kitti import KittiDataset, Sample, collate
from rakd.detector import export
from rakd.detector.export import check_onnx, export_onnx, export_program
from rakd.detector.monodetr.detector import MonoDETR
from rakd.detector.onnx_model import OUTPUTS, OnnxDetector, model_inputs


@pytest.fixture(scope="module")
def samples(scenes: Path) -> list[Sample]:
    dataset = KittiDataset(scenes, "train", height=64, rules=CONFIG.rules)
    return [dataset[i] for i in range(4)]


@pytest.fixture(scope="module")
def detector(samples: list[Sample]) -> MonoDETR:
    """One whose scores differ, and whose attention looks at places of its own."""
    made = MonoDETR(replace(CONFIG, width=256, score_limit=0.03), seed=1)
    update_bn([collate(samples, size=(256, 64)).images], made.pyramid)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for heads in made.decoder.heads:
            heads.classes.weight.mul_(4)
            heads.classes.bias.add_(1.5)
        for name, parameter in made.named_parameters():
            if "offsets.weight" in name or "weights.weight" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return made.eval()


@pytest.fixture(scope="module")
def program(detector: MonoDETR) -> torch.export.ExportedProgram:
    return export_program(detector)


def test_torch_export_gives_the_same_objects(
    detector: MonoDETR, program: torch.export.ExportedProgram, samples: list[Sample]
) -> None:
    deployed, counts = program.module(), set()
    for sample in samples:
        inputs = [torch.from_numpy(value) for value in model_inputs(detector.config, sample).values()]
        with torch.no_grad():
            found = dict(zip(OUTPUTS, deployed(*inputs), strict=True))
        (expected,) = detector.predict(inputs[0], [(sample.image.shape[2], 64)], [sample.calibration])
        counts.add(len(expected))
        np.testing.assert_allclose(found["scores"].numpy(), expected.scores, rtol=1e-5)
        # The camera is float32 here.
        np.testing.assert_allclose(found["location"].numpy(), expected.location, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["boxes"].numpy(), expected.boxes, atol=1e-3)
    assert max(counts) > 0


def test_onnxruntime_finds_what_pytorch_finds(
    detector: MonoDETR,
    program: torch.export.ExportedProgram,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'rakd[export]'")
    monkeypatch.setattr(export, "export_program", {detector: program}.get)  # traced once: that takes seconds
    export_onnx(detector, tmp_path / "monodetr.onnx")
    model = OnnxDetector(tmp_path / "monodetr.onnx")
    assert model.config == detector.config
    found = check_onnx(detector, model, samples)
    assert found.detections > 4 and found.unmatched == 0
    # float32 through some twenty layers in another order of sums; pixels and metres are in the tens.
    assert max(found.worst.values()) < 2e-3, found
