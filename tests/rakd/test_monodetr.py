"""MonoDETR as a whole: maps, losses, their gradients, detections, files, cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_cases import MANY, NONE, ONE, SIZE, images
from monodetr_cases import CONFIG, LOSSES
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rakd.detector.backbones as backbones_module
from rakd.data.kitti import Batch, KittiDataset, collate
from rakd.data.targets import Targets
from rakd.detector import make_detector
from rakd.detector.base import BaseDetector
from rakd.detector.base_config import BackboneConfig
from rakd.detector.configs import DETECTORS, DetectorConfig
from rakd.detector.detector import Detector
from rakd.detector.files import load_detector, save_detector
from rakd.detector.inference import detect, detect_all
from rakd.detector.latency import benchmark, compiled
from rakd.detector.monodetr.attention import DeformableAttention
from rakd.detector.monodetr.detector import MonoDETR
from rakd.distill.methods import make_method
from rakd.distill.registry import METHODS
from rakd.distributed import Processes
from rakd.errors import UserError
from rakd.geometry import Calibration
from rakd.study.runner import Runner
from rakd.study.settings import STUDIES
from rakd.training.model import DistillationModel, make_distillation_model
from rakd.training.settings import TrainSettings
from rakd.training.trainer import Trainer

CAMERA = Calibration(np.array([[72.0, 0, 64, 4], [0, 72, 17, 0.02], [0, 0, 1, 0.003]]))


@pytest.fixture
def detector() -> MonoDETR:
    return MonoDETR(CONFIG)


@pytest.fixture(scope="module")
def batch(scenes: Path) -> Batch:
    """Two frames with objects."""
    dataset = KittiDataset(scenes, "train", height=64, rules=CONFIG.rules)
    samples = [dataset[i] for i in range(len(dataset))]
    chosen = [sample for sample in samples if sample.targets is not None and len(sample.targets)][:2]
    return collate(chosen, size=(256, 64))


def losses(detector: BaseDetector, pixels: Tensor, targets: list[Targets]) -> tuple[dict[str, Tensor], list[Tensor]]:
    count = len(targets)
    return detector.losses(detector.extract_features(pixels), [SIZE] * count, targets, list(range(count)))


def test_maps(detector: MonoDETR) -> None:
    maps = detector.extract_features(images(2))
    assert list(maps) == ["p3", "p4", "p5", "p6"] and detector.strides == (8, 16, 32, 64)
    for stride, one in zip(detector.strides, maps.values(), strict=True):
        assert one.shape == (2, 16, SIZE[1] // stride, SIZE[0] // stride)


@pytest.mark.parametrize("targets", [[MANY, ONE], [NONE, ONE], [NONE, NONE], [MANY]])
def test_every_parameter_gets_a_gradient(detector: MonoDETR, targets: list[Targets]) -> None:
    for module in detector.train().modules():
        if isinstance(module, DeformableAttention):  # which looks at the same places everywhere at the start
            for layer in (module.offsets, module.weights):
                torch.nn.init.normal_(layer.weight, std=0.1)
    terms, foreground = losses(detector, images(len(targets)), targets)
    assert list(terms) == LOSSES
    for term in terms.values():
        assert term.ndim == 0 and term.dtype == torch.float32 and term.isfinite()
    assert [len(rows) for rows in foreground] == [len(target) for target in targets]
    assert not any(rows.requires_grad for rows in foreground)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if any(map(len, targets)):
            # The keys' biases move all scores of a query alike, which softmax takes no notice of.
            keys = name.endswith(("key.bias", "k.bias", "k_place.bias"))
            assert keys or parameter.grad.abs().sum() > 0, name
    if not any(map(len, targets)):
        assert all(terms[name] == 0 for name in LOSSES[1:-1])
        assert terms["class"] > 0 and terms["depth_map"] > 0


def test_the_same_seeds_give_the_same_bits() -> None:
    a, b, other = MonoDETR(CONFIG), MonoDETR(CONFIG), MonoDETR(CONFIG, seed=1)
    before = torch.random.get_rng_state()
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert not torch.equal(a.decoder.places.weight, other.decoder.places.weight)
    assert torch.equal(torch.random.get_rng_state(), before)
    results = []
    for one in (a, b):
        torch.manual_seed(5)
        terms, _ = losses(one, images(2), [MANY, ONE])
        torch.stack(list(terms.values())).sum().backward()
        results.append([*terms.values(), *(p.grad for p in one.parameters() if p.grad is not None)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_groups_do_not_see_each_other() -> None:
    detector = MonoDETR(replace(CONFIG, transformer=replace(CONFIG.transformer, dropout=0.0))).train()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        maps = detector.extract_features(images())
        before = detector._run(maps, torch.ones(1))[0].logits
        detector.decoder.contents.weight[6:] += 1.0
        after = detector._run(maps, torch.ones(1))[0].logits
        assert torch.equal(before[:, :, :6], after[:, :, :6]) and not torch.equal(before[:, :, 6:], after[:, :, 6:])
        # Evaluation runs the first group alone.
        alone = detector.eval()._run(maps, torch.ones(1))[0].logits
        torch.testing.assert_close(alone, after[:, :, :6], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_images_objects_do_not_depend_on_its_neighbours(detector: MonoDETR) -> None:
    detector.eval()
    pixels = images(3)
    found = detector.predict(pixels, [SIZE, (100, 60), SIZE], [CAMERA] * 3)
    for i, (objects, size) in enumerate(zip(found, [SIZE, (100, 60), SIZE], strict=True)):
        (alone,) = detector.predict(pixels[i : i + 1], [size], [CAMERA])
        assert len(objects) == len(alone) and (len(alone) == 12 or size != SIZE)  # boxes in the padding are left out
        assert len(alone) > 0 and (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
        np.testing.assert_allclose(objects.location, alone.location, rtol=1e-4, atol=1e-4)
        assert objects.scores is not None and (np.diff(objects.scores) <= 0).all()
        assert (objects.boxes >= 0).all() and (objects.boxes[:, 2:] <= np.array(size) - 1).all()
        located = detector.locate(
            pixels[i : i + 1], torch.tensor(size), torch.from_numpy(CAMERA.projection.copy()).float()
        )
        np.testing.assert_allclose(located.location.numpy(), alone.location, rtol=1e-3, atol=1e-3)


def test_wrong_calls(detector: MonoDETR) -> None:
    features = detector.extract_features(images())
    with pytest.raises(ValueError, match="predict needs the detector in evaluation mode"):
        detector.predict(images(), [SIZE], [CAMERA])
    with pytest.raises(ValueError, match="matched_boxes needs the detector in evaluation mode"):
        detector.matched_boxes(features, [ONE])
    with pytest.raises(ValueError, match="sizes, targets and seeds must hold one entry an image, got 1, 2 and 1"):
        detector.losses(features, [SIZE], [ONE, ONE], [0])
    detector.eval()
    with pytest.raises(ValueError, match="losses needs the detector in training mode"):
        detector.losses(features, [SIZE], [ONE], [0])
    with pytest.raises(ValueError, match="sizes and calibrations must hold one entry an image"):
        detector.predict(images(), [SIZE], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 96}, "height must be a positive multiple of 64, got 96"),
        ({"transformer": replace(CONFIG.transformer, queries=5)}, "rules.most must be at most the 5 queries, got 6"),
        (
            {"transformer": replace(CONFIG.transformer, heads=3)},
            "channels must be a multiple of 8 and of 3 heads, got 16",
        ),
        ({"transformer": replace(CONFIG.transformer, groups=0)}, "groups must be 1 or more, got 0"),
        ({"transformer": replace(CONFIG.transformer, dropout=1.0)}, "dropout must lie in 0..1, got 1.0"),
        ({"distilled": "decoder"}, "distilled must be projections, encoder or depth, got 'decoder'"),
        ({"depth": replace(CONFIG.depth, nearest=70.0)}, "depth must have bins between two rising distances"),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_deformable_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.deformable must be False"):
        MonoDETR(replace(CONFIG, backbone=replace(CONFIG.backbone, deformable=True)))


# The original registers these and its forward pass does not use their results: a projection of the self-attention's
# values in each layer, two perceptrons for queries of another kind, and an embedding of labels.
UNUSED = 3 * (256 * 256 + 256) + (2 * (256 * 256 + 256)) + (256 * 256 + 256 + 256 * 2 + 2) + 4 * 255


@pytest.mark.parametrize(("name", "parameters", "gmacs"), [("monodetr-r50", 37.7, 63.4), ("monodetr-r18", 21.2, 39.4)])
def test_the_originals_size(name: str, parameters: float, gmacs: float) -> None:
    """Counted on the original's code, at 384 x 1280."""
    detector = make_detector(name, pretrained=False).eval()
    assert (sum(p.numel() for p in detector.parameters()) + UNUSED) / 1e6 == pytest.approx(parameters, rel=0.01)
    detector.to("meta")  # shapes alone are computed
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        assert isinstance(detector, MonoDETR)
        detector._run(
            detector.extract_features(torch.zeros(1, 3, 384, 1280, device="meta")), torch.ones(1, device="meta")
        )
    # The counter does not know sampling: of 256 channels at 16 places each 4 products between cells, and the weight's.
    tokens = sum((384 // stride) * (1280 // stride) for stride in detector.strides)
    sampling = 3 * (tokens + 50) * 16 * 256 * 5
    assert (counter.get_total_flops() / 2 + sampling) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_a_file_gives_it_back(detector: MonoDETR, tmp_path: Path) -> None:
    save_detector(tmp_path / "detector.pt", detector)
    read = load_detector(tmp_path / "detector.pt")
    assert isinstance(read, MonoDETR) and read.config == CONFIG and not read.training
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in detector.state_dict().items())


def test_a_pretrained_stem_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backbones_module.Backbone,
        "init_source",
        property(lambda _: "ImageNet weights", lambda *_: None),
        raising=False,
    )
    config = replace(CONFIG, backbone=BackboneConfig("resnet18", 16, frozen_norm=True, weights="random"))
    frozen = {n for n, p in MonoDETR(config).pyramid.body.body.named_parameters() if not p.requires_grad}
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer2.0.bn1.weight"} <= frozen
    assert "layer2.0.conv1.weight" not in frozen
    learning = replace(config, backbone=replace(config.backbone, frozen_norm=False))
    stem = MonoDETR(learning).train().pyramid.body.body
    assert not stem.bn1.training and stem.layer2[0].bn1.training
    free = MonoDETR(replace(config, frozen_stem=False))
    assert free.pyramid.body.body.conv1.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(detector: MonoDETR, dtype: torch.dtype) -> None:
    detector.train()
    with torch.autocast("cpu", dtype):
        maps = detector.extract_features(images(2))
        found, depth, _ = detector._run(maps, torch.ones(2))
        assert found.boxes.dtype == depth.dtype == found.logits.dtype == torch.float32
        terms, _ = losses(detector, images(2), [MANY, ONE])
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_frames(scenes: Path, detector: MonoDETR) -> None:
    detector.config = replace(CONFIG, width=256)
    dataset = KittiDataset(scenes, "train", height=64, rules=CONFIG.rules)
    detector.eval()
    found = dict(detect_all(detector, dataset, torch.device("cpu"), indices=[0, 1], progress=False))
    assert list(found) == [dataset.frames[0].id, dataset.frames[1].id]
    one = detect(detector, dataset[0], torch.device("cpu"))
    np.testing.assert_array_equal(one.location, found[dataset.frames[0].id].location)


def test_cost(scenes: Path, detector: MonoDETR) -> None:
    detector.config = replace(CONFIG, width=256)
    frame = KittiDataset(scenes, "train").frames[0]
    (cost,) = benchmark([detector], frame, torch.device("cpu"), repeats=1, warm_up=0, progress=False)
    assert cost.size == (256, 64) and cost.runs == "eager"
    assert cost.gflops is not None and cost.gflops > 0
    assert cost.parameters == sum(p.numel() for p in detector.parameters())
    assert compiled(detector).pyramid._compiled_call_impl is not None


@pytest.mark.parametrize("name", [name for name in METHODS if name != "score_l2"])
def test_every_method_distils_it(name: str, batch: Batch) -> None:
    expert = MonoDETR(replace(CONFIG, backbone=replace(CONFIG.backbone, channels=24)), seed=9)
    method = make_method(
        name, strides=expert.strides, expert_channels=24, apprentice_channels=16, batch_size=2, canonical_size=28.0
    )
    model = make_distillation_model(MonoDETR(CONFIG), expert, method, 1.0, "objects").train()
    terms = model(batch, [3, 4])
    assert list(terms) == [*LOSSES, "distillation"] and terms["distillation"] > 0
    terms["distillation"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.detector.pyramid.parameters())
    assert all(p.grad is None for p in expert.parameters())


@pytest.mark.parametrize(("distilled", "names"), [("encoder", ["e3", "e4", "e5", "e6"]), ("depth", ["d4"])])
def test_later_maps_are_distilled(distilled: str, names: list[str], batch: Batch) -> None:
    config = replace(CONFIG, distilled=distilled, transformer=replace(CONFIG.transformer, dropout=0.0))
    apprentice, expert = MonoDETR(config), MonoDETR(config, seed=9)
    maps = apprentice.distilled_maps(apprentice.extract_features(images()))
    assert list(maps) == names
    for one, stride in zip(maps.values(), apprentice.strides, strict=True):
        assert one.shape == (1, 16, SIZE[1] // stride, SIZE[0] // stride)
    method = make_method(
        "rakd", strides=expert.strides, expert_channels=16, apprentice_channels=16, canonical_size=28.0
    )
    terms = make_distillation_model(apprentice, expert, method, 1.0, "expert").train()(batch, [3, 4])
    assert terms["distillation"] > 0
    terms["distillation"].backward()
    part = apprentice.encoder if distilled == "encoder" else apprentice.depth.trunk
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None for p in apprentice.decoder.parameters())
    # The losses are those of the detector that distils its projections.
    plain = DistillationModel(MonoDETR(replace(config, distilled="projections")).train())(batch, [3, 4])
    assert all(torch.equal(terms[name], plain[name]) for name in LOSSES)


def test_zoomed_images_are_not_kept_with_their_features(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"feature_cache: .* monodetr-tiny zooms them"):
        Runner(STUDIES["monodetr-tiny"], tmp_path, tmp_path, Processes(torch.device("cpu")), cache_bytes=1)


def test_named_studies_pair_one_family() -> None:
    for study in STUDIES.values():
        assert type(DETECTORS[study.expert]) is type(DETECTORS[study.apprentice])
    assert STUDIES["monodetr-kitti"].training.clip == 0.1 and STUDIES["monodetr-kitti"].regions == "objects"


class Noting(torch.nn.Module):
    """A method that notes its boxes and gives a constant."""

    def forward(self, expert: dict[str, Tensor], apprentice: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        self.boxes = boxes
        return apprentice["p3"].sum() * 0 + 3


@pytest.mark.parametrize("regions", ["objects", "proposals", "expert"])
def test_where_features_are_compared(regions: str, batch: Batch) -> None:
    expert, apprentice, method = MonoDETR(CONFIG, seed=9), MonoDETR(CONFIG), Noting()
    targets = batch.targets("cpu")
    torch.manual_seed(0)
    terms = make_distillation_model(apprentice, expert, method, 0.5, regions)(batch, [3, 4])
    assert terms["distillation"] == 1.5
    if regions == "objects":
        expected = [target.boxes for target in targets]
    elif regions == "expert":
        expert.eval()
        expected = expert.matched_boxes(expert.extract_features(batch.images), targets)
    else:
        torch.manual_seed(0)
        _, expected = apprentice.losses(apprentice.extract_features(batch.images), batch.sizes, targets, [3, 4])
    for got, rows, target in zip(method.boxes, expected, targets, strict=True):
        assert len(rows) == len(target) > 0
        # Half a pixel on: from counting at pixel centres to counting at edges, as RoIAlign does.
        torch.testing.assert_close(got, rows + 0.5)


def test_the_two_stage_expert_has_no_queries(small_config: DetectorConfig) -> None:
    method = Noting()
    with pytest.raises(UserError, match="regions: expert needs an expert with queries, a MonoDETR"):
        make_distillation_model(Detector(small_config), Detector(small_config, 1), method, 1.0, "expert")


def test_matched_boxes_are_the_objects_where_queries_say_so(detector: MonoDETR, batch: Batch) -> None:
    detector.eval()
    boxes = detector.matched_boxes(detector.extract_features(batch.images), batch.targets("cpu"))
    assert [len(rows) for rows in boxes] == [len(target) for target in batch.targets("cpu")]
    assert all((rows[:, 2:] > rows[:, :2]).all() for rows in boxes)


def test_training_goes_on_to_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, width=256)

    def trainer(out: str, steps: int = 4) -> Trainer:
        settings = TrainSettings(
            steps=4, batch_size=2, learning_rate=1e-3, optimizer="adamw", warm_up=1, clip=0.1, checkpoint_every=2
        )
        data = KittiDataset(scenes, "train", height=64, rules=config.rules)
        made = Trainer(
            DistillationModel(config.build(1)),
            data,
            settings,
            tmp_path / out,
            torch.device("cpu"),
            fingerprint={"detector": config.to_plain()},
            image_size=config.image_size,
            quiet=True,
        )
        if steps < 4:
            step = made._step

            def killed(batch: Batch) -> tuple[dict[str, float], float]:
                if made.step == steps:
                    raise KeyboardInterrupt
                return step(batch)

            made._step = killed  # type: ignore[method-assign]
        return made

    whole, cut = trainer("whole"), trainer("cut", 3)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = trainer("cut")
    assert again.step == 2
    again.run()
    other = again.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.model.state_dict().items())
