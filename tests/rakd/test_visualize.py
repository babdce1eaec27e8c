import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from rakd.data.frames import find_frames
from rakd.visualize import (
    PREDICTION_COLOR,
    TRUTH_COLOR,
    Compared,
    Layer,
    compare_frames,
    draw_boxes_2d,
    draw_boxes_3d,
    draw_frame,
    draw_from_above,
    draw_sheet,
    prediction_layer,
    show_image,
    truth_layer,
)


@pytest.fixture
def frame(scenes):
    return find_frames(scenes)[0]


@pytest.fixture
def results(frame):
    objects = frame.read_labels()
    objects = objects.select(objects.has_box_3d)
    return dataclasses.replace(objects, scores=np.linspace(0.2, 0.9, len(objects)))


def pixels_of(path, color):
    with Image.open(path) as image:
        table = np.array(image.convert("RGB")).reshape(-1, 3).astype(int)
    return int((np.abs(table - np.round(np.array(to_rgb(color)) * 255)).max(axis=1) <= 2).sum())


def test_frame_picture_shows_both_layers(frame, results, tmp_path):
    layers = [truth_layer(frame.read_labels()), prediction_layer(results)]
    draw_frame(tmp_path / "a.png", frame.read_image(), frame.read_calibration(), layers, title="Frame")
    assert pixels_of(tmp_path / "a.png", TRUTH_COLOR) > 300
    assert pixels_of(tmp_path / "a.png", PREDICTION_COLOR) > 300
    draw_frame(tmp_path / "b.png", frame.read_image(), frame.read_calibration(), layers[:1])
    # Names of files may hold what matplotlib takes for formulas.
    odd = [dataclasses.replace(layer, name="a$^$b") for layer in layers]
    draw_frame(tmp_path / "c.png", frame.read_image(), frame.read_calibration(), odd, title="x$^$y")
    assert pixels_of(tmp_path / "b.png", PREDICTION_COLOR) == 0


def axis_for(frame):
    axis = Figure().add_subplot()
    show_image(axis, frame.read_image(), "")
    return axis


def test_boxes_2d_stand_at_their_place_with_scores(frame, results):
    axis = axis_for(frame)
    draw_boxes_2d(axis, frame.read_calibration(), [prediction_layer(results)], inches=6.4)
    drawn = np.array([[*patch.get_xy(), patch.get_width(), patch.get_height()] for patch in axis.patches])
    np.testing.assert_allclose(drawn[:, :2], results.boxes[:, :2])
    np.testing.assert_allclose(drawn[:, :2] + drawn[:, 2:], results.boxes[:, 2:])
    texts = {f"{name} {score:.2f}" for name, score in zip(results.types, results.scores, strict=True)}
    assert {text.get_text() for text in axis.texts} <= texts
    assert axis.texts


def test_boxes_3d_have_twelve_edges_and_a_cross_each(frame):
    labels = frame.read_labels()
    labels = labels.select(labels.has_box_3d & (labels.location[:, 2] > 6))
    axis = axis_for(frame)
    draw_boxes_3d(axis, frame.read_calibration(), [truth_layer(labels)], inches=6.4)
    assert [len(lines.get_segments()) for lines in axis.collections] == [12, 2] * len(labels)


def test_objects_behind_or_through_the_camera_do_not_break_the_picture(frame):
    objects = frame.read_labels()
    objects = objects.select(objects.has_box_3d).select(np.array([0, 1]))
    places = np.array([[0.0, 1.6, -20.0], [1.5, 1.6, 0.5]])
    axis = axis_for(frame)
    draw_boxes_3d(
        axis, frame.read_calibration(), [truth_layer(dataclasses.replace(objects, location=places))], inches=6.4
    )
    (edges, cross) = axis.collections
    assert 0 < len(edges.get_segments()) <= 12
    assert np.isfinite(np.concatenate(edges.get_segments())).all()
    assert len(cross.get_segments()) <= 2


def test_view_from_above_has_a_scale_and_the_boxes(frame, results):
    axis = Figure().add_subplot()
    draw_from_above(axis, frame.read_calibration(), 414, [prediction_layer(results)], 50.0, inches=6.4)
    texts = {text.get_text() for text in axis.texts}
    assert {"10 m", "20 m", "50 m"} <= texts
    polygons = [patch for patch in axis.patches if type(patch).__name__ == "Polygon"]
    centers = np.array([polygon.get_xy()[:4].mean(axis=0) for polygon in polygons])
    # Best scores first, whose texts then have their place.
    np.testing.assert_allclose(centers, results.location[::-1, [0, 2]], atol=1e-9)


def test_view_from_above_can_be_wider(frame, results):
    axis = Figure().add_subplot()
    draw_from_above(axis, frame.read_calibration(), 414, [prediction_layer(results)], 50.0, side=40.0, inches=6.4)
    assert axis.get_xlim() == (-40, 40)


def test_models_side_by_side(frame, results, tmp_path):
    image, calibration, labels = frame.read_image(), frame.read_calibration(), frame.read_labels()
    nothing = results.select(np.zeros(0, dtype=np.int64))

    def draw(name, *predictions):
        frames = [Compared("one", image, calibration, labels, entry) for entry in predictions]
        compare_frames(tmp_path / name, frames, title="models", reach=50)
        with Image.open(tmp_path / name) as picture:
            return picture.size

    one = draw("one.png", {"expert": results})
    two = draw("two.png", {"expert": nothing, "apprentice": results})
    four = draw("four.png", *[{"expert": nothing, "apprentice": nothing}] * 2)
    assert two == (2 * one[0], one[1])
    assert four[0] == two[0] and 1.7 * two[1] < four[1] < 2 * two[1]
    # Only the legend is in the colour of predictions where there are none.
    assert pixels_of(tmp_path / "two.png", PREDICTION_COLOR) > pixels_of(tmp_path / "four.png", PREDICTION_COLOR) + 300
    assert pixels_of(tmp_path / "four.png", TRUTH_COLOR) > 3 * pixels_of(tmp_path / "one.png", TRUTH_COLOR)


def test_models_side_by_side_need_the_same_models(frame, results, tmp_path):
    def compared(**predictions):
        return Compared("one", frame.read_image(), frame.read_calibration(), frame.read_labels(), predictions)

    for frames, message in (
        ([], "at least one frame"),
        ([compared()], "at least one"),
        ([compared(a=results), compared(b=results)], r"the models \['a'\].*got \['b'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_frames(tmp_path / "no.png", frames)
    assert not (tmp_path / "no.png").exists()


def test_texts_do_not_cover_each_other(frame):
    objects = frame.read_labels()
    objects = objects.select(np.zeros(5, dtype=np.int64))
    axis = axis_for(frame)
    draw_boxes_2d(axis, frame.read_calibration(), [Layer(objects, "#ffffff", "same")], inches=6.4)
    assert len(axis.texts) == 1


@pytest.mark.parametrize("inches", [3.0, 12.0])
def test_texts_do_not_cover_each_other_at_the_size_they_are_drawn(inches, frame, results):
    # A row of the same object, a little to the right each time.
    objects = results.select(np.zeros(40, dtype=np.int64))
    aside = np.linspace(0, 1, 40)[:, None]
    boxes = np.array([[10.0, 50, 20, 70]]) + aside * np.array([[380, 0, 380, 0]])
    places = np.array([[-12.0, 1.6, 20.0]]) + aside * np.array([[22.0, 0, 0]])
    objects = dataclasses.replace(objects, boxes=boxes, location=places)
    figure = Figure(figsize=(inches, 2 * inches), dpi=100)
    image, above = (figure.add_axes((0, half, 1, 0.5)) for half in (0.5, 0))
    show_image(image, frame.read_image(), "")
    draw_boxes_2d(image, frame.read_calibration(), [prediction_layer(objects)], inches=inches)
    draw_from_above(above, frame.read_calibration(), 414, [prediction_layer(objects)], 30.0, side=30.0, inches=inches)
    figure.draw_without_rendering()
    for axis in (image, above):
        drawn = [text.get_window_extent() for text in axis.texts if not text.get_text().endswith(" m")]
        assert len(drawn) > 2
        assert not any(a.overlaps(b) for a, b in itertools.combinations(drawn, 2))


def test_sheet(scenes, tmp_path):
    frames = [(f.id, f.read_image(), f.read_calibration(), f.read_labels()) for f in find_frames(scenes)[:3]]
    draw_sheet(tmp_path / "sheet.png", frames, title="three")
    assert pixels_of(tmp_path / "sheet.png", TRUTH_COLOR) > 300
    with pytest.raises(ValueError, match="at least one frame"):
        draw_sheet(tmp_path / "none.png", [])


@pytest.mark.parametrize("size", [(375, 1242), (60, 3000), (640, 480)])
def test_pictures_of_any_shape_have_a_reasonable_size(size, frame, results, tmp_path):
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    calibration, labels = frame.read_calibration(), frame.read_labels()
    draw_frame(tmp_path / "frame.png", image, calibration, [truth_layer(labels)], title="Frame")
    draw_sheet(tmp_path / "sheet.png", [("a", image, calibration, labels)] * 2, title="two")
    compare_frames(tmp_path / "models.png", [Compared("one", image, calibration, labels, {"a": results, "b": results})])
    for name in ("frame", "sheet", "models"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 200 and max(picture.size) < 3200, name
