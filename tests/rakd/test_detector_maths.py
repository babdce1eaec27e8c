"""The detector's formulas: encoding and decoding of boxes in space, their losses, and the drawing of boxes."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rakd.data.labels import Objects
from rakd.data.rules import DataRules
from rakd.data.targets import CLASSES, Targets, make_targets
from rakd.detector.decode import Detections, decode, distance_scale
from rakd.detector.heads import KEYPOINTS, MEAN_DIMENSIONS, Box3DHead, Box3DPrediction
from rakd.detector.losses import (
    absolute_points,
    box3d_losses,
    box_heights,
    box_losses,
    corner_loss,
    distance_loss,
    laplace,
    relative_points,
)
from rakd.detector.proposals import covered
from rakd.detector.sampling import IGNORED
from rakd.geometry import Calibration, alpha_from_rotation, box_corners, project_boxes, wrap_angle

SIZE = (1242, 375)
DOUBLE = torch.float64


def attributes(count: int = 2, seed: int = 0, **given_values: Tensor) -> Box3DPrediction:
    """Random predictions in float64, but for those given."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "dimensions": (count, 3),
        "dimensions_log": (count,),
        "angle": (count, 2),
        "angle_log": (count,),
        "keypoints": (count, KEYPOINTS, 2),
        "center_log": (count,),
        "height": (count,),
        "reciprocal": (count,),
        "factors": (count, 3),
    }
    values = {name: torch.randn(shape, generator=rng, dtype=DOUBLE) for name, shape in shapes.items()}
    for name in ("dimensions", "height", "reciprocal"):
        values[name] = values[name].abs() + 0.5
    return Box3DPrediction(**{**values, **given_values})


def targets_of(objects: Objects, calibration: Calibration, size: tuple[int, int]) -> Targets:
    """Targets in float64."""
    targets = make_targets(objects, calibration, size, rules=DataRules(min_height=0.0))
    return Targets(
        **{
            field.name: value.double() if value.is_floating_point() else value
            for field in fields(targets)
            for value in [getattr(targets, field.name)]
        }
    )


def perfect(targets: Targets, boxes: Tensor, stretch: Tensor) -> Box3DPrediction:
    """What heads that know the truth say of boxes; sine and cosine are stretched, as heads may give them."""
    count = len(targets)
    return attributes(
        count,
        dimensions=targets.dimensions,
        angle=torch.stack([targets.alpha.sin(), targets.alpha.cos()], dim=1) * stretch[:, None],
        keypoints=relative_points(targets.keypoints, boxes),
        height=targets.dimensions[:, 0],
        reciprocal=box_heights(boxes) / targets.projected_height,
    )


def detections(pred: Box3DPrediction, boxes: Tensor, classes: Tensor, scores: Tensor) -> Detections:
    """Detections of one image, all valid."""
    return Detections(torch.ones(1, len(boxes), dtype=torch.bool), boxes[None], classes[None], scores[None], pred)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Calibration, Objects]:
    """A camera and one object that it sees, perhaps mirrored and resized."""

    def floats(low: float, high: float) -> float:
        return draw(st.floats(low, high))

    focal, stretch = floats(600, 900), floats(0.95, 1.05)
    projection = [
        [focal, 0, floats(580, 660), floats(-50, 50)],
        [0, focal * stretch, floats(160, 200), floats(-2, 2)],
        [0, 0, 1, floats(-0.01, 0.01)],
    ]
    calibration = Calibration(np.array(projection))
    z = floats(4, 70)
    location = np.array([[floats(-0.7, 0.7) * z, floats(1, 2.2), z]])
    dimensions = np.array([[floats(0.8, 3), floats(0.4, 2.2), floats(0.5, 6)]])
    rotation = np.array([floats(-math.pi, math.pi)])
    boxes = project_boxes(calibration, box_corners(location, dimensions, rotation), SIZE)
    assume(np.isfinite(boxes).all() and (boxes[:, 2:] - boxes[:, :2] > 4).all())
    zeros = np.zeros(1)
    objects = Objects(
        np.array([draw(st.sampled_from(CLASSES))]),
        zeros,
        zeros.astype(np.int64),
        alpha_from_rotation(rotation, location),
        boxes,
        dimensions,
        location,
        rotation,
    )
    if draw(st.booleans()):
        calibration, objects = calibration.flipped(SIZE[0]), objects.flipped(SIZE[0])
    scale = floats(0.3, 1.4)
    return calibration.resized(scale, scale), objects.resized(scale, scale)


@given(scenes(), st.tuples(*[st.floats(-0.2, 0.2)] * 4), st.floats(0.1, 3))
def test_decoding_reverses_encoding(scene, jitter, stretch):
    calibration, objects = scene
    targets = targets_of(objects, calibration, (2000, 600))
    assume(len(targets) == 1)
    size = (targets.boxes[:, 2:] - targets.boxes[:, :2]).repeat(1, 2)
    boxes = targets.boxes + size * torch.tensor(jitter, dtype=DOUBLE)
    pred = perfect(targets, boxes, torch.full((1,), stretch, dtype=DOUBLE))
    found = decode(detections(pred, boxes, targets.classes, torch.ones(1, dtype=DOUBLE)), calibration, 512)
    assert found.types.tolist() == objects.types.tolist()
    np.testing.assert_allclose(found.dimensions, objects.dimensions, atol=1e-4)
    # The targets themselves are float32: a ten-thousandth of a pixel, which is more far away.
    np.testing.assert_allclose(found.location, objects.location, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(wrap_angle(found.rotation_y - objects.rotation_y), 0, atol=1e-4)
    np.testing.assert_allclose(wrap_angle(found.alpha - objects.alpha), 0, atol=1e-4)
    np.testing.assert_allclose(found.boxes, boxes.numpy())


def test_decoding_sorts_by_score_and_keeps_rows_together():
    calibration = Calibration(np.array([[700.0, 0, 600, 40], [0, 700, 180, 0.2], [0, 0, 1, 0.003]]))
    certain = torch.tensor([[3.0, 3.0, 0.0], [-3.0, -3.0, 0.0], [3.0, 3.0, 0.0]], dtype=DOUBLE)
    boxes = torch.tensor([[0.0, 0, 40, 50], [100, 0, 160, 80], [300, 50, 330, 90]], dtype=DOUBLE)
    classes, scores = torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.9, 0.8], dtype=DOUBLE)
    pred = attributes(3, factors=certain)
    found = decode(detections(pred, boxes, classes, scores), calibration, 512)
    assert found.types.tolist() == ["Cyclist", "Car", "Pedestrian"]
    np.testing.assert_array_equal(found.boxes, boxes[[2, 0, 1]])
    np.testing.assert_array_equal(found.dimensions, pred.dimensions[[2, 0, 1]])
    deviation = distance_scale(pred, pred.reciprocal / box_heights(boxes), 700.0, 512).numpy()
    np.testing.assert_allclose(found.scores, (scores.numpy() / (1 + deviation))[[2, 0, 1]])
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("image_height", [128.0, 512.0])
def test_distance_scale_is_that_of_the_density(image_height):
    pred = attributes(6, seed=3)
    reciprocal, fy = torch.rand(6, dtype=DOUBLE) / 50, 650.0
    got = distance_scale(pred, reciprocal, fy, image_height)
    for i in range(6):
        a, b, c = pred.factors[i].tolist()
        factor = np.array([[math.exp(a), 0], [c, math.exp(b)]])
        covariance = np.linalg.inv(factor @ factor.T)
        # z = fy · height · (scaled reciprocal / scale)
        gradient = fy * np.array([reciprocal[i], pred.height[i] / (700 * image_height / 512)])
        assert got[i].item() == pytest.approx(math.sqrt(gradient @ covariance @ gradient), rel=1e-10)


def test_laplace_by_hand_and_its_best_uncertainty():
    error = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, 0.3]], dtype=DOUBLE)
    log = torch.tensor([0.5, -1.0], dtype=DOUBLE)
    got = laplace(error, log)
    np.testing.assert_allclose(got, [2 * math.exp(-0.5) + 0.5, 0.1 * math.e - 1], rtol=1e-12)
    # Of all uncertainties the logarithm of the error is the best: there the gradient is zero.
    best = torch.tensor([2.0, 0.1], dtype=DOUBLE).log().requires_grad_()
    laplace(error, best).sum().backward()
    np.testing.assert_allclose(best.grad, 0, atol=1e-12)


@pytest.fixture
def truth() -> tuple[Targets, Tensor]:
    """Two cars and proposals near them."""
    calibration = Calibration(np.array([[700.0, 0, 600, 40], [0, 700, 180, 0.2], [0, 0, 1, 0.003]]))
    location = np.array([[-3.0, 1.6, 12], [4, 1.7, 25]])
    dimensions = np.array([[1.5, 1.6, 3.9], [1.4, 1.7, 4.2]])
    rotation = np.array([0.3, -2.0])
    boxes = project_boxes(calibration, box_corners(location, dimensions, rotation), SIZE)
    alpha = alpha_from_rotation(rotation, location)
    zeros = np.zeros(2)
    objects = Objects(
        np.array(["Car"] * 2), zeros, zeros.astype(np.int64), alpha, boxes, dimensions, location, rotation
    )
    targets = targets_of(objects, calibration, SIZE)
    assert len(targets) == 2
    return targets, targets.boxes + torch.tensor([3.0, -4, 5, 2], dtype=DOUBLE)


@pytest.mark.parametrize("image_height", [128.0, 512.0])
def test_distance_loss_is_the_bivariate_laplace(truth, image_height):
    targets, boxes = truth
    pred = attributes(2, seed=5)
    got = distance_loss(pred, boxes, targets, image_height)
    for i in range(2):
        a, b, c = pred.factors[i].tolist()
        factor = np.array([[math.exp(a), 0], [c, math.exp(b)]])
        precision = factor @ factor.T
        pixels = (boxes[i, 3] - boxes[i, 1]).item()
        error = np.array(
            [
                pred.height[i].item() - targets.dimensions[i, 0].item(),
                700
                * image_height
                / 512
                * (pred.reciprocal[i].item() / pixels - 1 / targets.projected_height[i].item()),
            ]
        )
        expected = math.sqrt(error @ precision @ error) - 0.5 * math.log(np.linalg.det(precision))
        assert got[i].item() == pytest.approx(expected, abs=1e-5)


def test_losses_are_least_at_the_truth(truth):
    targets, boxes = truth
    pred = perfect(targets, boxes, torch.ones(2, dtype=DOUBLE))
    least = box3d_losses(pred, boxes, targets, 512)
    assert set(least) == {"dimensions", "angle", "corners", "center", "distance"}
    np.testing.assert_allclose(least["corners"], 0, atol=1e-12)
    np.testing.assert_allclose(least["angle"], pred.angle_log)
    np.testing.assert_allclose(least["distance"], 1e-3 - pred.factors[:, :2].sum(dim=1), atol=1e-9)
    reads = {
        "dimensions": ["dimensions"],
        "angle": ["angle"],
        "keypoints": ["corners", "center"],
        "height": ["distance"],
        "reciprocal": ["distance"],
    }
    for name, losses in reads.items():
        for change in (-0.1, 0.1):
            other = box3d_losses(replace(pred, **{name: getattr(pred, name) + change}), boxes, targets, 512)
            for loss, values in other.items():
                assert (values > least[loss]).all() if loss in losses else torch.equal(values, least[loss])


def test_gradients_of_the_losses_agree_with_differences(truth):
    targets, boxes = truth
    names = [field.name for field in fields(Box3DPrediction)]
    pred = attributes(2, seed=7)

    def total(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(box3d_losses(Box3DPrediction(*values), boxes, targets, 512).values())

    assert torch.autograd.gradcheck(total, [getattr(pred, name).clone().requires_grad_() for name in names])


def test_corners_behind_the_camera_do_not_count(truth):
    targets, boxes = truth
    pred = attributes(2, seed=9)
    seen = targets.keypoints_seen.clone()
    seen[0, 2:8] = False
    hidden = replace(targets, keypoints_seen=seen, keypoints=targets.keypoints * seen[..., None])
    error = (pred.keypoints - relative_points(targets.keypoints, boxes)).abs().mean(dim=2)
    np.testing.assert_allclose(corner_loss(pred, boxes, hidden), [error[0, :2].mean(), error[1, :8].mean()])
    nothing = replace(targets, keypoints_seen=torch.zeros_like(seen))
    assert corner_loss(pred, boxes, nothing).tolist() == [0, 0]


coordinates = st.floats(-500, 500)
extents = st.floats(0, 300)


@given(st.lists(st.tuples(coordinates, coordinates, extents, extents, coordinates, coordinates), min_size=1))
def test_relative_points_are_reversed(rows):
    table = torch.tensor(rows, dtype=DOUBLE)
    boxes = torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], dim=1)
    points = table[:, 4:]
    np.testing.assert_allclose(absolute_points(relative_points(points, boxes), boxes), points, atol=1e-9)
    several = points[:, None] + torch.arange(3)[:, None]
    relative = relative_points(several, boxes)
    np.testing.assert_allclose(relative[:, 0], relative_points(points, boxes))
    np.testing.assert_allclose(absolute_points(relative, boxes), several, atol=1e-9)


def test_relative_points_by_hand():
    box = torch.tensor([[10.0, 20, 30, 60]])
    points = torch.tensor([[[20.0, 40], [10, 20], [30, 60], [40, 40]]])
    assert relative_points(points, box).tolist() == [[[0, 0], [-0.5, -0.5], [0.5, 0.5], [1, 0]]]
    # Nothing is divided by the size of an empty box.
    assert relative_points(torch.tensor([[4.0, 5]]), torch.tensor([[3.0, 3, 3, 3]])).tolist() == [[1, 2]]
    assert box_heights(torch.tensor([[0.0, 5, 9, 5.5], [0, 1, 1, 4]])).tolist() == [1, 3]


def test_box_losses_look_at_the_own_class_only():
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 0, 1, 0]], dtype=DOUBLE, requires_grad=True)
    deltas = torch.zeros(2, 3, 4, dtype=DOUBLE, requires_grad=True)
    wanted = torch.tensor([[math.nan] * 4, [1.0, 0, -1, 0.05]], dtype=DOUBLE)
    kinds, places = box_losses(logits, deltas, torch.tensor([0, 2]), wanted)
    np.testing.assert_allclose(kinds.detach(), [math.log(math.exp(2) + 3) - 2, math.log(math.e + 3) - 1], rtol=1e-12)
    np.testing.assert_allclose(places.detach(), [0, 2 * (1 - 1 / 18) + 0.05**2 / 2 * 9], rtol=1e-12)
    ignored, nothing = box_losses(logits, deltas, torch.tensor([IGNORED, 0]), wanted)
    assert ignored.tolist() == [0, pytest.approx(math.log(math.e + 3))] and nothing.tolist() == [0, 0]
    (kinds.sum() + places.sum()).backward()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()
    assert deltas.grad.abs().sum(dim=2).nonzero().tolist() == [[1, 1]]


def test_space_head_starts_at_the_mean_object_and_keeps_its_bounds():
    head = Box3DHead(2, 7, 8)
    classes = torch.tensor([0, 1, 2, 0])
    pred = head(torch.zeros(4, 2, 7, 7), classes)
    means = torch.tensor(MEAN_DIMENSIONS)[classes]
    np.testing.assert_allclose(pred.dimensions.detach(), means, atol=0.1)
    np.testing.assert_allclose(pred.height.detach(), means[:, 0], atol=0.1)
    np.testing.assert_allclose(pred.reciprocal.detach(), 1, atol=0.1)
    for layer in (head.attributes, head.distance):
        torch.nn.init.normal_(layer.weight, std=1000)
    pred = head(torch.randn(4, 2, 7, 7), classes)
    logs = torch.cat([pred.dimensions_log, pred.angle_log, pred.center_log, pred.factors[:, :2].flatten()])
    assert logs.abs().max() <= 3
    assert min(pred.dimensions.min(), pred.height.min(), pred.reciprocal.min()) > 0


def test_space_head_answers_for_the_class_asked():
    head = Box3DHead(2, 7, 8)
    pooled = torch.randn(1, 2, 7, 7).expand(3, -1, -1, -1)
    together = head(pooled, torch.tensor([2, 0, 1]))
    for row, kind in enumerate((2, 0, 1)):
        alone = head(pooled[:1], torch.tensor([kind]))
        for field in fields(Box3DPrediction):
            torch.testing.assert_close(getattr(together, field.name)[row], getattr(alone, field.name)[0])
    assert not torch.equal(together.angle[0], together.angle[1])


def test_covered():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 21], [50, 50, 60, 60], [2, 2, 2, 2]])
    regions = torch.tensor([[0.0, 0, 10, 10], [100, 100, 90, 90]])
    assert covered(boxes, regions).tolist() == [True, True, False, False, False]
    # Two regions that hold a half together hold it in none.
    halves = torch.tensor([[0.0, 0, 4, 10], [6, 0, 10, 10]])
    assert covered(boxes[:1], halves).tolist() == [False]
    assert covered(boxes, torch.zeros(0, 4)).tolist() == [False] * 5
    assert covered(torch.zeros(0, 4), regions).shape == (0,)
