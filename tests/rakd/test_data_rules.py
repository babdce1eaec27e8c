"""Which objects a detector learns, and the random zoom of its training images."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_targets import CALIBRATION, SIZE, make_objects

from rakd.data.augment import zoom
from rakd.data.labels import Objects
from rakd.data.rules import DataRules
from rakd.data.targets import make_targets
from rakd.detector.monodetr.configs import RULES
from rakd.geometry import alpha_from_rotation, box_centers

CAR = make_objects(("Car", 2, 15))


@pytest.mark.parametrize(
    ("objects", "wanted"),
    [
        (CAR, True),
        (make_objects(("Car", 0, 45)), False),  # 1.5 m at 45 m: 24 pixels
        (make_objects(("Car", 0, 41)), True),
        (replace(CAR, truncation=np.array([0.5])), True),
        (replace(CAR, truncation=np.array([0.51])), False),
        (replace(CAR, occlusion=np.array([2])), True),
        (replace(CAR, occlusion=np.array([3])), False),
        (replace(CAR, location=np.array([[0.0, 1.0, 1.9]])), False),
        (replace(CAR, location=np.array([[2.0, 1.65, 65.1]])), False),
        (replace(CAR, boxes=np.array([[0.0, 0, 100, 100]])), False),  # its centre is elsewhere
        (replace(CAR, location=np.array([[-14.5, 1.65, 16]])), False),  # outside of the image
    ],
)
def test_the_originals_rules(objects: Objects, wanted: bool) -> None:
    assert len(make_targets(objects, CALIBRATION, SIZE, rules=RULES)) == wanted


def test_the_first_objects_are_kept() -> None:
    objects = make_objects(("Van", 0, 30), ("Car", 12, 30), ("Car", 2, 14), ("Car", -6, 25))
    targets = make_targets(objects, CALIBRATION, SIZE, rules=DataRules(most=2))
    np.testing.assert_allclose(targets.location[:, 0], [12, 2])


def test_rules_are_checked() -> None:
    for change, message in (
        ({"zoom": 1.5}, "zoom must lie in 0..1, got 1.5"),
        ({"zoom_scale": 0.5}, "zoom_scale must lie in 0..0.5"),
        ({"depth": (3.0, 2.0)}, "depth must be two rising distances"),
        ({"most": 0}, "most must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DataRules(**change)


@pytest.mark.parametrize("seed", range(4))
def test_centres_stay_on_their_objects(seed: int) -> None:
    objects = make_objects(("Car", 2, 15), ("Pedestrian", -4, 12))
    dont_care = replace(CAR, types=np.array(["DontCare"]), location=np.full((1, 3), -1000.0))
    image = Image.new("RGB", SIZE)
    rules = DataRules(zoom=1.0)
    rng = np.random.default_rng(seed)
    zoomed, camera, moved = zoom(image, CALIBRATION, objects, rules, rng)
    assert zoomed.size == image.size and moved is not None
    scale = moved.location[:, 2] / objects.location[:, 2]
    assert 0.95 <= scale[0] <= 1.05 and scale[0] == pytest.approx(scale[1])
    np.testing.assert_array_equal(camera.projection[[0, 1], [0, 1]], CALIBRATION.projection[[0, 1], [0, 1]])
    before, _ = CALIBRATION.project(box_centers(objects.location, objects.dimensions))
    after, _ = camera.project(box_centers(moved.location, moved.dimensions))
    # Relative to the 2D box, the centre stays where it was; boxes shrink as the distance grows.
    inner = (before - objects.boxes[:, :2]) / (objects.boxes[:, 2:] - objects.boxes[:, :2])
    np.testing.assert_allclose((after - moved.boxes[:, :2]) / (moved.boxes[:, 2:] - moved.boxes[:, :2]), inner)
    np.testing.assert_allclose(
        (objects.boxes[:, 3] - objects.boxes[:, 1]) / (moved.boxes[:, 3] - moved.boxes[:, 1]), scale
    )
    np.testing.assert_allclose(alpha_from_rotation(moved.rotation_y, moved.location), objects.alpha, atol=1e-12)
    without = replace(objects, alpha=np.full(len(objects), -10.0))  # as other tools write labels
    _, _, same = zoom(image, CALIBRATION, without, rules, np.random.default_rng(seed))
    assert same is not None
    np.testing.assert_allclose(same.rotation_y, moved.rotation_y, atol=1e-12)
    _, _, unknown = zoom(image, CALIBRATION, dont_care, rules, np.random.default_rng(seed))
    assert unknown is not None and (unknown.location == -1000).all()


@pytest.mark.parametrize("seed", range(3))
def test_pixels_move_with_the_boxes(seed: int) -> None:
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    # Red grows along x, green along y: a pixel's colour tells where it was.
    pixels = np.stack([x, 2 * y, np.zeros_like(x)], axis=2).astype(np.uint8)
    mark = np.array([[80.0, 40.0, 120.0, 60.0]])
    objects = replace(CAR, boxes=mark)
    zoomed, _, moved = zoom(
        Image.fromarray(pixels), CALIBRATION, objects, DataRules(zoom=1.0), np.random.default_rng(seed)
    )
    assert moved is not None
    for (u, v), color in zip(moved.boxes.reshape(2, 2), ((80, 80), (120, 120)), strict=True):
        near = np.asarray(zoomed)[round(v), round(u), :2].astype(float)
        np.testing.assert_allclose(near, color, atol=2.5)  # half a pixel of rounding, and 8 bits
    assert not np.array_equal(np.asarray(zoomed), pixels)


def test_no_zoom_draws_nothing() -> None:
    image = Image.new("RGB", SIZE)
    rng = np.random.default_rng(0)
    assert zoom(image, CALIBRATION, CAR, DataRules(), rng) == (image, CALIBRATION, CAR)
    assert rng.random() == np.random.default_rng(0).random()
