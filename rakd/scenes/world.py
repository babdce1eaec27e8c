"""Where things stand: draws the street, the light and the objects of one frame."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rakd.geometry import FloatArray
from rakd.scenes import shapes
from rakd.scenes.draws import Draws
from rakd.scenes.shapes import Part

Builder = Callable[[Draws], list[Part]]

# Mean and standard deviation of height, width and length in metres, close to those of KITTI's labels.
_SIZES = {
    "Car": ((1.53, 0.13), (1.63, 0.09), (3.88, 0.4)),
    "Van": ((2.2, 0.25), (1.9, 0.12), (5.0, 0.5)),
    "Pedestrian": ((1.76, 0.11), (0.66, 0.1), (0.84, 0.17)),
    "Cyclist": ((1.74, 0.09), (0.6, 0.08), (1.76, 0.15)),
}
_BUILDERS: dict[str, Builder] = {
    "Car": shapes.car,
    "Van": shapes.van,
    "Pedestrian": shapes.pedestrian,
    "Cyclist": shapes.cyclist,
}
_ATTEMPTS = 12


@dataclass(frozen=True, eq=False)
class Body:
    """Something that stands in the scene.

    Attributes:
        type: KITTI type; "" for scenery, which is not labelled.
        location: Bottom centre (x, y, z) in metres, on a grid of 1 cm, so that labels hold it exactly.
        dimensions: Height, width, length in metres, on the same grid.
        rotation_y: In steps of 0.01 rad.
        parts: Its blocks.
        seed: Makes its textures its own.
    """

    type: str
    location: tuple[float, float, float]
    dimensions: tuple[float, float, float]
    rotation_y: float
    parts: list[Part]
    seed: int


@dataclass(frozen=True)
class Street:
    """The ground and the light.

    Attributes:
        height: Height of the camera over the ground, metres: the ground's y at z = 0.
        slope: Fall of the ground away from the camera, metres a metre.
        heading: Angle of the road to the view, radians, in steps of 0.01.
        offset: Lateral place of the road's middle, metres.
        lanes: Number of lanes.
        lane_width: Metres.
        walk_width: Width of the pavement on either side, metres.
        sun: Direction that light travels in (x, y, z), y > 0.
        haze: Distance in metres at which haze hides half of the contrast.
        brightness: Exposure of the whole picture.
        sky: Colours of the sky at the zenith and the horizon.
        seed: Seed of the ground's textures.
    """

    height: float
    slope: float
    heading: float
    offset: float
    lanes: int
    lane_width: float
    walk_width: float
    sun: tuple[float, float, float]
    haze: float
    brightness: float
    sky: tuple[tuple[float, float, float], tuple[float, float, float]]
    seed: int

    @property
    def half_width(self) -> float:
        """Half the width of the carriageway, metres."""
        return self.lanes * self.lane_width / 2

    def ground(self, z: float) -> float:
        """The ground's y at distance ``z``."""
        return self.height + self.slope * z

    def place(self, along: float, across: float) -> tuple[float, float]:
        """(x, z) of a point ``along`` the road and ``across`` it, on the grid of 1 cm."""
        cos, sin = cos_sin(self.heading)
        across += self.offset
        x, z = along * sin + across * cos, along * cos - across * sin
        return round(100 * x) / 100, round(100 * z) / 100


@dataclass
class World:
    """A street with everything on it, nearest body first."""

    street: Street
    bodies: list[Body] = field(default_factory=list)


def cos_sin(angle: float) -> tuple[float, float]:
    """Cosine and sine of an angle, to 12 digits: C libraries differ in the last bits, which could move a pixel."""
    return round(math.cos(angle), 12), round(math.sin(angle), 12)


def make_world(draws: Draws) -> World:
    """Draw a scene."""
    street = _make_street(draws)
    world = World(street)
    # An empty place for the car that carries the camera.
    taken = [_rectangle((0.0, 0.5), (2.4, 6.0), -math.pi / 2)]
    for kind, count in (
        ("Car", draws.integer(3, 9)),
        ("Van", draws.integer(0, 3) // 2),
        ("Pedestrian", max(0, draws.integer(-1, 5))),
        ("Cyclist", max(0, draws.integer(-1, 3))),
    ):
        for _ in range(count):
            _add_actor(draws, world, kind, taken)
    _add_scenery(draws, world, taken)
    world.bodies.sort(key=lambda body: body.location[2])
    return world


def _make_street(draws: Draws) -> Street:
    overcast = draws.chance(35)
    if overcast:
        grey = draws.grid(176, 214, 1)
        sky = ((grey - 26, grey - 20, grey - 10), (grey + 14, grey + 15, grey + 16))
    else:
        sky = ((draws.grid(70, 110, 1), draws.grid(126, 160, 1), 208.0), (206.0, 218.0, 228.0))
    return Street(
        height=draws.grid(1.55, 1.75),
        slope=draws.grid(-0.012, 0.012, 0.001),
        heading=draws.grid(-0.14, 0.14),
        offset=draws.grid(-2.5, 2.5),
        lanes=draws.integer(2, 4),
        lane_width=draws.grid(3.2, 3.7),
        walk_width=draws.grid(2.0, 4.0),
        sun=(draws.grid(-0.9, 0.9), draws.grid(0.7, 1.3), draws.grid(-0.9, 0.9)),
        haze=draws.grid(120, 420, 10),
        brightness=draws.grid(0.78, 1.12),
        sky=sky,
        seed=draws.integer(0, 1 << 20),
    )


def _add_actor(draws: Draws, world: World, kind: str, taken: list[FloatArray]) -> None:
    """Put one labelled object where it does not touch another; gives up when the street is full."""
    height, width, length = (draws.about(mean, deviation) for mean, deviation in _SIZES[kind])
    for _ in range(_ATTEMPTS):
        x, z, rotation = _pose(draws, world.street, kind)
        footprint = _rectangle((x, z), (width + 0.3, length + 0.5), rotation)
        if z > 1.0 and not any(_touch(footprint, other) for other in taken):
            taken.append(footprint)
            y = round(100 * world.street.ground(z)) / 100
            parts = _BUILDERS[kind](draws)
            seed = draws.integer(0, 1 << 20)
            world.bodies.append(Body(kind, (x, y, z), (height, width, length), rotation, parts, seed))
            return


def _pose(draws: Draws, street: Street, kind: str) -> tuple[float, float, float]:
    """Place (x, z) and rotation_y for an object: in a lane, parked, on the pavement or crossing."""
    # Half of the objects are near: uniform in distance alone would leave most of them tiny.
    along = draws.grid(4, 32) if draws.chance(50) else draws.grid(10, 90)
    side = draws.choice((-1, 1))
    # The road runs along z; rotation_y = -π/2 looks away from the camera.
    away = -math.pi / 2 + street.heading
    if kind in ("Car", "Van"):
        if draws.chance(40):
            across = side * (street.half_width + draws.grid(0.9, 1.4))
        else:
            lane = draws.integer(0, street.lanes - 1)
            across = (lane + 0.5) * street.lane_width - street.half_width + draws.grid(-0.3, 0.3)
        angle = away if across > 0 else away + math.pi
        angle += draws.grid(-1.6, 1.6) if draws.chance(15) else draws.grid(-0.06, 0.06)
    elif kind == "Cyclist":
        across = side * (street.half_width - draws.grid(0.4, 1.2))
        angle = (away if across > 0 else away + math.pi) + draws.grid(-0.2, 0.2)
    elif draws.chance(75):
        across = side * (street.half_width + draws.grid(2.6, 2.8 + street.walk_width))
        angle = away + draws.choice((0.0, math.pi)) + draws.grid(-0.5, 0.5)
    else:
        across = draws.grid(-1, 1) * street.half_width
        angle = away + draws.choice((-math.pi / 2, math.pi / 2)) + draws.grid(-0.3, 0.3)
    x, z = street.place(along, across)
    steps = round(angle * 100)
    steps -= 628 * round(steps / 628)
    return x, z, steps / 100


def _add_scenery(draws: Draws, world: World, taken: list[FloatArray]) -> None:
    """Line both sides of the street with houses, trees and lamps."""
    street = world.street
    edge = street.half_width + 2.6 + street.walk_width
    for side in (-1, 1):
        along = draws.grid(-4, 10)
        setback = draws.grid(2, 9)
        while along < 130:
            length, depth = draws.grid(8, 22), draws.grid(7, 12)
            if draws.chance(72):
                across = side * (edge + setback + depth / 2)
                size = (3.0 * draws.integer(1, 5) + 0.6, depth, length)
                body = _scenery(draws, street, (along + length / 2, across), size, shapes.building)
                world.bodies.append(body)
            along += length + (draws.grid(2, 12) if draws.chance(50) else 0.0)
        along = draws.grid(2, 14)
        while along < 110:
            high = draws.grid(4, 8)
            across = side * (edge + draws.grid(0.2, 1.8))
            if draws.chance(60):
                size, builder = (high, high * 0.6, high * 0.6), shapes.tree
            else:
                size, builder = (high, 0.3, 1.6), shapes.pole
            body = _scenery(draws, street, (along, across), size, builder)
            footprint = _rectangle((body.location[0], body.location[2]), (0.5, 0.5), 0.0)
            if not any(_touch(footprint, other) for other in taken):
                world.bodies.append(body)
            along += draws.grid(5, 22)


def _scenery(
    draws: Draws,
    street: Street,
    place: tuple[float, float],
    size: tuple[float, float, float],
    builder: Builder,
) -> Body:
    x, z = street.place(*place)
    # Lamps reach over the road; houses and trees look the same from both ends.
    steps = round(100 * (street.heading - (math.pi / 2 if builder is shapes.building else 0.0)))
    if place[1] > 0:
        steps += 314
    location = (x, street.ground(z) - 0.02, z)
    parts = builder(draws)
    return Body("", location, size, steps / 100, parts, draws.integer(0, 1 << 20))


def _rectangle(place: tuple[float, float], size: tuple[float, float], rotation: float) -> FloatArray:
    """Corners ``[4, 2]`` (x, z) of a footprint of (width, length) ``size``."""
    cos, sin = cos_sin(rotation)
    half = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) * (size[1] / 2, size[0] / 2)
    x = place[0] + half[:, 0] * cos + half[:, 1] * sin
    z = place[1] - half[:, 0] * sin + half[:, 1] * cos
    return np.stack([x, z], axis=1)


def _touch(a: FloatArray, b: FloatArray) -> bool:
    """Whether two rectangles overlap: they do unless the direction of some side parts them."""
    for ring in (a, b):
        for axis in (ring[1] - ring[0], ring[2] - ring[1]):
            on_a = a[:, 0] * axis[0] + a[:, 1] * axis[1]
            on_b = b[:, 0] * axis[0] + b[:, 1] * axis[1]
            if on_a.max() < on_b.min() or on_b.max() < on_a.min():
                return False
    return True
