"""What is trained: the detector's losses, and the expert's lesson on the right boxes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from rakd.data.kitti import Batch, KittiDataset, collate
from rakd.detector.configs import DetectorConfig
from rakd.detector.detector import Detector
from rakd.detector.monodetr.configs import MONODETRS
from rakd.distill import MethodName
from rakd.distill.cache import FeatureCache
from rakd.distill.methods import make_method
from rakd.distill.registry import METHODS
from rakd.errors import UserError
from rakd.training.model import DistillationModel, expert_size, expert_strides, make_distillation_model
from rakd_ops import level_weights


class Noting(nn.Module):
    """A method that notes its boxes and gives a constant."""

    def forward(self, expert: dict[str, Tensor], apprentice: dict[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        self.boxes = boxes
        return apprentice["p2"].sum() * 0 + 3


@pytest.fixture(scope="module")
def batch(scenes: Path) -> Batch:
    """Two frames with objects."""
    dataset = KittiDataset(scenes, "train", height=64)
    samples = [dataset[i] for i in range(len(dataset))]
    return collate([sample for sample in samples if sample.targets is not None and len(sample.targets)][:2])


@pytest.fixture
def config(small_config: DetectorConfig) -> DetectorConfig:
    return replace(small_config, width=224)


def test_alone_the_terms_are_the_detectors(config: DetectorConfig, batch: Batch) -> None:
    detector = Detector(config)
    without = make_distillation_model(detector, Detector(config), None, 1.0, "proposals")
    for model in (DistillationModel(detector), without):
        got = model(batch, [3, 4])
        features = detector.extract_features(batch.images)
        expected, _ = detector.losses(features, batch.sizes, batch.targets("cpu"), [3, 4])
        assert got.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("regions", ["proposals", "objects"])
def test_where_features_are_compared(regions: str, config: DetectorConfig, batch: Batch) -> None:
    detector, method = Detector(config), Noting()
    terms = make_distillation_model(detector, Detector(config, seed=9), method, 0.5, regions)(batch, [3, 4])
    assert list(terms)[-1] == "distillation"
    assert terms["distillation"] == 1.5
    if regions == "objects":
        expected = [target.boxes for target in batch.targets("cpu")]
    else:
        features = detector.extract_features(batch.images)
        _, expected = detector.losses(features, batch.sizes, batch.targets("cpu"), [3, 4])
    assert len(method.boxes) == len(expected)
    for got, rows in zip(method.boxes, expected, strict=True):
        assert len(rows) > 0
        # Half a pixel on: from counting at pixel centres to counting at edges, as RoIAlign does.
        torch.testing.assert_close(got, rows + 0.5)


def test_a_cache_knows_images_by_their_content(config: DetectorConfig, batch: Batch, tmp_path: Path) -> None:
    detector, expert, cache = Detector(config), Detector(config, seed=9), FeatureCache(tmp_path)
    models = [make_distillation_model(detector, expert, Noting(), 1.0, "objects", each) for each in (cache, None)]
    changed = replace(batch, images=batch.images.flip(2))  # other data of the same names
    for images, (hits, misses) in ((batch, (0, 2)), (changed, (0, 4)), (batch, (2, 4))):
        found = [list(model._expert_features(model.distiller, images.images).values()) for model in models]
        assert (cache.hits, cache.misses) == (hits, misses)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def test_an_expert_of_larger_images_compares_the_same_objects(scenes: Path, config: DetectorConfig) -> None:
    detector = Detector(config)
    expert = Detector(replace(config, height=128, width=448), seed=9)
    assert expert_size(config, config) is None
    data = KittiDataset(scenes, "train", height=64, expert_size=expert_size(config, expert.config))
    batch = collate([data[0], data[1]], size=config.image_size, expert_size=data.expert_size)
    assert batch.images.shape[2:] == (64, 224)
    strides = expert_strides(detector, expert)
    assert strides == (2.0, 4.0, 8.0, 16.0)
    sizes = {"expert_channels": 16, "apprentice_channels": 16}
    method = make_method("rakd", strides=detector.strides, expert_strides=strides, canonical_size=28.0, **sizes)
    model = make_distillation_model(detector, expert, method, 2.0, "objects")
    got = model(batch, [3, 4])["distillation"]
    # The same boxes, twice as large, on maps of images that are twice as large.
    large = KittiDataset(scenes, "train", height=128)
    images = collate([large[0], large[1]], size=(448, 128)).images
    with torch.no_grad():
        theirs = list(expert.extract_features(images).values())
        ours = list(detector.extract_features(batch.images).values())
    boxes = [target.boxes.double() + 0.5 for target in batch.targets("cpu")]
    image = torch.cat([torch.full((len(rows), 1), float(i)) for i, rows in enumerate(boxes)])
    rows = torch.cat([image, torch.cat(boxes)], dim=1)
    weights = level_weights(rows, strides=detector.strides, canonical_size=28.0)
    total = torch.zeros((), dtype=torch.float64)
    for level, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        pooled = [
            roi_align(maps.double(), rows * factor, 7, 1 / stride, 2, aligned=True)
            for maps, factor, stride in (
                (own, 1.0, detector.strides[level]),
                (other, torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0]), expert.strides[level]),
            )
        ]
        error = (pooled[0] - pooled[1]).square().mean(dim=(1, 2, 3))
        total += (weights[:, level] * error).sum()
    torch.testing.assert_close(got.detach().double(), 2 * total / len(rows), rtol=1e-4, atol=0)


def test_what_fits_no_expert_of_larger_images_is_refused(config: DetectorConfig) -> None:
    for other in (replace(config, height=96, width=320), replace(config, height=128, width=None)):
        with pytest.raises(
            ValueError, match=r"the apprentice's are 224 x 64 pixels, the expert's (320 x 96|any x 128)"
        ):
            expert_size(config, other)
    apprentice = MONODETRS["monodetr-tiny"]
    small, large = (replace(apprentice, height=height, width=width) for height, width in ((64, 256), (128, 512)))
    method = make_method("rakd", strides=(8,), expert_channels=1, apprentice_channels=1)
    with pytest.raises(ValueError, match="regions: expert needs an expert for images of the apprentice's height, 64"):
        make_distillation_model(
            small.without_download().build(), large.without_download().build(), method, 1.0, "expert"
        )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_teaches_in_mixed_precision_too(name: MethodName, config: DetectorConfig, batch: Batch) -> None:
    expert = Detector(replace(config, backbone=replace(config.backbone, channels=24)), seed=9)
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    method = make_method(
        name, strides=expert.strides, expert_channels=24, apprentice_channels=16, batch_size=2, canonical_size=28.0
    )
    assert method is not None
    model = make_distillation_model(Detector(config), expert, method, 1.0, "objects").train()
    full = model(batch, [3, 4])["distillation"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch, [3, 4])["distillation"]
    # bfloat16 has three digits, of which a deep network and a difference of features leave one.
    torch.testing.assert_close(mixed, full, rtol=0.05, atol=0.0)
    assert full > 0
    mixed.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.detector.pyramid.parameters())
    assert all(p.grad is not None for p in method.parameters())
    assert all(p.grad is None for p in expert.parameters())
    assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())
    assert {key.split(".")[0] for key in model.state_dict()} <= {"detector", "distiller"}
    assert not any("expert" in key for key in model.state_dict())


def test_score_weighted_l2_takes_the_experts_objectness(config: DetectorConfig, batch: Batch) -> None:
    detector, expert = Detector(config).train(), Detector(config, seed=9)
    generator = torch.Generator().manual_seed(0)
    for layer in (expert.proposals.head.conv[0][0], expert.proposals.head.cls_logits):
        nn.init.normal_(layer.weight, std=10.0, generator=generator)  # else all scores are a half, within rounding
    sizes = {"expert_channels": 16, "apprentice_channels": 16}
    method = make_method("score_l2", strides=detector.strides, **sizes)
    got = make_distillation_model(detector, expert, method, 1.0, "proposals")(batch, [3, 4])["distillation"]
    with torch.no_grad():
        theirs = expert.eval().extract_features(batch.images)
        ours = detector.extract_features(batch.images)
        terms, alike = [], []
        for own, hers in zip(ours.values(), theirs.values(), strict=True):
            # The head of torchvision: a convolution, ReLU, a logit for each shape of anchors.
            head = expert.proposals.head
            weight = head.cls_logits(head.conv(hers)).amax(dim=1).sigmoid()
            error = (own - hers).square().mean(dim=1)
            terms.append((weight * error).sum() / weight.sum())
            alike.append(error.mean())
    assert abs(torch.stack(alike).mean() / got.detach() - 1) > 1e-3  # a hundred times the tolerance
    torch.testing.assert_close(got.detach(), torch.stack(terms).mean(), rtol=1e-5, atol=0)


def test_an_expert_without_scores_is_refused_at_once(config: DetectorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method("score_l2", strides=(4, 8, 16, 32), expert_channels=16, apprentice_channels=16)
    monkeypatch.setattr(DetectorConfig, "has_scores", False)
    with pytest.raises(ValueError, match="score_l2 needs an expert with class scores on its maps"):
        make_distillation_model(Detector(config), Detector(config), method, 1.0, "proposals")


def test_a_weight_may_be_a_share_of_the_task_loss(
    config: DetectorConfig, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(config)
    model = make_distillation_model(detector, Detector(config), Noting(), "auto:10", "objects").train()
    tasks = []
    for seeds in ([3, 4], [5, 6]):
        terms = model(batch, seeds)
        tasks.append(sum(float(value.detach()) for name, value in terms.items() if name != "distillation"))
        # The method gives 3 each time, so the weight is ten times the mean task loss over 3.
        assert float(terms["distillation"].detach()) == pytest.approx(10 * sum(tasks) / len(tasks), rel=1e-6)
    assert len(set(tasks)) == 2
    monkeypatch.setattr(detector, "losses", lambda *_: ({"box": torch.tensor(-0.5)}, []))
    with pytest.raises(
        UserError, match=r"'auto:10' is a share of the task loss, expected .* got -0\.5; .* give a number"
    ):
        model(batch, [3, 4])


def test_who_knows_all_has_nothing_to_learn(config: DetectorConfig, batch: Batch) -> None:
    detector = Detector(config)
    method = make_method("rakd", strides=detector.strides, expert_channels=16, apprentice_channels=16)
    model = make_distillation_model(detector, Detector(config), method, 1.0, "objects")
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(batch, [0, 1])["distillation"] == 0


def test_frames_without_labels_are_refused(config: DetectorConfig, batch: Batch) -> None:
    bare = collate([replace(sample, targets=None) for sample in batch.samples])
    with pytest.raises(ValueError, match="has no labels to learn from"):
        DistillationModel(Detector(config))(bare, [0, 1])
