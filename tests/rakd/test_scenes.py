import hashlib
import json
import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_iou

from rakd.data.frames import find_frames, read_split
from rakd.geometry import alpha_from_rotation, box_corners, project_boxes
from rakd.scenes import make_scenes
from rakd.scenes.draws import Draws, hash_cells
from rakd.scenes.paint import plain
from rakd.scenes.raster import NEAR, Camera, Canvas, clip_near, draw_body, fill
from rakd.scenes.shapes import block
from rakd.scenes.world import Body, make_world

SIZE = (414, 125)
GOLDEN = "172a228c91cc4aa30590177e88e9a3726ef53c5657ecb793fe7b1722333730ae"


def digest(root: Path) -> str:
    """Hash of all files of a data set, names included; of images, of their pixels."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(root)).encode())
            total.update(Image.open(path).tobytes() if path.suffix == ".png" else path.read_bytes())
    return total.hexdigest()


def test_the_same_seed_gives_these_pixels_and_labels(tmp_path):
    # When the renderer is meant to change, raise its _VERSION and renew the hash.
    make_scenes(tmp_path / "out", 2, seed=5, size=SIZE)
    assert digest(tmp_path / "out") == GOLDEN


def test_frames_depend_on_seed_and_number_only(tmp_path, scenes):
    make_scenes(tmp_path / "fewer", 3, seed=3, size=SIZE)
    other = tmp_path / "other"
    make_scenes(other, 2, seed=4, size=SIZE)
    for frame in find_frames(tmp_path / "fewer"):
        twin = scenes / "training" / "image_2" / frame.image.name
        assert frame.image.read_bytes() == twin.read_bytes()
        assert frame.label.read_text() == (scenes / "training" / "label_2" / f"{frame.id}.txt").read_text()
    different = (other / "training" / "image_2" / "000000.png").read_bytes()
    assert different != (scenes / "training" / "image_2" / "000000.png").read_bytes()


def test_processes_give_the_same_bytes(tmp_path, scenes):
    make_scenes(tmp_path / "out", 10, seed=3, size=SIZE, workers=2)
    assert digest(tmp_path / "out") == digest(scenes)
    assert not multiprocessing.active_children()


def test_an_interrupted_run_is_completed(tmp_path, scenes, monkeypatch):
    out = tmp_path / "out"
    make_scenes(out, 4, seed=3, size=SIZE)
    (out / "training" / "label_2" / "000002.txt").unlink()
    killed, young = (
        out / "training" / "image_2" / f".000002-{name}.png" for name in ("0123456789abcdef", "fedcba9876543210")
    )
    mine = out / "training" / "label_2" / ".mine"
    for path in (killed, young, mine):
        path.write_text("half of")
    for path in (killed, mine):
        os.utime(path, (0, 0))
    kept = (out / "training" / "image_2" / "000001.png").stat().st_mtime_ns
    make_scenes(out, 10, seed=3, size=SIZE)
    assert not killed.exists()
    mine.unlink()  # not one of ours
    young.unlink()  # it may be another process's
    assert digest(out) == digest(scenes)
    assert (out / "training" / "image_2" / "000001.png").stat().st_mtime_ns == kept


def test_an_interrupted_larger_run_is_not_made_a_smaller_one(tmp_path):
    make_scenes(tmp_path, 4, seed=3, size=SIZE)
    for path in (tmp_path / "ImageSets").iterdir():  # written last
        path.unlink()
    with pytest.raises(ValueError, match=r"frames must be at least 4, which .* holds already, got 3"):
        make_scenes(tmp_path, 3, seed=3, size=SIZE)


def test_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            make_scenes(tmp_path / "out", 2, size=SIZE)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"out: .* is not an empty folder and holds no scenes\.json"):
        make_scenes(tmp_path, 2, size=SIZE)
    with pytest.raises(ValueError, match=r"out: .* is not an empty folder"):
        make_scenes(tmp_path / "mine.txt", 2, size=SIZE)
    out = tmp_path / "out"
    make_scenes(out, 2, size=SIZE)
    with pytest.raises(ValueError, match=r"holds scenes made with .*'seed': 0.*, not .*'seed': 1"):
        make_scenes(out, 2, seed=1, size=SIZE)
    (out / "scenes.json").write_text("{")
    with pytest.raises(ValueError, match="holds scenes made with None"):
        make_scenes(out, 2, size=SIZE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"frames": 1}, ValueError, "frames must be at least 2, got 1"),
        ({"frames": 2.0}, TypeError, r"frames must be an integer, got 2\.0"),
        ({"frames": 2, "seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"frames": 2, "workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ({"frames": 2, "size": (414, 8)}, ValueError, "size: height must be at least 32, got 8"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        make_scenes(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_splits(scenes, tmp_path):
    lists = {name: read_split(scenes / "ImageSets" / f"{name}.txt") for name in ("train", "val", "trainval")}
    assert sorted(lists["train"] + lists["val"]) == lists["trainval"]
    chosen = {name: read_split(scenes / "ImageSets" / f"{name}.txt") for name in ("fit", "tune")}
    assert chosen["tune"] == [name for name in lists["train"] if int(name) % 8 == 0] != []
    assert sorted(chosen["fit"] + chosen["tune"]) == lists["train"]
    make_scenes(tmp_path / "two", 2, size=SIZE)
    assert read_split(tmp_path / "two" / "ImageSets" / "val.txt") == ["000001"]
    assert json.loads((tmp_path / "two" / "scenes.json").read_text())["seed"] == 0


def test_labels_agree_with_the_camera(scenes):
    ious = []
    for frame in find_frames(scenes):
        objects = frame.read_labels()
        objects = objects.select(objects.has_box_3d)
        corners = box_corners(objects.location, objects.dimensions, objects.rotation_y)
        boxes = project_boxes(frame.read_calibration(), corners, SIZE)
        ious += box_iou(torch.as_tensor(boxes), torch.as_tensor(objects.boxes)).diagonal().tolist()
        turned = alpha_from_rotation(objects.rotation_y, objects.location) - objects.alpha
        assert np.abs(np.cos(turned) - 1).max(initial=0) < 1e-3
        assert ((objects.truncation >= 0) & (objects.truncation <= 1)).all()
    assert len(ious) > 40
    assert np.mean(ious) > 0.85


def test_labels_hold_all_kinds(tmp_path):
    worlds = [make_world(Draws(0, i)) for i in range(20)]
    kinds = {body.type for world in worlds for body in world.bodies}
    assert kinds == {"Car", "Van", "Pedestrian", "Cyclist", ""}


def test_actors_do_not_touch_each_other():
    for i in range(15):
        actors = [body for body in make_world(Draws(1, i)).bodies if body.type]
        for a, body in enumerate(actors):
            for other in actors[a + 1 :]:
                gap = math.hypot(body.location[0] - other.location[0], body.location[2] - other.location[2])
                assert gap > (body.dimensions[1] + other.dimensions[1]) / 2


def box_body(x, z, size=(2.0, 2.0, 2.0)):
    part = block((-0.5, 0.5), (0.0, 1.0), (-0.5, 0.5), (200.0, 0.0, 0.0), plain)
    return Body("Car", (x, 1.0, z), size, 0.0, [part], 0)


CAMERA = Camera(200, 100, 100.0, (99.5, 49.5), (0.0, 0.0, 0.0))


def test_occlusion_and_cover_of_known_boxes():
    canvas = Canvas(CAMERA)
    near = draw_body(canvas, box_body(0, 6), 0, (0, 1, 0))
    far = draw_body(canvas, box_body(1, 11), 1, (0, 1, 0))
    # The near front face is 2 m at 5 m: 40 pixels; the far one 2 m at 10 m: 20 pixels, from 99.5 to 119.5.
    assert near.covered == 40 * 40
    assert near.box == (79.5, 29.5, 119.5, 69.5)
    assert far.covered >= 20 * 20
    assert np.count_nonzero(canvas.owner == 0) == near.covered
    assert np.count_nonzero(canvas.owner == 1) == 0
    assert (near.truncation, far.truncation) == (0, 0)
    # Seen through the whole front: distance 5 m everywhere.
    np.testing.assert_allclose(canvas.depth[canvas.owner == 0], 5, rtol=1e-6)


@pytest.mark.parametrize(("x", "expected"), [(0, 0.0), (5.0, 0.5), (6.5, 1.0), (20, 1.0)])
def test_truncation_of_known_boxes(x, expected):
    # A flat board at 5 m: the image ends 4.975 m to its right.
    drawn = draw_body(Canvas(CAMERA), box_body(x, 5.005, (2.0, 0.01, 2.0)), 0, (0, 1, 0))
    assert drawn.truncation == pytest.approx(expected, abs=0.02)


def test_bodies_behind_the_camera_are_not_drawn():
    canvas = Canvas(CAMERA)
    assert draw_body(canvas, box_body(0, -6), 0, (0, 1, 0)).box is None
    assert np.isinf(canvas.depth).all()


points = st.tuples(st.floats(-20, 60), st.floats(-20, 60))


@given(st.lists(points, min_size=3, max_size=3))
def test_fill_agrees_with_testing_every_pixel(triangle):
    (ax, ay), (bx, by), (cx, cy) = triangle
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    rows, columns = fill(triangle, 40, 30)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows)
    if abs(area) < 1e-3:
        return
    got = np.zeros((30, 40), dtype=bool)
    got[rows, columns] = True
    y, x = np.mgrid[:30, :40]
    least = np.full((30, 40), np.inf)
    for (px, py), (qx, qy) in (
        (triangle[0], triangle[1]),
        (triangle[1], triangle[2]),
        (triangle[2], triangle[0]),
    ):
        side = np.sign(area) * ((qx - px) * (y - py) - (qy - py) * (x - px))
        least = np.minimum(least, side / max(math.hypot(qx - px, qy - py), 1e-9))
    clear = abs(least) > 1e-6
    np.testing.assert_array_equal(got[clear], (least > 0)[clear])


def test_clipping_at_the_near_plane():
    square = [(0.0, 0.0, -1.0), (1.0, 0.0, -1.0), (1.0, 0.0, 3.0), (0.0, 0.0, 3.0)]
    clipped = clip_near(square)
    assert len(clipped) == 4
    assert min(z for _, _, z in clipped) == NEAR
    assert clip_near([(x, y, -z) for x, y, z in clipped]) == []


def test_draws_are_uniform_and_in_range():
    draws = Draws(0, 0)
    values = [draws.integer(-2, 2) for _ in range(2000)]
    assert set(values) == {-2, -1, 0, 1, 2}
    assert all(330 < values.count(value) < 470 for value in set(values))
    assert 100 < draws.bytes(5000).mean() < 155
    assert len(draws.bytes(13)) == 13
    lengths = [draws.about(1.5, 0.1) for _ in range(2000)]
    assert 1.2 <= min(lengths) <= max(lengths) <= 1.8
    assert 0.09 < np.std(lengths) < 0.11
    cells = hash_cells(np.arange(-50, 50)[:, None], np.arange(-50, 50), 1)
    assert 0 <= cells.min() < 0.01 < 0.99 < cells.max() < 1
    assert 0.48 < cells.mean() < 0.52


def test_frames_can_be_told_apart_and_are_not_flat(scenes):
    images = np.stack([frame.read_image() for frame in find_frames(scenes)]).astype(float)
    assert (images.std(axis=(1, 2, 3)) > 25).all()
    assert images.std(axis=0).mean() > 15
