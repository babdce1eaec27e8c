"""Random numbers that are the same on every machine and with every numpy version.

numpy guarantees the raw 64-bit stream of PCG64, but not what its distributions make of it; so everything
here is integer arithmetic on that stream, and lengths are drawn on a grid of centimetres.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

_MASK = 0xFFFFFFFF


class Draws:
    """A stream of random choices for one frame of one seed.

    Args:
        seed: Seed of the data set, >= 0.
        frame: Number of the frame; every frame has a stream of its own, whoever renders it.
    """

    def __init__(self, seed: int, frame: int) -> None:
        self._bits = np.random.PCG64([seed, frame])

    def integer(self, low: int, high: int) -> int:
        """An integer from low..high, both included."""
        return low + (int(self._bits.random_raw()) * (high - low + 1) >> 64)

    def grid(self, low: float, high: float, step: float = 0.01) -> float:
        """A multiple of ``step`` from low..high, uniformly."""
        return self.integer(round(low / step), round(high / step)) * step

    def about(self, mean: float, deviation: float) -> float:
        """A bell-shaped value on a grid of 1 cm, at most 3 deviations from ``mean`` (sum of three draws)."""
        half = round(deviation * 100)
        return round(mean * 100 + sum(self.integer(-half, half) for _ in range(3))) / 100

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 cases."""
        return self.integer(0, 99) < percent

    def choice(self, options: Sequence[T]) -> T:
        """One of ``options``."""
        return options[self.integer(0, len(options) - 1)]

    def bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """``count`` uniform bytes."""
        words = np.asarray(self._bits.random_raw(-(-count // 8)), dtype="<u8")
        return words.view(np.uint8)[:count]


def hash_cells(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.float32]:
    """A value in [0, 1) for every integer cell (a, b): texture noise that sticks to surfaces.

    Args:
        a: First coordinate of the cells.
        b: Second coordinate, broadcast against ``a``.
        seed: Another seed gives another texture.
    """
    first = (a & _MASK).astype(np.uint32) * np.uint32(0x9E3779B1)
    second = (b & _MASK).astype(np.uint32) * np.uint32(0x85EBCA77)
    mixed = first ^ (second + np.uint32(seed * 0xC2B2AE3D & _MASK))
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    mixed *= np.uint32(0x297A2D39)
    mixed ^= mixed >> np.uint32(15)
    return np.asarray((mixed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))
