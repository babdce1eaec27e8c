"""What runs on the device that is not there; `test_fake_gpu` starts pytest on this file in a process of its own.

Operands on two devices, operations without a CUDA kernel and kernels launched past the mode are errors, results are
those of the CPU, and each wait of the host has its place in a list.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import monodetr_cases
import numpy as np
import pytest
import torch
from fake_cuda import GPU, DeviceMismatch, FakeCuda

from rakd.cli import main
from rakd.data.kitti import KittiDataset, collate
from rakd.data.labels import Objects
from rakd.data.targets import pooling_boxes
from rakd.detector.base_config import BaseConfig
from rakd.detector.configs import BackboneConfig, DetectorConfig, HeadConfig, ProposalConfig
from rakd.detector.detector import Detector, target_rows
from rakd.detector.files import save_detector
from rakd.distill import Distiller
from rakd.distill.methods import make_method
from rakd.integrations import keep_in_optimizer
from rakd.scenes import make_scenes
from rakd.training.model import expert_size, expert_strides, make_distillation_model
from rakd.training.settings import TrainSettings
from rakd.training.trainer import Trainer
from rakd_ops import level_weights, multilevel_roi_align, soft_roi_distill
from rakd_ops._autograd import prepare
from rakd_ops._inputs import BoxInputs
from rakd_ops._options import check_options

torch.backends.cudnn.enabled = False  # its operations have no twin on the CPU
for attention in ("flash", "mem_efficient", "cudnn"):  # nor have these; what is left is made of others
    getattr(torch.backends.cuda, f"enable_{attention}_sdp")(False)

CONFIG = DetectorConfig(
    BackboneConfig("mobilenet_v3_small", 16, weights="random"),
    ProposalConfig(anchor_sizes=(8, 16, 32, 64), sampled=64, pre_nms_top_n=(60, 40), post_nms_top_n=(60, 30)),
    HeadConfig(sampled=32, width=16, canonical_size=28.0, detections=12),
    height=64,
    width=224,
)
# All that the host waits for in a step, whatever the batch.
STEP = {
    "detector/boxes.py suppress_together": 1,
    "detector/detector.py losses": 1,
    "training/trainer.py _step": 1,
}
# Of a MonoDETR, whose matching takes its costs off the device in one copy.
STEP_OF_QUERIES = {
    "monodetr/matching.py match": 1,
    "training/trainer.py _step": 1,
}
# Of a batch of images to detect objects in.
PREDICTION = {
    "detector/boxes.py suppress_together": 2,
    "detector/decode.py to_host": 1,
}
PREDICTION_OF_QUERIES = {"monodetr/detector.py _to_host": 1}
QUERIES = replace(monodetr_cases.CONFIG, width=256, transformer=replace(monodetr_cases.CONFIG.transformer, dropout=0.0))


@pytest.fixture
def gpu() -> Any:
    with FakeCuda() as mode:
        yield mode
    assert not mode.without_kernel
    assert not mode.mixed


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "small"
    make_scenes(root, 10, seed=3, size=(414, 125), workers=1)
    return root


def make_trainer(
    scenes: Path,
    out: Path,
    device: torch.device,
    method: Any = "rakd",
    *,
    batch: int = 2,
    config: BaseConfig = CONFIG,
    larger: int = 1,
    **options: Any,
) -> Trainer:
    size: dict[str, Any] = {"height": larger * config.height, "width": config.width and larger * config.width}
    wide: Any = replace(config, backbone=replace(config.backbone, channels=24), **size)  # type: ignore[type-var]
    detector, expert = config.build(1), wide.build(2)
    sizes: dict[str, Any] = {"expert_channels": 24, "apprentice_channels": 16, "batch_size": batch}
    term = make_method(method, strides=detector.strides, expert_strides=expert_strides(detector, expert), **sizes)
    defaults = {"steps": 2, "batch_size": batch, "learning_rate": 1e-3, "warm_up": 0, "log_every": 1}
    # Without mixed precision a GPU rounds as the CPU does; by itself it takes bfloat16.
    settings = TrainSettings(**{"amp": "off", **defaults, **options})
    model = make_distillation_model(detector, expert, term, 1.0, "proposals")
    data = KittiDataset(scenes, "train", height=64, rules=config.rules, expert_size=expert_size(config, wide))
    return Trainer(model, data, settings, out, device, image_size=config.image_size, quiet=True)


def train_and_count(trainer: Trainer, gpu: FakeCuda) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the training, and what the host waited for in the last step, counted by place."""
    step, begun = trainer._step, [0]

    def noting(batch: Any) -> Any:
        begun.append(len(gpu.waits))
        return step(batch)

    trainer._step = noting  # type: ignore[method-assign]
    rows = trainer.run()
    # After the step: buffers and the checkpoint.
    return rows, dict(Counter(wait.place for wait in gpu.waits[begun[-1] :] if "checkpoint" not in wait.place))


@pytest.mark.parametrize(
    ("method", "options", "waits"),
    [
        ("rakd", {}, STEP),
        ("pkd", {}, None),
        ("semckd", {}, None),
        ("rakd", {"config": QUERIES, "steps": 1}, None),
        pytest.param("rakd", {"larger": 2}, STEP, id="an expert of larger images"),
    ],
)
def test_training_is_that_of_the_cpu(
    method: str, options: dict[str, Any], waits: dict[str, int] | None, scenes: Path, tmp_path: Path, gpu: FakeCuda
) -> None:
    """With two images a batch; below, the host waits no more often for four."""
    rows, found = train_and_count(make_trainer(scenes, tmp_path / "gpu", GPU, method, **options), gpu)
    assert waits is None or found == waits
    expected = make_trainer(scenes, tmp_path / "cpu", torch.device("cpu"), method, **options).run()
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - {"seconds", "images_per_second"}:
            # Compiled loops of the CPU and operation by operation round otherwise; two steps add to it.
            assert row[name] == pytest.approx(other[name], rel=2e-3, abs=2e-3), name


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_goes_on_from_a_checkpoint(amp: str, scenes: Path, tmp_path: Path, gpu: FakeCuda) -> None:
    options = {"steps": 3, "amp": amp, "checkpoint_every": 2}
    rows = make_trainer(scenes, tmp_path, GPU, **options).run()
    assert all(np.isfinite(row["total"]) for row in rows)
    assert make_trainer(scenes, tmp_path, GPU, **options).step == 3


def test_waits_of_a_step_do_not_grow_with_the_batch(scenes: Path, tmp_path: Path, gpu: FakeCuda) -> None:
    """And the expert runs before the first of them."""
    trainer = make_trainer(scenes, tmp_path, GPU, batch=4)
    step, expert = trainer._step, trainer.model.distiller.expert  # type: ignore[union-attr]
    begun, done = [], []

    def noting(batch: Any) -> Any:
        begun.append(len(gpu.waits))
        return step(batch)

    trainer._step = noting  # type: ignore[method-assign]
    expert.pyramid.fpn.register_forward_hook(lambda *_: done.append(len(gpu.waits)))
    assert train_and_count(trainer, gpu)[1] == STEP
    assert sum(STEP.values()) <= 8
    assert len(begun) == 2
    # The first step makes anchors.
    assert done[1] == begun[1]


@pytest.mark.parametrize("batch", [2, 4])
def test_waits_of_a_step_of_queries(batch: int, scenes: Path, tmp_path: Path, gpu: FakeCuda) -> None:
    trainer = make_trainer(scenes, tmp_path, GPU, batch=batch, config=QUERIES)
    assert train_and_count(trainer, gpu)[1] == STEP_OF_QUERIES


def detect(config: BaseConfig, scenes: Path, gpu: FakeCuda) -> tuple[list[tuple[Objects, Objects]], dict[str, int]]:
    """Objects of three frames on the GPU and on the CPU, and what the host waited for, once all is warm."""
    data = KittiDataset(scenes, "train", height=64)
    batch = collate([data[0], data[1], data[2]], size=config.image_size)
    cameras = [sample.calibration for sample in batch.samples]
    expected = config.build(1).eval().predict(batch.images, batch.sizes, cameras)
    detector, images = config.build(1).to(GPU).eval(), batch.images.to(GPU)
    detector.predict(images, batch.sizes, cameras)
    gpu.waits.clear()
    found = detector.predict(images, batch.sizes, cameras)
    return list(zip(found, expected, strict=True)), dict(Counter(wait.place for wait in gpu.waits))


def test_objects_of_queries_are_those_of_the_cpu(scenes: Path, gpu: FakeCuda) -> None:
    pairs, waits = detect(QUERIES, scenes, gpu)
    assert waits == PREDICTION_OF_QUERIES
    for own, other in pairs:
        assert len(own) == 12
        np.testing.assert_allclose(own.scores, other.scores, rtol=1e-4)
        np.testing.assert_allclose(own.location, other.location, rtol=1e-3, atol=1e-3)


def test_a_wait_more_is_seen(scenes: Path, tmp_path: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Detector.losses

    def asking(detector: Detector, features: dict[str, torch.Tensor], *arguments: Any) -> Any:
        float(features["p5"].detach().sum())
        return losses(detector, features, *arguments)

    monkeypatch.setattr(Detector, "losses", asking)
    _, found = train_and_count(make_trainer(scenes, tmp_path, GPU), gpu)
    assert found == {**STEP, "fake_gpu/cases.py asking": 1}


def test_detections_are_those_of_the_cpu(scenes: Path, gpu: FakeCuda) -> None:
    pairs, waits = detect(CONFIG, scenes, gpu)
    assert waits == PREDICTION
    assert sum(PREDICTION.values()) <= 6
    for own, other in pairs:
        assert len(own) > 0
        assert own.types.tolist() == other.types.tolist()
        np.testing.assert_allclose(own.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(own.location, other.location, rtol=1e-4)


def test_images_without_objects(scenes: Path, gpu: FakeCuda) -> None:
    detector = Detector(CONFIG, 1).to(GPU)
    data = KittiDataset(scenes, "train", height=64)
    batch = collate([data[0], data[1]], size=CONFIG.image_size)
    targets = batch.targets(GPU)
    none = target_rows(targets[0], torch.zeros(0, dtype=torch.int64, device=GPU))
    none = replace(none, ignored=none.ignored[:0])
    for own in ([none, none], [none, targets[1]]):
        features = detector.extract_features(batch.images.to(GPU))
        losses, drawn = detector.losses(features, batch.sizes, own, [1, 2])
        method = make_method("rakd", strides=detector.strides, expert_channels=16, apprentice_channels=16)
        assert method is not None
        expert = {name: feature.detach() for name, feature in features.items()}
        losses["distillation"] = method(expert, features, pooling_boxes(drawn))
        torch.stack(tuple(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None for p in detector.parameters())


def test_operators_do_not_wait(gpu: FakeCuda) -> None:
    maps = [torch.rand(2, 8, 64 // s, 96 // s, device=GPU, requires_grad=True) for s in (4, 8, 16, 32)]
    expert = [torch.rand_like(m) for m in maps]
    boxes = [torch.tensor(rows).to(GPU) for rows in ([[1.0, 2, 40, 50], [10, 3, 90, 60]], [[5.0, 5, 20, 20]])]
    gpu.waits.clear()
    (soft_roi_distill(maps, expert, boxes) + multilevel_roi_align(maps, boxes).sum()).backward()
    assert gpu.waits == []
    for assignment in ("soft", "hard", "uniform"):
        assert level_weights(boxes, assignment=assignment).device == GPU


@pytest.mark.parametrize("assignment", ["soft", "hard", "uniform"])
def test_boxes_are_prepared_for_triton_without_a_wait(assignment: Any, gpu: FakeCuda) -> None:
    boxes = torch.tensor([[0.0, 1, 2, 40, 50], [1, 10, 3, 90, 60], [7, 1, 1, 9, 9], [0, 8, 8, 4, 9]])
    inputs, options = BoxInputs([boxes], None, None, 2, True), check_options(assignment=assignment)
    expected = prepare(inputs, options, "triton")
    inputs = inputs._replace(boxes=[boxes.to(GPU)])
    gpu.waits.clear()
    found = prepare(inputs, options, "triton")
    assert gpu.waits == []
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))
    # The third box's image and the fourth's sides are wrong.
    assert expected[0][:, 0].tolist() == [0.0, 1.0, -1.0, -1.0]
    assert not expected[0][2:, 1:].any()


@pytest.mark.parametrize("captured", [False, True])
def test_saved_gradients_stay_where_a_graph_may_be_replayed(
    captured: bool, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward alone may be replayed, and must then find what the forward left, not a product of itself."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    maps = [torch.rand(1, 8, 64 // s, 96 // s, device=GPU, requires_grad=True) for s in (4, 8, 16, 32)]
    expert = [torch.rand_like(m) for m in maps]
    loss = soft_roi_distill(maps, expert, [torch.tensor([[1.0, 2, 40, 50]]).to(GPU)])
    saved = list(loss.grad_fn.saved_tensors)
    before = [s.cpu().clone() for s in saved]
    (0.5 * loss).backward()
    factor = 1.0 if captured else 0.5
    assert all(torch.equal(ours.cpu(), factor * theirs) for ours, theirs in zip(saved, before, strict=True))
    assert all(torch.equal(m.grad.cpu(), 0.5 * theirs) for m, theirs in zip(maps, before, strict=True))


@pytest.mark.parametrize("facts", [{}, {"strides": (8, 16), "expert_channels": 8, "apprentice_channels": 4}])
@pytest.mark.parametrize("kept", [False, True])
def test_a_distiller_goes_on_from_a_state_that_is_loaded_before_the_first_step(
    facts: dict[str, Any], kept: bool, gpu: FakeCuda
) -> None:
    """Adapters lie where the optimizer's other parameters do, so that the moments that it loads do too."""
    boxes = [torch.tensor([[4.0, 4, 40, 40]])] * 2
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(GPU)

    def run(saved: list[Any] | None) -> tuple[list[Any], list[torch.Tensor]]:
        torch.manual_seed(1)
        networks = []
        for channels in (8, 4):
            stages = torch.nn.Sequential(
                torch.nn.Conv2d(3, channels, 8, stride=8), torch.nn.Conv2d(channels, channels, 2, stride=2)
            )
            networks.append(stages.to(GPU))
        expert, apprentice = networks
        distiller = Distiller(expert, "pkd", features=["0", "1"], **facts)
        optimizer = torch.optim.AdamW(apprentice.parameters(), lr=1e-3)
        if kept:
            keep_in_optimizer(distiller, optimizer)
        else:
            distiller.add_to(optimizer)
        if saved is not None:
            distiller.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            assert all(parameter.device == GPU for parameter in distiller.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            fine = apprentice[0](images)
            distiller(images, boxes, [fine, apprentice[1](fine)]).backward()
            optimizer.step()
        return [distiller.state_dict(), optimizer.state_dict()], list(distiller.parameters())

    saved, _ = run(None)
    _, parameters = run(saved)
    assert len(parameters) == 4 and all(parameter.device == GPU for parameter in parameters)


def test_the_mode_refuses_what_cuda_refuses(gpu: FakeCuda) -> None:
    on_gpu = torch.ones(3, device=GPU)
    with pytest.raises(DeviceMismatch, match="add"):
        on_gpu + torch.ones(3)
    on_gpu[on_gpu > 0]
    torch.tensor([1.0], device=GPU)
    on_gpu.cpu()
    assert [wait.what for wait in gpu.waits] == [
        "index by mask",
        "torch.tensor of host values",
        "copy to host",
    ]


def test_commands(scenes: Path, tmp_path: Path, gpu: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    detector = tmp_path / "detector.pt"
    save_detector(detector, Detector(CONFIG, 1))
    image, camera = scenes / "training" / "image_2" / "000000.png", scenes / "training" / "calib" / "000000.txt"
    options = ["--calib", str(camera), "--checkpoint", str(detector), "--out", str(tmp_path / "out")]
    assert main(["predict", str(image), *options, "--device", "cuda"]) == 0
    assert (tmp_path / "out" / "000000.txt").read_text()
    assert main(["latency", str(detector), "--repeats", "1", "--device", "cuda"]) == 0
    assert "fake device" in capsys.readouterr().out
