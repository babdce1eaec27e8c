"""A small z-buffer rasteriser in numpy.

Only sums, products, quotients, square roots and comparisons reach the pixels. IEEE arithmetic fixes their
results to the last bit, unlike those of library functions, matrix products and long sums.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rakd.scenes.paint import LEFT, RIGHT, TOP, Floats, Surface
from rakd.scenes.shapes import Part
from rakd.scenes.world import Body, cos_sin

Vector = tuple[float, float, float]
Point = tuple[float, float]
Indices = npt.NDArray[np.int64]

NEAR = 0.4

# Corners of the faces FRONT, BACK, LEFT, RIGHT, TOP, BOTTOM as seen from outside: bottom left, bottom right,
# top right, top left.
_FACES = ((0, 1, 5, 4), (2, 3, 7, 6), (3, 0, 4, 7), (1, 2, 6, 5), (4, 5, 6, 7), (3, 2, 1, 0))
_AMBIENT = 0.55
_TRUNCATION_GRID = 192
_LEVEL = 1e-9  # rise in pixels up to which an edge counts as level


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at the origin.

    Attributes:
        width: Pixels.
        height: Pixels.
        focal: Focal length in pixels, the same for both axes.
        center: Principal point (u, v) in pixels.
        shift: Added to a place in the labels' frame to get it in the camera's own, metres.
    """

    width: int
    height: int
    focal: float
    center: Point
    shift: Vector

    def pixel(self, point: Vector) -> Point:
        """Project a point of the camera's own frame."""
        return (
            self.focal * point[0] / point[2] + self.center[0],
            self.focal * point[1] / point[2] + self.center[1],
        )


@dataclass(eq=False)
class Canvas:
    """What has been drawn so far, one flat entry a pixel.

    Attributes:
        camera: Says where things appear.
        depth: Distance along the view, metres; infinite where nothing is drawn.
        color: ``[pixels, 3]`` 0..255 before haze.
        owner: Number of the body that is seen, -1 for none.
        stamp: Number of the last body that covers the pixel, seen or hidden.
    """

    camera: Camera
    depth: Floats = field(init=False)
    color: Floats = field(init=False)
    owner: npt.NDArray[np.int32] = field(init=False)
    stamp: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        pixels = self.camera.width * self.camera.height
        self.depth = np.full(pixels, np.inf, dtype=np.float32)
        self.color = np.zeros((pixels, 3), dtype=np.float32)
        self.owner = np.full(pixels, -1, dtype=np.int32)
        self.stamp = np.full(pixels, -1, dtype=np.int32)


@dataclass(frozen=True)
class Drawn:
    """What drawing a body found out.

    Attributes:
        box: (x1, y1, x2, y2) of the whole body in pixels, not clipped; None when it lies behind the camera.
        covered: Number of pixels it covers in the image, hidden ones included.
        truncation: Share of its outline outside the image.
    """

    box: tuple[float, float, float, float] | None
    covered: int
    truncation: float


def corners_of(body: Body, part: Part, shift: Vector) -> list[Vector]:
    """The corners of a part in the camera's own frame."""
    cos, sin = cos_sin(body.rotation_y)
    height, width, length = body.dimensions
    x0, y0, z0 = (body.location[i] + shift[i] for i in range(3))
    points = []
    for share_x, share_y, share_z in part.corners.tolist():
        along, across = share_x * length, share_z * width
        points.append((x0 + along * cos + across * sin, y0 - share_y * height, z0 - along * sin + across * cos))
    return points


def draw_body(canvas: Canvas, body: Body, number: int, sun: Vector) -> Drawn:
    """Draw a body where it is nearer than what is there already.

    Args:
        canvas: Drawn on.
        body: What to draw.
        number: Its number on the canvas.
        sun: Direction of the light.
    """
    camera = canvas.camera
    polygons: list[list[Point]] = []
    for part in body.parts:
        corners = corners_of(body, part, camera.shift)
        for face, ring in enumerate(_FACES):
            quad = [corners[i] for i in ring]
            normal = _cross(_sub(quad[1], quad[0]), _sub(quad[3], quad[0]))
            # Faces turned away are hidden by the rest of the block.
            if _dot(normal, quad[0]) <= 0:
                continue
            clipped = clip_near(quad)
            if not clipped:
                continue
            polygon = [camera.pixel(point) for point in clipped]
            polygons.append(polygon)
            _draw_face(canvas, polygon, quad, normal, part, face, body.seed, number, sun)
    if not polygons:
        return Drawn(None, 0, 1.0)
    us = [u for polygon in polygons for u, _ in polygon]
    vs = [v for polygon in polygons for _, v in polygon]
    box = (min(us), min(vs), max(us), max(vs))
    return Drawn(box, _covered(canvas, box, number), _truncation(camera, polygons, box))


def fill(polygon: list[Point], width: int, height: int) -> tuple[Indices, Indices]:
    """Rows and columns of the pixel centres inside a convex polygon.

    Each row is a span between the edges that bound it on the left and on the right, so the work goes with
    the pixels that are inside, not with the box around them.
    """
    nothing = np.zeros(0, dtype=np.int64)
    top = max(0, _ceil(min(v for _, v in polygon)))
    bottom = min(height - 1, _floor(max(v for _, v in polygon)))
    if top > bottom:
        return nothing, nothing
    rows = np.arange(top, bottom + 1)
    low = np.zeros(len(rows))
    high = np.full(len(rows), width - 1.0)
    area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True))
    sign = 1.0 if area > 0 else -1.0
    for (u0, v0), (u1, v1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        # Inside is where slope * u + rest >= 0.
        slope = -sign * (v1 - v0)
        rest = sign * ((u1 - u0) * (rows - v0) + (v1 - v0) * u0)
        if slope > _LEVEL:
            low = np.maximum(low, -rest / slope)
        elif slope < -_LEVEL:
            high = np.minimum(high, -rest / slope)
        else:
            high = np.where(rest >= 0, high, -1.0)
    first = np.ceil(np.minimum(low, width)).astype(np.int64)
    counts = np.maximum(np.floor(np.maximum(high, -1.0)).astype(np.int64) - first + 1, 0)
    total = int(counts.sum())
    starts = np.cumsum(counts) - counts
    columns = np.arange(total) + np.repeat(first - starts, counts)
    return np.repeat(rows, counts), columns


def clip_near(points: list[Vector]) -> list[Vector]:
    """The part of a polygon in front of the near plane; empty when nothing of it is."""
    clipped: list[Vector] = []
    for start, end in zip(points, points[1:] + points[:1], strict=True):
        if start[2] >= NEAR:
            clipped.append(start)
        if (start[2] >= NEAR) != (end[2] >= NEAR):
            share = (NEAR - start[2]) / (end[2] - start[2])
            x, y = (start[i] + share * (end[i] - start[i]) for i in range(2))
            clipped.append((x, y, NEAR))
    return clipped


def _draw_face(
    canvas: Canvas,
    polygon: list[Point],
    quad: list[Vector],
    normal: Vector,
    part: Part,
    face: int,
    seed: int,
    number: int,
    sun: Vector,
) -> None:
    camera = canvas.camera
    rows, columns = fill(polygon, camera.width, camera.height)
    if not len(rows):
        return
    # The ray through a pixel is (x, y, 1); it meets the face's plane at the distance depth.
    x = ((columns - camera.center[0]) / camera.focal).astype(np.float32)
    y = ((rows - camera.center[1]) / camera.focal).astype(np.float32)
    facing = normal[0] * x + normal[1] * y + normal[2]
    depth = np.float32(_dot(normal, quad[0])) / np.maximum(facing, np.float32(1e-12))
    pixels = rows * camera.width + columns
    # Where holes may be cut, what is hidden has to be painted too: the outline needs it.
    see = depth < canvas.depth[pixels]
    place = [x * depth - quad[0][0], y * depth - quad[0][1], depth - quad[0][2]]
    surface = _surface(quad, place, part, face, seed)
    colors, keep = part.paint(surface)
    if keep is not None:
        pixels, see, depth, colors = pixels[keep], see[keep], depth[keep], colors[keep]
    canvas.stamp[pixels] = number
    pixels = pixels[see]
    canvas.depth[pixels] = depth[see]
    canvas.color[pixels] = colors[see] * np.float32(_light(normal, sun, face))
    canvas.owner[pixels] = number


def _surface(quad: list[Vector], place: list[Floats], part: Part, face: int, seed: int) -> Surface:
    """Places on a face in its own coordinates; the face may be a trapezium with level bottom and top."""
    bottom, left = _sub(quad[1], quad[0]), _sub(quad[3], quad[0])
    top = _sub(quad[2], quad[3])
    bottom_squared = _dot(bottom, bottom)
    lean = _dot(left, bottom) / bottom_squared
    narrowing = _dot(top, bottom) / bottom_squared - 1.0
    up = (left[0] - lean * bottom[0], left[1] - lean * bottom[1], left[2] - lean * bottom[2])
    up_squared = _dot(up, up)
    v = (place[0] * up[0] + place[1] * up[1] + place[2] * up[2]) / np.float32(up_squared)
    u = (place[0] * bottom[0] + place[1] * bottom[1] + place[2] * bottom[2]) / np.float32(bottom_squared)
    u = (u - lean * v) / np.maximum(1.0 + narrowing * v, np.float32(1e-6))
    # numpy's square root: IEEE-exact, like the operators.
    width, height = float(np.sqrt(bottom_squared)), float(np.sqrt(up_squared))
    return Surface(face, u, v, width, height, part.color, seed)


def _light(normal: Vector, sun: Vector, face: int) -> float:
    """Brightness of a face: all faces get some sky light, those towards the sun more."""
    scale = float(np.sqrt(_dot(normal, normal) * _dot(sun, sun)))
    # The stored normal points away from the camera's side, as the light does on lit faces.
    toward = max(0.0, _dot(normal, sun) / scale)
    bounce = 0.08 if face == TOP else 0.02 if face in (LEFT, RIGHT) else 0.0
    return _AMBIENT + bounce + 0.6 * toward


def _covered(canvas: Canvas, box: tuple[float, float, float, float], number: int) -> int:
    """Number of pixels that the body with this number covers."""
    camera = canvas.camera
    left, right = max(0, _floor(box[0])), min(camera.width, _ceil(box[2]) + 1)
    top, bottom = max(0, _floor(box[1])), min(camera.height, _ceil(box[3]) + 1)
    if left >= right or top >= bottom:
        return 0
    image = canvas.stamp.reshape(camera.height, camera.width)
    return int(np.count_nonzero(image[top:bottom, left:right] == number))


def _truncation(camera: Camera, polygons: list[list[Point]], box: tuple[float, float, float, float]) -> float:
    """Share of the outline outside the image, counted on a grid laid over the whole body."""
    if box[0] >= 0 and box[1] >= 0 and box[2] <= camera.width - 1 and box[3] <= camera.height - 1:
        return 0.0
    step = max(box[2] - box[0], box[3] - box[1]) / (_TRUNCATION_GRID - 1)
    grid = np.zeros((_TRUNCATION_GRID, _TRUNCATION_GRID), dtype=np.bool_)
    for polygon in polygons:
        scaled = [((u - box[0]) / step, (v - box[1]) / step) for u, v in polygon]
        grid[fill(scaled, _TRUNCATION_GRID, _TRUNCATION_GRID)] = True
    u = box[0] + step * np.arange(_TRUNCATION_GRID)
    v = box[1] + step * np.arange(_TRUNCATION_GRID)
    inside = ((v >= 0) & (v <= camera.height - 1))[:, None] & ((u >= 0) & (u <= camera.width - 1))
    total = int(np.count_nonzero(grid))
    return 1.0 - int(np.count_nonzero(grid & inside)) / total if total else 1.0


def _sub(a: Vector, b: Vector) -> Vector:
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Vector, b: Vector) -> Vector:
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def _floor(value: float) -> int:
    return int(value // 1)


def _ceil(value: float) -> int:
    return -_floor(-value)
