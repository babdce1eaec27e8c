"""MonoDETR's parts against values computed by hand."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from monodetr_cases import perfect
from torch import Tensor

from rakd.data.labels import Objects
from rakd.data.rules import DataRules
from rakd.data.targets import Targets, make_targets
from rakd.detector.monodetr.configs import DepthConfig, LossConfig
from rakd.detector.monodetr.decode import decode_queries
from rakd.detector.monodetr.depth import bin_indices, bin_values
from rakd.detector.monodetr.heads import Predictions, decode_angles, distances, encode_angles, refine
from rakd.detector.monodetr.layers import sine_positions
from rakd.detector.monodetr.losses import depth_map_loss, dimension_loss, query_losses
from rakd.detector.monodetr.matching import generalized_iou, match, matching_costs
from rakd.detector.monodetr.targets import QueryTargets, depth_map_targets, query_targets
from rakd.geometry import Calibration, alpha_from_rotation, box_corners, project_boxes

SIZE = (1242, 375)
CAMERA = Calibration(np.array([[720.0, 0, 610, 45], [0, 715, 173, 0.2], [0, 0, 1, 0.003]]))
BINS = DepthConfig(bins=2, nearest=1.0, farthest=7.0)
WEIGHTS = LossConfig()
LN2 = math.log(2)


def objects(*rows: tuple[str, float, float, float]) -> Objects:
    """Each a type with x, z and rotation; 2D boxes are their projections."""
    types, x, z, rotation = (np.array(column) for column in zip(*rows, strict=True))
    count = len(rows)
    location = np.stack([x, np.full(count, 1.65), z], axis=1)
    dimensions = np.array([[1.5, 1.6, 3.9], [1.8, 0.6, 0.8], [1.7, 0.6, 1.8]])[:count]
    boxes = project_boxes(CAMERA, box_corners(location, dimensions, rotation), SIZE)
    alpha = alpha_from_rotation(rotation, location)
    return Objects(
        types, np.zeros(count), np.zeros(count, dtype=np.int64), alpha, boxes, dimensions, location, rotation
    )


SCENE = objects(("Car", 2.0, 15.0, 0.4), ("Pedestrian", -3.0, 9.0, -2.9), ("Cyclist", 6.0, 22.0, 1.6))


def wide(targets: Targets) -> Targets:
    values = {field.name: getattr(targets, field.name) for field in fields(targets)}
    return Targets(**{name: value.double() if value.is_floating_point() else value for name, value in values.items()})


def one_target(box: tuple[float, ...], **changes: Tensor) -> QueryTargets:
    """One image with one car."""
    values = {
        "classes": torch.zeros(1, 1, dtype=torch.int64),
        "boxes": torch.tensor([[box]], dtype=torch.float64),
        "dimensions": torch.tensor([[[2.0, 2.0, 4.0]]], dtype=torch.float64),
        "angle_bins": torch.zeros(1, 1, dtype=torch.int64),
        "angle_residuals": torch.full((1, 1), 0.1, dtype=torch.float64),
        "depth": torch.full((1, 1), 10.0, dtype=torch.float64),
        "focal": torch.ones(1, dtype=torch.float64),
    }
    return QueryTargets([1], torch.ones(1, 1, dtype=torch.bool), **{**values, **changes})


def one_prediction(box: tuple[float, ...], count: int = 1) -> Predictions:
    """One layer, one image, ``count`` equal queries; all logits 0."""
    return Predictions(
        logits=torch.zeros(1, 1, count, 3, dtype=torch.float64),
        boxes=torch.tensor(box, dtype=torch.float64).expand(1, 1, count, 6),
        dimensions=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).expand(1, 1, count, 3),
        angles=torch.zeros(1, 1, count, 24, dtype=torch.float64),
        depth=torch.zeros(1, 1, count, 2, dtype=torch.float64),
    )


TARGET = (0.6, 0.5, 0.1, 0.2, 0.1, 0.1)
PRED = (0.5, 0.5, 0.1, 0.1, 0.1, 0.1)


def test_bins_grow_by_the_same_length() -> None:
    # Two bins over 6 m: s = 2 * 6 / (2 * 3) = 2, so 2 m and 4 m wide, from 1 and from 3 m.
    torch.testing.assert_close(bin_values(BINS), torch.tensor([1.0, 3.0, 7.0]))
    depth = torch.tensor([1.0, 2.9, 3.1, 6.9, 7.0, 7.1, 0.5, math.inf])
    assert bin_indices(depth, BINS).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]


def test_the_originals_bins() -> None:
    values = bin_values(DepthConfig())
    assert len(values) == 81
    # Bin 40 begins at 0.001 + s * 40 * 41 / 2 with s = 2 * 59.999 / 6480.
    assert values[40].item() == pytest.approx(15.185932, abs=1e-5)
    middles = (values[:-1] + values[1:]) / 2
    assert bin_indices(middles, DepthConfig()).tolist() == list(range(80))


def test_generalized_iou() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [4, 0, 6, 2], [0, 0, 2, 2]])
    # Shared 1 of 7, around 9; apart: 0 of 8, around 12; the same.
    expected = torch.tensor([1 / 7 - 2 / 9, -4 / 12, 1.0])
    torch.testing.assert_close(generalized_iou(boxes[:1], boxes[1:]), expected)


def test_a_pairs_cost() -> None:
    # Boxes (.4, .4, .6, .6) and (.5, .4, .8, .6): shared .02, union .08, around .08.
    classes = 2 * (0.25 * 0.25 * LN2 - 0.75 * 0.25 * LN2)
    expected = classes + 10 * 0.1 + 5 * 0.1 - 2 * 0.25
    found = one_prediction(PRED)
    cost = matching_costs(found.logits, found.boxes, one_target(TARGET), WEIGHTS)
    assert cost.shape == (1, 1, 1, 1)
    assert cost.item() == pytest.approx(expected, abs=1e-6)


def test_each_group_is_matched_at_the_least_cost() -> None:
    near, far = (0.6, 0.5, 0.1, 0.2, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    targets = one_target(near)
    targets = replace(
        targets,
        counts=[2, 0],
        valid=torch.tensor([[True, True], [False, False]]),
        classes=torch.zeros(2, 2, dtype=torch.int64),
        boxes=torch.tensor([[near, far], [near, far]], dtype=torch.float64),
    )
    middle = (0.4, 0.4, 0.1, 0.1, 0.1, 0.1)
    boxes = torch.tensor([far, middle, near, middle, near, far], dtype=torch.float64).expand(1, 2, 6, 6)
    found = match(torch.zeros(1, 2, 6, 3), boxes, targets, 2, WEIGHTS)
    assert found.tolist() == [[[[2, 0], [4, 5]], [[0, 0], [0, 0]]]]


def test_more_objects_than_queries_are_refused() -> None:
    targets = replace(
        one_target(TARGET),
        counts=[2],
        valid=torch.ones(1, 2, dtype=torch.bool),
        classes=torch.zeros(1, 2, dtype=torch.int64),
        boxes=torch.tensor([[TARGET, TARGET]], dtype=torch.float64),
    )
    found = one_prediction(PRED)
    with pytest.raises(ValueError, match="at most 1 objects an image, as many as queries, got 2"):
        match(found.logits, found.boxes, targets, 1, WEIGHTS)


@pytest.mark.parametrize("groups", [1, 3])
def test_losses_of_one_object(groups: int) -> None:
    found, targets = one_prediction(PRED, groups), one_target(TARGET)
    matches = torch.arange(groups).view(1, 1, groups, 1)
    depth = torch.full((1, 1, groups), 10.5, dtype=torch.float64)
    found = replace(found, depth=torch.tensor([0.0, math.log(2)], dtype=torch.float64).expand(1, 1, groups, 2))
    losses = query_losses(found, depth, targets, matches, WEIGHTS)
    expected = {
        # The car's class is missed by half, two others by half as well: a (1 - p) ** 2 ln 2 each.
        "class": 2 * (0.25 * 0.25 + 2 * 0.75 * 0.25) * LN2,
        "center": 10 * 0.1,
        "box": 5 * 0.1,
        "giou": 2 * 0.75,
        # |1 - 2| / 2, scaled so that the sum is that of the plain L1.
        "dimensions": 1.0,
        "angle": math.log(12) + 0.1,
        "depth": math.sqrt(2) / 2 * 0.5 + math.log(2),
    }
    # Each group counts an object of its own, so the mean is the same for any number of groups.
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-6)


def test_queries_without_an_object_have_no_class() -> None:
    found, targets = one_prediction(PRED, 2), one_target(TARGET)
    alone = query_losses(found, torch.zeros(1, 1, 2), targets, torch.zeros(1, 1, 1, 1, dtype=torch.int64), WEIGHTS)
    expected = 2 * (0.25 * 0.25 + 5 * 0.75 * 0.25) * LN2
    assert alone["class"].item() == pytest.approx(expected, abs=1e-6)


def test_dimensions_are_relative_at_the_plain_losss_size() -> None:
    pred = torch.tensor([[[[1.0, 2, 4], [3, 1, 1]]]], requires_grad=True)
    goal = torch.tensor([[[2.0, 2, 8], [9, 9, 9]]])
    loss = dimension_loss(pred, goal, torch.tensor([[True, False]])).sum()
    assert loss.item() == pytest.approx(5.0)  # |1| + |4|
    loss.backward()
    # Relative errors 1/2 and 1/2, scaled by 5: half of 5 each, though one error is four times the other.
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad, torch.tensor([[[[-2.5, 0, -0.625], [0, 0, 0]]]]))


def test_near_boxes_cover_far_ones_in_the_map() -> None:
    # On a map of 4 x 4: x from .3 to .8 (cells 1 to 3), y from .25 to .75 (cells 1 and 2); and all of it behind.
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.3, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]])
    targets = replace(
        one_target(TARGET), counts=[2], boxes=boxes, depth=torch.tensor([[2.0, 5.0]]), valid=torch.ones(1, 2) > 0
    )
    near_over_far = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert depth_map_targets(targets, (4, 4), BINS)[0].tolist() == near_over_far
    alone = replace(targets, valid=torch.tensor([[True, False]]))
    assert depth_map_targets(alone, (4, 4), BINS)[0].tolist() == [[2] * 4, [2, 0, 0, 0], [2, 0, 0, 0], [2] * 4]


def test_loss_of_the_map() -> None:
    logits = torch.zeros(1, 3, 4, 4)
    targets = replace(one_target((0.5, 0.5, 0.2, 0.3, 0.25, 0.25)), depth=torch.tensor([[2.0]]))
    # Six cells of 16 are the object's; every bin has a probability of a third.
    cell = 0.25 * (2 / 3) ** 2 * math.log(3)
    assert depth_map_loss(logits, targets, BINS).item() == pytest.approx((6 * 13 + 10) / 16 * cell, rel=1e-6)


def test_boxes_are_refined_in_logits() -> None:
    two = torch.tensor([[[0.5, 0.25]]])
    torch.testing.assert_close(refine(torch.zeros(1, 1, 6), two), torch.tensor([[[0.5, 0.25, 0.5, 0.5, 0.5, 0.5]]]))
    six = torch.tensor([[[0.9, 0.2, 0.1, 0.05, 0.3, 0.4]]])
    torch.testing.assert_close(refine(torch.zeros(1, 1, 6), six), six)
    # sigmoid(ln 3 + ln 3) = 9 / 10
    moved = refine(torch.full((1, 1, 6), math.log(3.0)), torch.full((1, 1, 6), 0.75))
    torch.testing.assert_close(moved, torch.full((1, 1, 6), 0.9))
    edge = refine(torch.zeros(1, 1, 6), torch.tensor([[[0.0, 1, 0, 1, 0, 1]]]).requires_grad_())
    assert edge.isfinite().all()


def test_the_distance_is_the_mean_of_three() -> None:
    found = Predictions(
        logits=torch.zeros(1, 1, 3),
        boxes=torch.tensor([[[0.5, 0.5, 0.1, 0.1, 0.1, 0.15]]]),
        dimensions=torch.tensor([[[1.5, 1.6, 3.9]]]),
        angles=torch.zeros(1, 1, 24),
        depth=torch.tensor([[[-math.log(9.0), 0.0]]]),
    )
    expected = torch.tensor([[[3.0, 5.0], [7.0, 9.0]]])
    # 1 / sigmoid(-ln 9) - 1 = 9; 700 * 1.5 / (.25 * 200) = 21; the map's middle is 6.
    got = distances(found, expected, torch.tensor([700.0]), 200.0)
    torch.testing.assert_close(got, torch.tensor([[12.0]]), rtol=1e-4, atol=0)
    corner = replace(found, boxes=torch.tensor([[[1.0, 0.0, 0.1, 0.1, 0.1, 0.15]]]))
    torch.testing.assert_close(
        distances(corner, expected, torch.tensor([700.0]), 200.0), torch.tensor([[35 / 3]]), rtol=1e-4, atol=0
    )
    flat = replace(found, boxes=torch.tensor([[[0.5, 0.5, 0.1, 0.1, 0.001, 0.001]]]))
    torch.testing.assert_close(
        distances(flat, expected, torch.tensor([700.0]), 200.0), torch.tensor([[355.0]]), rtol=1e-4, atol=0
    )


def test_angles_survive() -> None:
    alpha = torch.linspace(-math.pi, math.pi, 97)
    bins, residuals = encode_angles(alpha)
    assert residuals.abs().max() <= math.pi / 12 + 1e-6
    angles = torch.zeros(97, 24)
    angles[torch.arange(97), bins] = 1.0
    angles[torch.arange(97), 12 + bins] = residuals
    turn = decode_angles(angles) - alpha
    torch.testing.assert_close(turn.cos(), torch.ones(97))
    assert encode_angles(torch.tensor([0.0, math.pi / 6, -math.pi / 6]))[0].tolist() == [0, 1, 11]


def test_positions_differ_from_cell_to_cell() -> None:
    table = sine_positions(3, 4, 16, torch.device("cpu"))[0]
    assert table.shape == (12, 16)
    assert len({tuple(row) for row in table.tolist()}) == 12
    # Row 1 of 3, column 1 of 4 (from 1): sine and cosine of 2 pi / 3 and of 2 pi / 4.
    expected = [math.sin(2 * math.pi / 3), math.cos(2 * math.pi / 3)], [math.sin(math.pi / 2), math.cos(math.pi / 2)]
    torch.testing.assert_close(table[0, :2], torch.tensor(expected[0]))
    torch.testing.assert_close(table[0, 8:10], torch.tensor(expected[1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_known_box_comes_back(flip: bool, scale: float) -> None:
    """Labels to targets to perfect predictions to objects, in float64; resized and mirrored as training does."""
    width, height = round(scale * SIZE[0]), 187.5 * 2 * scale
    wanted, camera = SCENE, CAMERA
    if flip:
        wanted, camera = wanted.flipped(SIZE[0]), camera.flipped(SIZE[0])
    wanted, camera = wanted.resized(width / SIZE[0], scale), camera.resized(width / SIZE[0], scale)
    targets = wide(make_targets(wanted, camera, (width, int(height)), scale=scale, rules=DataRules(min_visible=0.0)))
    assert len(targets) == 3
    image = (1280, 384)
    found, depth = perfect(query_targets([targets], image))
    camera_values = torch.from_numpy(camera.projection.copy())
    size = torch.tensor([width, int(height)])
    got = decode_queries(found, depth, camera_values, image, size, most=9, limit=0.2)
    assert got.classes.tolist() == [0, 1, 2]
    # Targets are float32, whose seventh digit at 600 pixels and 15 m is a micrometre.
    np.testing.assert_allclose(got.location, wanted.location, atol=1e-5)
    np.testing.assert_allclose(got.dimensions, wanted.dimensions, atol=1e-6)
    np.testing.assert_allclose(np.cos(got.rotation_y.numpy() - wanted.rotation_y), 1.0, atol=1e-10)
    np.testing.assert_allclose(got.boxes, wanted.boxes, atol=1e-4)
    scores = torch.sigmoid(torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)) * 2  # exp(-ln .5)
    torch.testing.assert_close(got.scores, scores)


def test_flipped_targets_are_mirrored() -> None:
    plain, mirrored = (
        query_targets([wide(make_targets(scene, camera, SIZE, rules=DataRules(min_visible=0.0)))], SIZE)
        for scene, camera in ((SCENE, CAMERA), (SCENE.flipped(SIZE[0]), CAMERA.flipped(SIZE[0])))
    )
    u, v, left, right, top, bottom = plain.boxes.unbind(dim=-1)
    torch.testing.assert_close(
        mirrored.boxes, torch.stack([1 - u, v, right, left, top, bottom], dim=-1), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(mirrored.depth, plain.depth)
    torch.testing.assert_close(mirrored.focal, plain.focal)
    width = math.pi / 6
    turned = [t.angle_bins * width + t.angle_residuals for t in (plain, mirrored)]
    torch.testing.assert_close((turned[0] + turned[1] - math.pi).cos(), torch.ones(1, 3, dtype=torch.float64))


def test_the_focal_length_is_the_cameras() -> None:
    targets = make_targets(SCENE, CAMERA, SIZE, rules=DataRules(min_visible=0.0))
    empty = make_targets(SCENE.select(np.zeros(3, dtype=bool)), CAMERA, SIZE)
    torch.testing.assert_close(query_targets([targets, empty], SIZE).focal, torch.tensor([715.0, 1.0]))


def test_nothing_surer_than_the_limit() -> None:
    targets = query_targets([wide(make_targets(SCENE, CAMERA, SIZE, rules=DataRules(min_visible=0.0)))], SIZE)
    found, depth = perfect(targets)
    size, camera = torch.tensor(SIZE), torch.from_numpy(CAMERA.projection.copy())
    assert len(decode_queries(found, depth, camera, SIZE, size, most=9, limit=0.99).scores) == 0
    assert len(decode_queries(found, depth, camera, SIZE, size, most=2, limit=0.0).scores) == 2


def test_nothing_in_the_padding() -> None:
    """A box of which the image's border leaves nothing is no detection, however sure."""
    targets = query_targets([wide(make_targets(SCENE, CAMERA, SIZE, rules=DataRules(min_visible=0.0)))], SIZE)
    found, depth = perfect(targets)
    camera = torch.from_numpy(CAMERA.projection.copy())
    everything = decode_queries(found, depth, camera, SIZE, torch.tensor(SIZE), most=9, limit=0.2)
    left = everything.boxes[:, 0].sort().values
    narrow = torch.tensor([int(left[1]), SIZE[1]])  # ends before the second box begins
    kept = decode_queries(found, depth, camera, SIZE, narrow, most=9, limit=0.2)
    assert kept.classes.tolist() == [int(everything.classes[everything.boxes[:, 0].argmin()])]
