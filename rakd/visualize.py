"""Pictures of frames: 3D boxes, 2D boxes and a bird's-eye view, labels beside predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Arc, Polygon, Rectangle
from matplotlib.patheffects import withStroke

from rakd.data.labels import Objects
from rakd.errors import UserError
from rakd.files import atomic_write, check_folder
from rakd.geometry import BOX_EDGES, NEAR, Calibration, FloatArray, box_corners

TRUTH_COLOR = "#19e08f"
PREDICTION_COLOR = "#ff8a1f"
_REGION_COLOR = "#b8bec6"
_DARK = "#14181d"
_LIGHT = "#e8ebee"
_GRID = "#3d4650"

_FRONT_CROSS = ((0, 5), (1, 4))
_DPI = 110
_TALLEST = 0.8  # height of a panel in its column's widths: portraits are drawn narrower, not larger
_TEXT_SIZE = 8.0  # points, of what stands beside boxes
_LETTER_WIDTH, _TEXT_HEIGHT = 0.6 * _TEXT_SIZE, 1.05 * _TEXT_SIZE  # of a letter, roughly


@dataclass(frozen=True, eq=False)
class Layer:
    """Objects to draw in one colour.

    Attributes:
        objects: To be drawn.
        color: Any matplotlib colour.
        name: In the legend.
        dashed: Draw dashed, so that lines under it stay visible.
    """

    objects: Objects
    color: str
    name: str
    dashed: bool = False


def truth_layer(objects: Objects) -> Layer:
    """Labels, in the colour of labels."""
    return Layer(objects, TRUTH_COLOR, "label")


def prediction_layer(objects: Objects) -> Layer:
    """Predictions, in the colour of predictions."""
    return Layer(objects, PREDICTION_COLOR, "prediction", dashed=True)


def check_picture(path: Path, name: str) -> None:
    """Make sure that a picture can be written to a file, before the work of drawing it.

    Args:
        path: The file.
        name: The option's, for errors.

    Raises:
        ValueError: The suffix is not that of a picture.
        NotADirectoryError: Its folder is a file.
    """
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known or path.is_dir():
        raise UserError(f"{name}: expected a picture file (.png, .pdf, .svg, ...), got {path}")
    check_folder(path.parent, name)


def draw_frame(
    path: Path,
    image: npt.NDArray[np.uint8],
    calibration: Calibration,
    layers: Sequence[Layer],
    *,
    title: str = "",
    reach: float = 70.0,
) -> None:
    """Draw one frame: the image with 3D boxes over the image with 2D boxes, beside the bird's-eye view.

    Args:
        path: Picture file to write, atomically; the suffix says which kind.
        image: ``[height, width, 3]`` uint8 RGB.
        calibration: Its camera.
        layers: To be drawn, later ones on top.
        title: Text above the picture.
        reach: Range of the bird's-eye view, metres.
    """
    height, width = image.shape[:2]
    panel_height = 11.0 * min(height / width, _TALLEST)
    panel_width = panel_height * width / height
    total_height = max(2 * panel_height + 1.0, 5.0)
    above_width = total_height * 0.8
    left_width = max(panel_width, 1.5)  # a title's
    figure = Figure(figsize=(left_width + above_width, total_height), facecolor=_DARK, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(left_width, above_width))
    for row, (draw, name) in enumerate(((draw_boxes_3d, "3D boxes"), (draw_boxes_2d, "2D boxes"))):
        axis = figure.add_subplot(grid[row, 0])
        show_image(axis, image, name)
        draw(axis, calibration, layers, inches=panel_width)
    axis = figure.add_subplot(grid[:, 1])
    draw_from_above(axis, calibration, width, layers, reach, inches=above_width)
    figure.suptitle(title, parse_math=False, color=_LIGHT, fontsize=13, x=0.01, ha="left")
    _add_legend(figure, layers, regions=any(layer.objects.is_type("DontCare").any() for layer in layers))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor=_DARK)


def draw_sheet(
    path: Path,
    frames: Sequence[tuple[str, npt.NDArray[np.uint8], Calibration, Objects]],
    *,
    columns: int = 2,
    title: str = "",
) -> None:
    """Draw a sheet of labelled frames: 3D boxes with their types and distances.

    Args:
        path: Picture file to write, atomically.
        frames: Name, image ``[height, width, 3]``, calibration and labels of each frame; at least one.
        columns: Frames in a row.
        title: Text above the picture.

    Raises:
        ValueError: There are no frames.
    """
    if not frames:
        raise ValueError("frames must hold at least one frame, got none")
    columns, inches = min(columns, len(frames)), 9.0
    rows = -(-len(frames) // columns)
    tallest = min(max(image.shape[0] / image.shape[1] for _, image, _, _ in frames), _TALLEST)
    size = (inches * columns, (inches * tallest + 0.3) * rows + 0.5)
    figure = Figure(figsize=size, facecolor=_DARK, layout="constrained")
    figure.suptitle(title, parse_math=False, color=_LIGHT, fontsize=15)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(frames) :]:
        axis.set_axis_off()
    for axis, (name, image, calibration, objects) in zip(axes, frames, strict=False):
        show_image(axis, image, name)
        drawn = min(inches, inches * tallest * image.shape[1] / image.shape[0])
        draw_boxes_3d(axis, calibration, [truth_layer(objects)], inches=drawn)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor=_DARK)


@dataclass(frozen=True, eq=False)
class Compared:
    """A frame, and what several models see in it.

    Attributes:
        name: Shown above the frame.
        image: ``[height, width, 3]`` uint8 RGB.
        calibration: Its camera.
        labels: Shown beside every model's predictions, from above.
        predictions: By model, in the order of the columns.
    """

    name: str
    image: npt.NDArray[np.uint8]
    calibration: Calibration
    labels: Objects
    predictions: Mapping[str, Objects]


def compare_frames(path: Path, frames: Sequence[Compared], *, title: str = "", reach: float = 45.0) -> None:
    """Draw the predictions of several models for the same frames, a column a model.

    The image shows predictions alone, so that nothing covers them; the bird's-eye view below shows labels as well.

    Args:
        path: Picture file to write, atomically; the suffix says which kind.
        frames: At least one; all with predictions of the same models in the same order. Predictions are drawn as
            they are: leave out what scores too little before.
        title: Text above the picture.
        reach: Range of the bird's-eye view, metres.

    Raises:
        ValueError: There are no frames or no models, or frames have different models.
    """
    if not frames:
        raise ValueError("frames must hold at least one frame, got none")
    models = list(frames[0].predictions)
    for frame in frames:
        if not models or list(frame.predictions) != models:
            raise ValueError(f"frames must all have the models {models} (at least one), got {list(frame.predictions)}")
    # From above, a panel as wide as the image shows all that a camera of 80 degrees sees.
    side, column = 0.85 * reach, 6.0
    ratios = [frame.image.shape[0] / frame.image.shape[1] for frame in frames]
    heights = [size for ratio in ratios for size in (min(ratio, _TALLEST), (reach + 5) / (2 * side))]
    size = (column * len(models), column * sum(heights) + 0.29 * len(heights) + 0.6)
    figure = Figure(figsize=size, facecolor=_DARK, layout="constrained")
    axes = figure.subplots(len(heights), len(models), squeeze=False, height_ratios=heights)
    for pair, (frame, ratio) in enumerate(zip(frames, ratios, strict=True)):
        for place, (model, objects) in enumerate(frame.predictions.items()):
            layers = [truth_layer(frame.labels), prediction_layer(objects)]
            axis, above = axes[2 * pair : 2 * pair + 2, place]
            show_image(axis, frame.image, f"{model} · {frame.name}")
            inches = column * min(1, _TALLEST / ratio)
            draw_boxes_3d(axis, frame.calibration, [replace(layers[1], dashed=False)], inches=inches)
            width = frame.image.shape[1]
            draw_from_above(above, frame.calibration, width, layers, reach, side=side, inches=column)
    figure.suptitle(title, parse_math=False, color=_LIGHT, fontsize=14, x=0.01, ha="left")
    _add_legend(figure, layers)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor=_DARK)


def show_image(axis: Axes, image: npt.NDArray[np.uint8], title: str) -> None:
    """Show an image on an axis without ticks."""
    axis.imshow(image, interpolation="antialiased")
    axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_title(title, parse_math=False, color=_LIGHT, fontsize=11, loc="left", pad=4)
    axis.spines[:].set_visible(False)


def draw_boxes_3d(axis: Axes, calibration: Calibration, layers: Sequence[Layer], *, inches: float) -> None:
    """Draw the edges of 3D boxes, with a cross on the front face, type and distance.

    Args:
        axis: One that shows the image.
        calibration: Of its camera.
        layers: To be drawn, later ones on top.
        inches: Width of the drawn axis: texts that would then cover each other are left out.
    """
    texts = _Texts(axis, inches)
    for layer in layers:
        objects = layer.objects.select(layer.objects.has_box_3d)
        objects = objects.select(np.argsort(objects.location[:, 2], kind="stable"))
        corners = box_corners(objects.location, objects.dimensions, objects.rotation_y)
        for i, box in enumerate(corners):
            edges = _visible_segments(calibration, box, BOX_EDGES)
            if not len(edges):
                continue
            _add_lines(axis, edges, layer, 1.6)
            cross = _visible_segments(calibration, box, np.array(_FRONT_CROSS))
            _add_lines(axis, cross, layer, 0.8)
            texts.add(edges.reshape(-1, 2), f"{objects.types[i]} {objects.location[i, 2]:.0f} m", layer)


def draw_boxes_2d(axis: Axes, calibration: Calibration, layers: Sequence[Layer], *, inches: float) -> None:
    """Draw 2D boxes with type, and score if there is one; DontCare regions dotted, without a name.

    Args:
        axis: As in `draw_boxes_3d`, and so are the others.
        calibration: See there.
        layers: See there.
        inches: See there.
    """
    texts = _Texts(axis, inches)
    for layer in layers:
        objects = layer.objects
        regions = objects.is_type("DontCare")
        for i, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
            style = ":" if regions[i] else "--" if layer.dashed else "-"
            color = _REGION_COLOR if regions[i] else layer.color
            axis.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, lw=1.1 if regions[i] else 1.6, ls=style)
            )
            if not regions[i]:
                text = (
                    str(objects.types[i]) if objects.scores is None else f"{objects.types[i]} {objects.scores[i]:.2f}"
                )
                texts.add(np.array([(x1, y1), (x2, y2)]), text, layer)


def draw_from_above(
    axis: Axes,
    calibration: Calibration,
    width: int,
    layers: Sequence[Layer],
    reach: float,
    *,
    side: float | None = None,
    inches: float,
) -> None:
    """Draw boxes in bird's-eye view, the camera at the bottom, with arcs of equal distance as a scale.

    Args:
        axis: To draw on.
        calibration: The camera, whose field of view is marked.
        width: Of its image, pixels.
        layers: To be drawn, later ones on top.
        reach: Range ahead, metres.
        side: Range to either side, metres; by default 0.45 times ``reach``.
        inches: Width of the drawn axis: scores that would then cover each other are left out, lower ones first.
    """
    side = 0.45 * reach if side is None else side
    axis.set_facecolor("#1d232a")
    axis.set(xlim=(-side, side), ylim=(-3, reach + 2), xticks=[], yticks=[], aspect="equal")
    axis.set_title("bird's-eye view", color=_LIGHT, fontsize=11, loc="left", pad=4)
    axis.spines[:].set_visible(False)
    edge = calibration.back_project([[0.0, 0.0], [width - 1.0, 0.0]], [2 * reach, 2 * reach])
    for x, _, z in edge.tolist():
        axis.plot([0, x], [0, z], color=_GRID, lw=1, ls="--")
    for distance in range(10, int(reach) + 1, 10):
        axis.add_patch(Arc((0, 0), 2 * distance, 2 * distance, theta1=0, theta2=180, ec=_GRID, lw=0.8))
        axis.text(0.4, distance + 0.4, f"{distance} m", color="#9aa5b1", fontsize=8, ha="left")
    axis.plot([0], [0], marker="^", color=_LIGHT, markersize=9)
    texts = _Texts(axis, inches)
    for layer in layers:
        objects = layer.objects.select(layer.objects.has_box_3d)
        if objects.scores is not None:
            objects = objects.select(np.argsort(-objects.scores, kind="stable"))
        corners = box_corners(objects.location, objects.dimensions, objects.rotation_y)[:, :4][:, :, [0, 2]]
        for i, ring in enumerate(corners):
            style = "--" if layer.dashed else "-"
            axis.add_patch(Polygon(ring, closed=True, fc=to_rgba(layer.color, 0.15), ec=layer.color, lw=1.6, ls=style))
            center, front = ring.mean(axis=0), ring[:2].mean(axis=0)
            axis.plot(*zip(center, front, strict=True), color=layer.color, lw=1.6)
            if objects.scores is not None and abs(center[0]) < side and center[1] < reach:
                texts.add_beside(float(ring[:, 0].max()) + 0.4, float(center[1]), f"{objects.scores[i]:.2f}", layer)


def _visible_segments(calibration: Calibration, corners: FloatArray, edges: npt.NDArray[np.integer]) -> FloatArray:
    """The parts of a box's edges in front of the camera, as ``[m, 2, 2]`` pixels."""
    near = NEAR - calibration.projection[2, 3] + 1e-6
    lines = corners[edges]
    front = lines[:, :, 2] >= near
    lines, front = lines[front.any(axis=1)], front[front.any(axis=1)]
    rise = lines[:, 1, 2] - lines[:, 0, 2]
    share = (near - lines[:, 0, 2]) / np.where(rise == 0, 1.0, rise)
    cut = lines[:, 0] + share[:, None] * (lines[:, 1] - lines[:, 0])
    lines = np.where(front[:, :, None], lines, cut[:, None, :])
    pixels, _ = calibration.project(lines)
    return pixels


def _add_legend(figure: Figure, layers: Sequence[Layer], *, regions: bool = False) -> None:
    """Name the layers in the upper right corner, with ``regions`` the DontCare regions of 2D boxes too."""
    handles = [
        Line2D([], [], color=layer.color, lw=2.5, ls="--" if layer.dashed else "-", label=layer.name)
        for layer in layers
    ]
    if regions:
        handles.append(Line2D([], [], color=_REGION_COLOR, lw=1.2, ls=":", label="DontCare region"))
    labels = [str(handle.get_label()).replace("$", r"\$") for handle in handles]
    style = {"frameon": False, "labelcolor": _LIGHT, "fontsize": 11}
    figure.legend(handles, labels, loc="upper right", ncols=len(handles), **style)


def _add_lines(axis: Axes, segments: FloatArray, layer: Layer, width: float) -> None:
    style = (0, (4, 2)) if layer.dashed else "solid"
    axis.add_collection(
        LineCollection(list(segments), colors=layer.color, linewidths=width, linestyles=style), autolim=False
    )


class _Texts:
    """Texts beside boxes; one that would cover another is left out."""

    def __init__(self, axis: Axes, inches: float) -> None:
        self._axis = axis
        self._taken: list[tuple[float, float, float]] = []
        left, right = axis.get_xlim()
        point = (right - left) / (72 * inches)  # in units of the axis, which are the same in x and y
        self._letter, self._height = _LETTER_WIDTH * point, _TEXT_HEIGHT * point

    def add(self, points: FloatArray, text: str, layer: Layer) -> None:
        """Put a text over the points (under them for a dashed layer), inside the image."""
        right, bottom = self._axis.get_xlim()[1], self._axis.get_ylim()[0]
        low, high = points.min(axis=0), points.max(axis=0)
        if high[0] < 0 or low[0] > right or high[1] < 0 or low[1] > bottom:
            return
        half = self._letter * len(text) / 2
        x = float(np.clip((max(low[0], 0) + min(high[0], right)) / 2, half, max(half, right - half)))
        y = float(high[1] + self._height if layer.dashed else low[1] - self._height / 4)
        y = float(np.clip(y, self._height, max(self._height, bottom - self._height / 3)))
        self._write(x, y, text, layer, va="bottom")

    def add_beside(self, x: float, y: float, text: str, layer: Layer) -> None:
        """Put a text to the right of a point."""
        self._write(x + self._letter * len(text) / 2, y, text, layer, va="center")

    def _write(self, x: float, y: float, text: str, layer: Layer, *, va: Literal["bottom", "center"]) -> None:
        half = self._letter * len(text) / 2
        if any(abs(x - a) < half + b and abs(y - c) < self._height for a, c, b in self._taken):
            return
        self._taken.append((x, y, half))
        self._axis.text(
            *(x, y, text),
            color=layer.color,
            fontsize=_TEXT_SIZE,
            ha="center",
            va=va,
            clip_on=True,
            path_effects=[withStroke(linewidth=2, foreground=_DARK)],
        )
