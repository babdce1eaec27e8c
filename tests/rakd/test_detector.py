"""The detector as a whole: features, losses, their gradients, draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from detector_cases import LOSSES, MANY, NONE, ONE, SIZE, images, losses, make_targets, still

from rakd.data.targets import Targets
from rakd.detector.configs import DETECTORS, DetectorConfig
from rakd.detector.detector import Detector, target_rows
from rakd.detector.proposals import covered
from rakd.detector.pyramid import STRIDES
from rakd.detector.sampling import IGNORED
from rakd.geometry import Calibration

CAMERA = Calibration(np.array([[72.0, 0, 64, 4], [0, 72, 17, 0.02], [0, 0, 1, 0.003]]))


@pytest.fixture
def detector(small_config: DetectorConfig) -> Detector:
    return Detector(small_config)


def test_features(detector: Detector) -> None:
    features = detector.extract_features(images(2))
    assert list(features) == ["p2", "p3", "p4", "p5"]
    assert detector.strides == STRIDES == (4, 8, 16, 32)
    for stride, feature in zip(detector.strides, features.values(), strict=True):
        assert feature.shape == (2, detector.channels, SIZE[1] // stride, SIZE[0] // stride)
        assert feature.is_contiguous(memory_format=torch.channels_last)


def test_the_memory_layout_of_images_does_not_matter(detector: Detector) -> None:
    detector.eval()
    pixels = images(2)
    plain = detector.extract_features(pixels)
    last = detector.extract_features(pixels.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(plain[name], last[name]) for name in plain)


def test_pooling_looks_where_the_box_is(detector: Detector) -> None:
    # Maps whose cells hold the place of their centres in pixels, the first pixel's centre being 0.
    maps = {}
    for level, stride in zip(("p2", "p3", "p4", "p5"), STRIDES, strict=True):
        x, y = (stride * (torch.arange(extent // stride) + 0.5) - 0.5 for extent in SIZE)
        maps[level] = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]
    # One box a level, none of which comes near the edge.
    boxes = torch.tensor([[20.0, 20, 31, 27], [30.0, 20, 52, 45], [24.0, 12, 80, 44], [32.0, 16, 96, 48]])
    pooled = detector._pool(maps, [boxes])
    centers = pooled.mean(dim=(2, 3)).flip(1)
    torch.testing.assert_close(centers, (boxes[:, :2] + boxes[:, 2:]) / 2)


def test_what_lies_outside_the_image_is_no_detection(detector: Detector) -> None:
    proposals = torch.tensor([[[10.0, 10, 30, 30], [70.0, 10, 90, 30], [10.0, 70, 30, 90]]])
    logits, deltas = torch.zeros(3, 4), torch.zeros(3, 12)
    logits[:, 1] = 9.0  # all three are surely cars
    valid, extents = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[64.0, 64.0]])
    boxes, scores, kept = detector._suppress(logits, deltas, proposals, valid, extents)
    found = kept & (scores > 0.5)
    assert boxes[found].tolist() == [[10.0, 10.0, 30.0, 30.0]]


@pytest.mark.parametrize("anchor_sizes", [(8, 16, 32, 64), (8, 16, 32, 64, 128)])
def test_every_parameter_gets_a_gradient(small_config: DetectorConfig, anchor_sizes: tuple[int, ...]) -> None:
    proposals = replace(small_config.proposals, anchor_sizes=anchor_sizes, sampled=2000)
    detector = Detector(replace(small_config, proposals=proposals))
    terms, foreground = losses(detector, images(2), [MANY, ONE])
    assert list(terms) == LOSSES
    for term in terms.values():
        assert term.ndim == 0 and term.dtype == torch.float32 and term.isfinite()
    # The objects' own boxes are drawn where there is room, so that there is always something to learn from.
    for rows, target in zip(foreground, (MANY, ONE), strict=True):
        assert (rows[:, None] == target.boxes).all(dim=2).any(dim=0).all()
        assert not rows.requires_grad
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("targets", [[NONE], [NONE, NONE], [NONE, ONE], [ONE]])
def test_images_with_few_objects_or_none(detector: Detector, targets: list[Targets]) -> None:
    terms, foreground = losses(detector, images(len(targets)), targets)
    assert list(terms) == LOSSES
    assert all(term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for rows, target in zip(foreground, targets, strict=True):
        assert (len(rows) > 0) == (len(target) > 0)
    if not any(map(len, targets)):
        assert all(terms[name] == 0 for name in ("proposal_box", "box", *LOSSES[4:]))
        assert terms["objectness"] > 0 and terms["class"] > 0


def test_anchors_in_ignored_regions_are_neither_positive_nor_negative(detector: Detector) -> None:
    region = (60.0, 0.0, 128.0, 64.0)
    features = list(detector.extract_features(images()).values())
    anchors = torch.cat(detector.proposals.anchor_generator(features))
    target = make_targets((5, 20, 40, 50), (90, 10, 110, 55), ignored=(region,))
    (labels,), (matched,) = detector.proposals.assign(anchors, [target])
    inside = covered(anchors, target.ignored)
    assert inside.any() and not inside.all()
    assert not (labels[inside] == 0).any()
    assert (labels[inside] == IGNORED).any()
    # An object in the region is still one.
    assert (labels[inside] == 1).any()
    assert (matched[inside & (labels == 1)] == target.boxes[1]).all()
    (others,), _ = detector.proposals.assign(anchors, [replace(target, ignored=torch.zeros(0, 4))])
    assert torch.equal(others[~inside], labels[~inside])
    assert (others[inside] == 0).any()


def test_proposals_in_ignored_regions_are_not_drawn(detector: Detector) -> None:
    corner = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([108.0, 44])
    proposals = torch.cat([corner, corner + 20], dim=1)
    target = make_targets((5, 20, 40, 50), (90, 10, 110, 55), ignored=((60.0, 0.0, 128.0, 64.0),))
    valid = torch.ones(1, len(proposals), dtype=torch.bool)
    (boxes,), (labels,), (matched,) = detector._draw_proposals(proposals[None], valid, [target], [3])
    inside = covered(boxes, target.ignored)
    assert len(boxes) == detector.config.heads.sampled
    assert (labels >= 0).all()
    assert (labels[inside] > 0).all()
    assert (boxes[inside] == target.boxes[1]).all(dim=1).any()  # an object in the region is still one
    assert (labels > 0).sum() <= detector.config.heads.positive_share * len(boxes)
    assert torch.equal(labels[labels > 0] - 1, target.classes[matched[labels > 0]])
    # Without the region, background is drawn from there, too.
    free = replace(target, ignored=torch.zeros(0, 4))
    (boxes,), (labels,), _ = detector._draw_proposals(proposals[None], valid, [free], [3])
    assert (labels[covered(boxes, target.ignored)] == 0).any()


def test_no_candidates_at_all_give_losses(detector: Detector) -> None:
    everything = replace(NONE, ignored=torch.tensor([[-99.0, -99, 999, 999]]))
    terms, foreground = losses(detector, images(), [everything])
    assert all(term == 0 for term in terms.values())
    assert foreground[0].shape == (0, 4)
    torch.stack(list(terms.values())).sum().backward()


def test_the_same_seeds_give_the_same_bits(small_config: DetectorConfig) -> None:
    a, b, other = Detector(small_config), Detector(small_config), Detector(small_config, seed=1)
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert not torch.equal(a.box_head.scores.weight, other.box_head.scores.weight)
    assert not torch.equal(next(a.pyramid.parameters()), next(other.pyramid.parameters()))
    results = [losses(d, images(2), [MANY, ONE], [4, 2]) for d in (a, b)]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())
    assert all(map(torch.equal, results[0][1], results[1][1]))
    terms, _ = losses(b, images(2), [MANY, ONE], [5, 2])
    assert terms["objectness"] != results[0][0]["objectness"]
    assert terms["class"] != results[0][0]["class"]


def test_a_draw_does_not_depend_on_the_other_images(detector: Detector) -> None:
    still(detector)
    pixels = images(2).double()
    _, together = losses(detector, pixels, [MANY, ONE], [7, 8])
    for i, target in enumerate((MANY, ONE)):
        _, alone = losses(detector, pixels[i : i + 1], [target], [7 + i])
        torch.testing.assert_close(together[i], alone[0])


@pytest.mark.parametrize("second", [ONE, NONE], ids=["one", "none"])
def test_losses_of_a_batch_are_means(detector: Detector, second: Targets) -> None:
    still(detector)
    pixels = images(2).double()
    together, foreground = losses(detector, pixels, [MANY, second])
    counts = torch.tensor([len(rows) for rows in foreground])
    assert counts[0] != counts[1]
    singles = [losses(detector, pixels[i : i + 1], [t], [i])[0] for i, t in enumerate((MANY, second))]
    for name, value in together.items():
        # The heads' terms are means over images, those of objects in space means over objects.
        weights = counts / counts.sum() if name in LOSSES[4:] else torch.tensor([0.5, 0.5])
        expected = sum(w * single[name].double() for w, single in zip(weights, singles, strict=True))
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-7)


def test_autocast(small_config: DetectorConfig) -> None:
    backbone = replace(small_config.backbone, name="resnet18", deformable=True)
    for config in (small_config, replace(small_config, backbone=backbone)):
        detector = Detector(config)
        with torch.autocast("cpu", torch.bfloat16):
            features = detector.extract_features(images(2))
            assert all(feature.dtype == torch.bfloat16 for feature in features.values())
            terms, foreground = detector.losses(features, [SIZE] * 2, [MANY, ONE], [0, 1])
        assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
        assert foreground[0].dtype == torch.float32
        torch.stack(list(terms.values())).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_anchors_stand_at_the_cells_in_any_precision(dtype: torch.dtype) -> None:
    generator = Detector(replace(DETECTORS["tiny"], proposals=DETECTORS["kitti-r18"].proposals)).proposals
    sizes = [(1760 // s, 512 // s) for s in STRIDES] + [(28, 8)]  # p6 is 27.5 cells wide, rounded up
    maps = [torch.zeros(1, 1, h, w, dtype=dtype) for w, h in sizes]
    parts = generator.anchor_generator(maps)
    anchors = torch.cat(parts)
    assert anchors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for stride, (w, h), own in zip((4, 8, 16, 32, 64), sizes, parts, strict=True):
        part = (own[:, :2] + own[:, 2:]) / 2
        x, y = torch.arange(w) * stride, torch.arange(h) * stride
        assert part[::3].tolist() == [[float(a), float(b)] for b in y for a in x]
    areas = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1).sqrt()
    assert areas[0] == pytest.approx(32, rel=0.03) and areas[-1] == pytest.approx(512, rel=0.03)


def test_construction_leaves_the_global_generators_alone(
    small_config: DetectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Detector(small_config).state_dict()
    state = torch.get_rng_state()

    def refused(seed: int) -> None:
        raise AssertionError("torch.manual_seed also seeds the GPUs' generators, which nothing restores")

    monkeypatch.setattr(torch, "manual_seed", refused)
    again = Detector(small_config).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in expected.items())


def test_losses_leave_the_global_generator_alone(detector: Detector) -> None:
    state = torch.get_rng_state()
    losses(detector, images(2), [MANY, ONE])
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_modes_and_lengths(detector: Detector) -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        detector.predict(images(), [SIZE], [CAMERA])
    features = detector.extract_features(images(2))
    for sizes, targets, seeds in (
        ([SIZE], [ONE, ONE], [0, 1]),
        ([SIZE] * 2, [ONE], [0, 1]),
        ([SIZE] * 2, [ONE] * 2, [0]),
    ):
        with pytest.raises(ValueError, match=r"one entry an image, got .* for 2 images"):
            detector.losses(features, sizes, targets, seeds)
    detector.eval()
    with pytest.raises(ValueError, match="training mode"):
        detector.losses(features, [SIZE] * 2, [ONE] * 2, [0, 1])
    for sizes, cameras in (([SIZE], [CAMERA] * 2), ([SIZE] * 2, [CAMERA])):
        with pytest.raises(ValueError, match=r"one entry an image, got .* for 2 images"):
            detector.predict(images(2), sizes, cameras)


def test_rows_of_targets() -> None:
    chosen = target_rows(MANY, torch.tensor([2, 0]))
    assert chosen.classes.tolist() == [2, 0]
    assert torch.equal(chosen.keypoints, MANY.keypoints[[2, 0]])
    assert chosen.ignored is MANY.ignored
    nothing = target_rows(NONE, torch.tensor([-1, -1]))
    assert nothing.classes.tolist() == [0, 0]
    assert nothing.keypoints.shape == (2, 9, 2) and nothing.keypoints_seen.dtype == torch.bool
