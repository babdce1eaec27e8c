"""From a world to a picture: bodies, ground, shadows, sky, haze, lens and sensor."""

import numpy as np
import numpy.typing as npt

from rakd.scenes.draws import Draws, hash_cells
from rakd.scenes.paint import Floats
from rakd.scenes.raster import Camera, Canvas, Drawn, Vector, clip_near, corners_of, draw_body, fill
from rakd.scenes.world import Street, World, cos_sin

_SHADOW = 0.5
_NOISE = 0.045


def render(world: World, camera: Camera, draws: Draws) -> tuple[npt.NDArray[np.uint8], list[Drawn], list[int]]:
    """Render a world.

    Args:
        world: What to show.
        camera: From where.
        draws: Stream for clouds and sensor noise.

    Returns:
        The image ``[height, width, 3]`` uint8 RGB, and for every body what drawing it found out and the
        number of its pixels that are seen.
    """
    street = world.street
    canvas = Canvas(camera)
    drawn = [draw_body(canvas, body, number, street.sun) for number, body in enumerate(world.bodies)]
    seen = np.bincount(canvas.owner[canvas.owner >= 0], minlength=len(world.bodies)).tolist()
    _draw_ground(canvas, world)
    backdrop = _backdrop(camera, street, draws)
    empty = np.isinf(canvas.depth)
    # depth / (depth + haze) without the infinities of the sky.
    distance = np.where(empty, np.float32(0), canvas.depth)
    mix = distance / (distance + np.float32(street.haze))
    horizon = np.array(street.sky[1], dtype=np.float32)
    color = canvas.color + (horizon - canvas.color) * mix[:, None]
    color = np.where(empty[:, None], backdrop, color)
    image = color.reshape(camera.height, camera.width, 3)
    return _sensor(image, street, draws), drawn, seen


def _draw_ground(canvas: Canvas, world: World) -> None:
    """Paint road, pavements and grass on what is still empty below the horizon."""
    camera, street = canvas.camera, world.street
    rays = (np.arange(camera.height) - camera.center[1]) / camera.focal
    # The ground in the camera's own frame: y = level + slope * z.
    level = street.height + camera.shift[1] - street.slope * camera.shift[2]
    below = rays - street.slope
    first = int(np.searchsorted(below, 1e-3))
    if first >= camera.height:
        return
    z_of_row = level / below[first:]
    pixels = np.flatnonzero(np.isinf(canvas.depth[first * camera.width :])) + first * camera.width
    rows, columns = np.divmod(pixels, camera.width)
    z = z_of_row[rows - first].astype(np.float32)
    x = ((columns - camera.center[0]) / camera.focal).astype(np.float32) * z
    canvas.color[pixels] = _ground_colors(x, z, street)
    canvas.depth[pixels] = z
    lit = np.ones(camera.width * camera.height, dtype=np.bool_)
    for body in world.bodies:
        for part in body.parts:
            if part.shadow:
                polygon = _shadow_polygon(corners_of(body, part, camera.shift), street, level)
                if len(polygon) > 2:
                    outline = [camera.pixel(point) for point in polygon]
                    shadow_rows, shadow_columns = fill(outline, camera.width, camera.height)
                    lit[shadow_rows * camera.width + shadow_columns] = False
    shaded = pixels[~lit[pixels]]
    canvas.color[shaded] *= np.float32(_SHADOW)


def _shadow_polygon(corners: list[Vector], street: Street, level: float) -> list[Vector]:
    """Outline of a block's shadow on the ground, in front of the camera."""
    sun = street.sun
    fall = sun[1] - street.slope * sun[2]
    points = []
    for x, y, z in corners:
        time = (level + street.slope * z - y) / fall
        points.append((x + time * sun[0], z + time * sun[2]))
    ring = _hull(points)
    return clip_near([(x, level + street.slope * z, z) for x, z in ring])


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Convex hull of points in the plane (Andrew's monotone chain)."""
    ordered = sorted(set(points))
    halves = []
    for sequence in (ordered, ordered[::-1]):
        half: list[tuple[float, float]] = []
        for point in sequence:
            while len(half) > 1 and _turns_right(half[-2], half[-1], point):
                half.pop()
            half.append(point)
        halves.append(half[:-1])
    return halves[0] + halves[1]


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


def _ground_colors(x: Floats, z: Floats, street: Street) -> Floats:
    """Colours ``[n, 3]`` of the ground at (x, z)."""
    cos, sin = (np.float32(value) for value in cos_sin(street.heading))
    across = x * cos - z * sin - np.float32(street.offset)
    along = x * sin + z * cos
    # Texture fades with distance: finer than a pixel it would only flicker.
    fade = np.minimum(np.float32(1), 14.0 / z)
    fine = _cells(across, along, 0.06, street.seed) * np.minimum(np.float32(1), 6.0 / z)
    coarse = _cells(across, along, 0.5, street.seed + 1) * fade
    patches = _cells(across, along, 4.0, street.seed + 2)
    tone = 1.0 + 0.22 * fine + 0.12 * coarse + 0.07 * patches
    distance = abs(across)
    half = street.half_width + 1.9
    color = np.empty((len(x), 3), dtype=np.float32)
    color[:] = (96.0, 97.0, 101.0)
    walk = distance > half
    color[walk] = (150.0, 147.0, 142.0)
    slabs = (np.mod(along, 1.2) < 0.05) & (z < 30)
    color[walk & slabs] = (122.0, 120.0, 116.0)
    grass = distance > half + street.walk_width
    color[grass] = (92.0, 108.0, 58.0)
    tone = np.where(grass, 1.0 + 2.2 * (tone - 1.0), tone)
    color[(distance > half - 0.18) & ~walk] = (176.0, 174.0, 168.0)
    marked = abs(distance - street.half_width) < 0.07
    for line in range(1, street.lanes):
        place = line * street.lane_width - street.half_width
        marked |= (abs(across - np.float32(place)) < 0.07) & (np.mod(along + street.offset * 7, 9.0) < 3.5)
    worn = coarse > -0.42
    color[marked & worn] = (214.0, 214.0, 206.0)
    return np.asarray(color * tone[:, None])


def _cells(a: Floats, b: Floats, size: float, seed: int) -> Floats:
    """Noise in [-0.5, 0.5) that is constant on squares of ``size`` metres."""
    columns = np.floor(a / np.float32(size)).astype(np.int64)
    rows = np.floor(b / np.float32(size)).astype(np.int64)
    return np.asarray(hash_cells(columns, rows, seed) - np.float32(0.5))


def _backdrop(camera: Camera, street: Street, draws: Draws) -> Floats:
    """Sky with clouds, and woods along the horizon, ``[pixels, 3]``."""
    width, height = camera.width, camera.height
    horizon = camera.center[1] + street.slope * camera.focal
    rise = np.clip((horizon - np.arange(height)) / (camera.focal * 0.28), 0, 1).astype(np.float32)
    zenith, low = (np.array(color, dtype=np.float32) for color in street.sky)
    sky = np.repeat((low + (zenith - low) * rise[:, None])[:, None, :], width, axis=1)
    clouds = 0.6 * _smooth_noise(draws, (5, 9), (height, width)) + 0.4 * _smooth_noise(draws, (14, 30), (height, width))
    cover = np.clip((clouds - np.float32(0.5)) * 4, 0, 1) * (0.35 + 0.5 * rise[:, None])
    sky += (np.float32(240) - sky) * cover[:, :, None]
    unit = camera.focal / 721.5
    outline = _smooth_noise(draws, (1, 12), (1, width))[0] * 26 + _smooth_noise(draws, (1, 90), (1, width))[0] * 9
    top = horizon - unit * (outline + 2)
    woods = np.arange(height)[:, None] > top
    shade = 0.85 + 0.3 * _smooth_noise(draws, (40, 130), (height, width))
    far = np.array((104.0, 120.0, 112.0), dtype=np.float32)
    sky = np.where(woods[:, :, None], far * shade[:, :, None], sky)
    return np.asarray(sky.reshape(-1, 3), dtype=np.float32)


def _smooth_noise(draws: Draws, cells: tuple[int, int], size: tuple[int, int]) -> Floats:
    """Random values in 0..1 on a grid of ``cells``, blended linearly to ``size``."""
    rows, columns = cells[0] + 1, cells[1] + 1
    grid = draws.bytes(rows * columns).reshape(rows, columns).astype(np.float32) / np.float32(255)
    for axis, (count, length) in enumerate(zip(cells, size, strict=True)):
        place = (np.arange(length) * (count / length)).astype(np.float32)
        index = np.floor(place).astype(np.int64)
        share = (place - index).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        low, high = np.take(grid, index, axis=axis), np.take(grid, index + 1, axis=axis)
        grid = low + (high - low) * share
    return np.asarray(grid)


def _sensor(image: Floats, street: Street, draws: Draws) -> npt.NDArray[np.uint8]:
    """Slight blur of the lens, exposure, and noise that grows with the signal."""
    for axis in (0, 1):
        before = np.roll(image, 1, axis=axis)
        after = np.roll(image, -1, axis=axis)
        edge = [slice(None)] * 3
        edge[axis] = slice(0, 1)
        before[tuple(edge)] = image[tuple(edge)]
        edge[axis] = slice(-1, None)
        after[tuple(edge)] = image[tuple(edge)]
        image = 0.6 * image + 0.2 * (before + after)
    image = image * np.float32(street.brightness)
    noise = draws.bytes(2 * image.size).reshape(2, *image.shape).astype(np.float32)
    image = image + (noise[0] + noise[1] - 255) * (np.float32(_NOISE) * (0.35 + image / 390))
    return np.asarray(np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8))
