"""What surfaces look like: each paint turns places on a face into colours, and may cut holes.

A face is painted in its own coordinates: u runs from 0 to 1 along its bottom edge, v from 0 (bottom) to 1.
Colours are float32 in 0..255. Only sums, products and comparisons are used, whose results are the same on
every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rakd.scenes.draws import hash_cells

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Color = tuple[float, float, float]

FRONT, BACK, LEFT, RIGHT, TOP, BOTTOM = range(6)

_GLASS: Color = (38.0, 48.0, 58.0)
_DARK: Color = (24.0, 24.0, 26.0)


@dataclass(frozen=True, eq=False)
class Surface:
    """Places on one face that are to be painted.

    Attributes:
        face: Which face of the part: `FRONT`, `BACK`, ...
        u: ``[n]`` place along the face.
        v: ``[n]`` place up the face.
        width: Length of the bottom edge, metres.
        height: Height of the face, metres.
        color: The part's own colour.
        seed: Makes textures of different objects differ.
    """

    face: int
    u: Floats
    v: Floats
    width: float
    height: float
    color: Color
    seed: int

    def filled(self) -> Floats:
        """The part's own colour everywhere, ``[n, 3]``."""
        return np.tile(np.array(self.color, dtype=np.float32), (len(self.u), 1))

    def grain(self, cell: float) -> Floats:
        """Noise in [-0.5, 0.5) ``[n]``, constant on cells of ``cell`` metres."""
        columns = np.floor(self.u * np.float32(self.width / cell)).astype(np.int64)
        rows = np.floor(self.v * np.float32(self.height / cell)).astype(np.int64)
        return np.asarray(hash_cells(columns, rows, self.seed * 8 + self.face) - np.float32(0.5))


Paint = Callable[[Surface], tuple[Floats, Mask | None]]


def plain(surface: Surface) -> tuple[Floats, Mask | None]:
    """One colour with a little grain."""
    grain = 1.0 + 0.12 * surface.grain(0.05)
    return surface.filled() * grain[:, None], None


def car_body(surface: Surface) -> tuple[Floats, Mask | None]:
    """Sheet metal with doors and sills; lamps, grille and number plate at the ends."""
    u, v = surface.u, surface.v
    colors = surface.filled()
    if surface.face in (LEFT, RIGHT):
        door = np.minimum(np.minimum(abs(u - 0.34), abs(u - 0.55)), abs(u - 0.76)) < 0.006
        colors[door & (v > 0.2)] *= 0.55
        colors[v < 0.16] *= 0.35
        colors[(v > 0.62) & (v < 0.68)] *= 1.12
    elif surface.face in (FRONT, BACK):
        side = abs(u - 0.5)
        lamp = (side > 0.33) & (side < 0.47) & (v > 0.52) & (v < 0.84)
        if surface.face == FRONT:
            colors[(side < 0.27) & (v > 0.42) & (v < 0.8)] = (30.0, 31.0, 34.0)
            colors[lamp] = (236.0, 238.0, 226.0)
        else:
            colors[(side < 0.33) & (v > 0.56) & (v < 0.62)] *= 0.6
            colors[lamp] = (176.0, 22.0, 20.0)
        colors[(side < 0.15) & (v > 0.2) & (v < 0.37)] = (226.0, 226.0, 216.0)
        colors[v < 0.14] *= 0.35
    return colors, None


def car_cabin(surface: Surface) -> tuple[Floats, Mask | None]:
    """Roof and pillars round dark, slightly reflecting windows."""
    u, v = surface.u, surface.v
    colors = surface.filled()
    if surface.face in (TOP, BOTTOM):
        return colors, None
    if surface.face in (LEFT, RIGHT):
        glass = (u > 0.07) & (u < 0.93) & (abs(u - 0.5) > 0.025)
    else:
        glass = (u > 0.06) & (u < 0.94)
    glass &= (v > 0.08) & (v < 0.84)
    shine = np.float32(1.0) + np.float32(1.1) * v
    streak = np.where(abs(u - v * 0.4 - 0.35) < 0.07, np.float32(1.35), np.float32(1.0))
    pane = np.array(_GLASS, dtype=np.float32) * (shine * streak)[:, None]
    return np.where(glass[:, None], pane, colors), None


def box_van(surface: Surface) -> tuple[Floats, Mask | None]:
    """A closed cargo body: panels at the sides, two doors with lamps at the back, a windscreen in front."""
    u, v = surface.u, surface.v
    colors = surface.filled()
    if surface.face == FRONT:
        colors[(abs(u - 0.5) < 0.43) & (v > 0.5) & (v < 0.86)] = _GLASS
        colors[(abs(u - 0.5) > 0.3) & (abs(u - 0.5) < 0.45) & (v > 0.2) & (v < 0.32)] = (236.0, 238.0, 226.0)
    elif surface.face == BACK:
        colors[abs(u - 0.5) < 0.012] *= 0.4
        colors[(abs(u - 0.5) > 0.4) & (v > 0.1) & (v < 0.34)] = (170.0, 24.0, 22.0)
        colors[(abs(u - 0.5) < 0.36) & (v > 0.58) & (v < 0.86) & (abs(u - 0.5) > 0.05)] = _GLASS
    elif surface.face in (LEFT, RIGHT):
        front = u if surface.face == LEFT else 1 - u
        colors[(front > 0.78) & (front < 0.95) & (v > 0.52) & (v < 0.84)] = _GLASS
        colors[(abs(front - 0.74) < 0.006) | (abs(front - 0.4) < 0.005)] *= 0.6
    return colors, None


def car_wheel(surface: Surface) -> tuple[Floats, Mask | None]:
    """A round tyre with a bright rim on the sides, plain rubber round about."""
    colors = surface.filled()
    if surface.face not in (LEFT, RIGHT):
        return colors, None
    x, y = surface.u - 0.5, surface.v - 0.5
    radius = x * x + y * y
    spokes = (abs(x) < 0.05) | (abs(y) < 0.05)
    colors[(radius < 0.09) & ~spokes] = (150.0, 152.0, 156.0)
    return colors, radius < 0.25


def bike_wheel(surface: Surface) -> tuple[Floats, Mask | None]:
    """A thin ring with a few spokes; one looks through between them."""
    colors = surface.filled()
    if surface.face not in (LEFT, RIGHT):
        return colors, None
    x, y = surface.u - 0.5, surface.v - 0.5
    radius = x * x + y * y
    ring = (radius < 0.25) & (radius > 0.165)
    spokes = (radius < 0.25) & ((abs(x) < 0.02) | (abs(y) < 0.02) | (abs(x - y) < 0.03) | (abs(x + y) < 0.03))
    colors[spokes & ~ring] = (120.0, 120.0, 122.0)
    return colors, ring | spokes


def head(surface: Surface) -> tuple[Floats, Mask | None]:
    """Skin in front, hair above and behind."""
    colors = surface.filled()
    hair = np.full(len(surface.u), surface.face in (BACK, TOP))
    hair |= surface.v > 0.72
    colors[hair] = (52.0, 38.0, 28.0)
    return colors, None


def house(surface: Surface) -> tuple[Floats, Mask | None]:
    """Plaster with a grid of windows every three metres, some lit, and a darker base."""
    across = surface.u * np.float32(surface.width / 3.0)
    up = surface.v * np.float32(surface.height / 3.0)
    column, row = np.floor(across), np.floor(up)
    within_x, within_y = across - column, up - row
    colors = surface.filled() * (1.0 + 0.14 * surface.grain(0.25))[:, None]
    frame = (abs(within_x - 0.5) < 0.27) & (abs(within_y - 0.52) < 0.31)
    pane = (abs(within_x - 0.5) < 0.23) & (abs(within_y - 0.52) < 0.27) & (abs(within_x - 0.5) > 0.02)
    kind = hash_cells(column.astype(np.int64), row.astype(np.int64), surface.seed)
    colors[frame] = (214.0, 210.0, 200.0)
    glass = np.array((60.0, 72.0, 86.0), dtype=np.float32) * (0.6 + 0.9 * kind)[:, None]
    colors = np.where(pane[:, None], glass, colors)
    colors[surface.v * np.float32(surface.height) < 0.6] *= 0.6
    return colors, None


def leaves(surface: Surface) -> tuple[Floats, Mask | None]:
    """Foliage: mottled green with a ragged edge."""
    grain = surface.grain(0.22)
    coarse = surface.grain(0.7)
    colors = surface.filled() * (1.0 + 0.5 * grain + 0.45 * coarse)[:, None]
    x, y = abs(surface.u - 0.5), abs(surface.v - 0.5)
    edge = x * x + y * y
    return colors, edge < 0.2 + 0.12 * grain + 0.08 * coarse
