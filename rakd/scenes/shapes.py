"""Bodies built of blocks: cars, vans, pedestrians, cyclists, houses, trees, poles.

A body fills its 3D box, as far as a walker in mid-step does. Blocks are given in shares of the box: x from
-0.5 (back) to 0.5 (front) along the length, y from 0 (ground) to 1 (top), z from -0.5 to 0.5 across.
"""

from dataclasses import dataclass

import numpy as np

from rakd.geometry import FloatArray
from rakd.scenes import paint
from rakd.scenes.draws import Draws
from rakd.scenes.paint import Color, Paint

Span = tuple[float, float]

TYRE: Color = (26.0, 26.0, 28.0)
SKIN: Color = (206.0, 158.0, 128.0)

CAR_COLORS: tuple[Color, ...] = (
    *((214.0, 216.0, 218.0), (188.0, 192.0, 196.0), (122.0, 128.0, 134.0), (66.0, 70.0, 78.0)),
    *((30.0, 32.0, 38.0), (150.0, 26.0, 30.0), (34.0, 62.0, 122.0), (92.0, 122.0, 154.0)),
    *((52.0, 82.0, 62.0), (188.0, 164.0, 112.0), (206.0, 120.0, 38.0)),
)
CLOTH_COLORS: tuple[Color, ...] = (
    *((184.0, 40.0, 44.0), (38.0, 70.0, 140.0), (56.0, 110.0, 76.0), (222.0, 214.0, 198.0)),
    *((44.0, 44.0, 50.0), (214.0, 168.0, 54.0), (122.0, 78.0, 130.0), (96.0, 142.0, 170.0)),
)
TROUSER_COLORS: tuple[Color, ...] = (
    (40.0, 48.0, 74.0),
    (52.0, 50.0, 50.0),
    (112.0, 100.0, 82.0),
    (70.0, 86.0, 112.0),
)
WALL_COLORS: tuple[Color, ...] = (
    *((190.0, 176.0, 150.0), (172.0, 130.0, 104.0), (196.0, 192.0, 184.0), (150.0, 150.0, 148.0)),
    *((206.0, 184.0, 128.0), (160.0, 104.0, 86.0)),
)


@dataclass(frozen=True, eq=False)
class Part:
    """One block of a body: a hexahedron with flat faces.

    Attributes:
        corners: ``[8, 3]`` in shares of the box, in the order of `rakd.geometry.box_corners`.
        color: Its colour.
        paint: How it is painted.
        shadow: Whether it throws a shadow (small parts inside the shadow of others need not).
    """

    corners: FloatArray
    color: Color
    paint: Paint
    shadow: bool


def block(
    x: Span,
    y: Span,
    z: Span,
    color: Color,
    paint: Paint = paint.plain,
    *,
    top_x: Span | None = None,
    top_z: Span | None = None,
    shadow: bool = False,
) -> Part:
    """A block over the given spans; ``top_x`` and ``top_z`` make its top face narrower than its bottom."""
    top_x, top_z = top_x or x, top_z or z
    corners = [
        *((x[1], y[0], z[1]), (x[1], y[0], z[0]), (x[0], y[0], z[0]), (x[0], y[0], z[1])),
        *((top_x[1], y[1], top_z[1]), (top_x[1], y[1], top_z[0])),
        *((top_x[0], y[1], top_z[0]), (top_x[0], y[1], top_z[1])),
    ]
    return Part(np.array(corners), color, paint, shadow)


def car(draws: Draws) -> list[Part]:
    """A car: underbody, body, bonnet, cabin and wheels; hatchback, saloon or estate."""
    color = draws.choice(CAR_COLORS)
    roof_back, window_back = draws.choice(((-0.47, -0.5), (-0.28, -0.42), (-0.36, -0.46)))
    waist = draws.grid(0.54, 0.6)
    return [
        block((-0.46, 0.46), (0.1, 0.24), (-0.42, 0.42), TYRE, shadow=True),
        block((-0.5, 0.5), (0.2, waist - 0.07), (-0.48, 0.48), color, paint.car_body, shadow=True),
        block(
            *((-0.5, 0.5), (waist - 0.07, waist), (-0.48, 0.48), color),
            top_x=(-0.49, 0.42),
            top_z=(-0.45, 0.45),
        ),
        block(
            *((window_back, 0.24), (waist, 1.0), (-0.45, 0.45), color, paint.car_cabin),
            top_x=(roof_back, 0.07),
            top_z=(-0.36, 0.36),
            shadow=True,
        ),
        *_wheels(0.31, 0.085, 0.42),
    ]


def van(draws: Draws) -> list[Part]:
    """A van: one tall box on wheels with a short sloping nose."""
    color = draws.choice(CAR_COLORS[:4] + CAR_COLORS[6:8])
    return [
        block((-0.48, 0.48), (0.08, 0.2), (-0.42, 0.42), TYRE),
        block(
            *((-0.5, 0.5), (0.15, 1.0), (-0.48, 0.48), color, paint.box_van),
            top_x=(-0.5, 0.4),
            top_z=(-0.45, 0.45),
            shadow=True,
        ),
        *_wheels(0.32, 0.07, 0.33),
    ]


def _wheels(place: float, radius: float, height: float) -> list[Part]:
    """Four wheels; ``radius`` is a share of the length and ``height`` one of the height."""
    return [
        block((x - radius, x + radius), (0.0, height), z, TYRE, paint.car_wheel)
        for x in (place, -place)
        for z in ((-0.5, -0.38), (0.38, 0.5))
    ]


def pedestrian(draws: Draws) -> list[Part]:
    """A walker: two legs in step, torso, arms and head."""
    trousers, shirt = draws.choice(TROUSER_COLORS), draws.choice(CLOTH_COLORS)
    stride = draws.grid(0.05, 0.3)
    parts = []
    for side, swing in ((-1, stride), (1, -stride)):
        hip, foot = (-0.12, 0.12), (swing - 0.14, swing + 0.2)
        leg = (0.04, 0.22) if side > 0 else (-0.22, -0.04)
        arm = (0.36, 0.5) if side > 0 else (-0.5, -0.36)
        parts += [
            block((foot[0], min(foot[1], 0.5)), (0.0, 0.05), leg, TYRE),
            block((foot[0], foot[1] - 0.1), (0.04, 0.48), leg, trousers, top_x=hip, shadow=True),
            block((-swing - 0.09, -swing + 0.09), (0.42, 0.8), arm, shirt, top_x=(-0.1, 0.1)),
        ]
    return [
        *parts,
        block((-0.16, 0.16), (0.46, 0.83), (-0.36, 0.36), shirt, shadow=True),
        block((-0.14, 0.15), (0.85, 1.0), (-0.17, 0.17), SKIN, paint.head, shadow=True),
        block((-0.07, 0.07), (0.82, 0.86), (-0.09, 0.09), SKIN),
    ]


def cyclist(draws: Draws) -> list[Part]:
    """A rider on a bicycle."""
    trousers, shirt = draws.choice(TROUSER_COLORS), draws.choice(CLOTH_COLORS)
    frame = draws.choice(CAR_COLORS)
    pedal = draws.grid(-0.04, 0.08)
    return [
        block((-0.5, -0.11), (0.0, 0.39), (-0.04, 0.04), TYRE, paint.bike_wheel, shadow=True),
        block((0.11, 0.5), (0.0, 0.39), (-0.04, 0.04), TYRE, paint.bike_wheel, shadow=True),
        block((-0.05, 0.26), (0.2, 0.25), (-0.05, 0.05), frame, top_x=(-0.1, 0.3)),
        block((-0.16, 0.26), (0.4, 0.45), (-0.05, 0.05), frame),
        block((0.24, 0.32), (0.2, 0.58), (-0.05, 0.05), frame, top_x=(0.2, 0.26)),
        block((0.18, 0.28), (0.56, 0.61), (-0.5, 0.5), TYRE),
        block((-0.02 + pedal, 0.1 + pedal), (0.1, 0.52), (-0.28, -0.1), trousers, top_x=(-0.2, -0.02)),
        block((-0.02 - pedal, 0.1 - pedal), (0.16, 0.52), (0.1, 0.28), trousers, top_x=(-0.2, -0.02)),
        block((-0.22, 0.02), (0.5, 0.84), (-0.38, 0.38), shirt, top_x=(-0.06, 0.12), shadow=True),
        block((0.06, 0.26), (0.6, 0.68), (-0.48, -0.34), shirt, top_x=(0.0, 0.12)),
        block((0.06, 0.26), (0.6, 0.68), (0.34, 0.48), shirt, top_x=(0.0, 0.12)),
        block((0.0, 0.15), (0.85, 1.0), (-0.2, 0.2), SKIN, paint.head, shadow=True),
    ]


def building(draws: Draws) -> list[Part]:
    """A house with windows and a flat roof."""
    return [block((-0.5, 0.5), (0.0, 1.0), (-0.5, 0.5), draws.choice(WALL_COLORS), paint.house, shadow=True)]


def tree(draws: Draws) -> list[Part]:
    """A trunk and a crown of crossed, ragged blocks."""
    green = (draws.grid(54, 84, 1), draws.grid(88, 120, 1), draws.grid(40, 58, 1))
    return [
        block((-0.05, 0.05), (0.0, 0.5), (-0.05, 0.05), (84.0, 66.0, 50.0), shadow=True),
        block((-0.5, 0.5), (0.28, 0.86), (-0.3, 0.3), green, paint.leaves, shadow=True),
        block((-0.3, 0.3), (0.32, 0.92), (-0.5, 0.5), green, paint.leaves),
        block((-0.32, 0.32), (0.4, 1.0), (-0.32, 0.32), green, paint.leaves),
    ]


def pole(draws: Draws) -> list[Part]:
    """A street lamp with an arm."""
    grey = draws.grid(70, 130, 1)
    color = (grey, grey, grey)
    return [
        block((-0.04, 0.04), (0.0, 1.0), (-0.3, 0.3), color, shadow=True),
        block((-0.04, 0.5), (0.96, 1.0), (-0.5, 0.5), color),
    ]
