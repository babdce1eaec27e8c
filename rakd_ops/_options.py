"""Options of the ops: one object inside, made from the public keywords and checked once.

Nothing here looks at a tensor. A set of options that was checked before is taken from a cache, except under
``torch.compile``, where the checks run while tracing and cost nothing afterwards.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from rakd_ops.levels import ASSIGNMENTS

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = ("mean", "sum", "none")
MAX_LEVELS = 16  # csrc/geometry.h, kMaxLevels
MAX_COUNT = 10_000  # bins and samples along one axis; kernels count in 32 bits


class LevelRule(NamedTuple):
    """Options of the level rule, in the order in which the ops take them; see ``levels.py``."""

    assignment: int  # index into ASSIGNMENTS
    sigma: float
    canonical_size: float
    canonical_level: float


class Keywords(TypedDict, total=False):
    """The public keywords; see :func:`rakd_ops.soft_roi_distill` for their meaning."""

    strides: Sequence[float]
    expert_strides: Sequence[float] | None
    output_size: int | tuple[int, int]
    sampling_ratio: int
    assignment: str
    sigma: float
    canonical_size: float
    canonical_level: float


DEFAULTS: Keywords = {
    "strides": (4, 8, 16, 32),
    "expert_strides": None,
    "output_size": 7,
    "sampling_ratio": 2,
    "assignment": "soft",
    "sigma": 1.0,
    "canonical_size": 224.0,
    "canonical_level": 4,
}


class RoIOptions(NamedTuple):
    """Checked options; a plain tuple, so that ``torch.compile`` can look through it."""

    strides: tuple[float, ...]
    expert_strides: tuple[float, ...]
    output_size: tuple[int, int]
    sampling_ratio: int
    rule: LevelRule
    expert_stated: bool = False  # expert_strides was given

    def for_distill(self) -> tuple[Any, ...]:
        """Return the arguments ``DISTILL_ARGUMENTS`` of the ops."""
        return (self.strides, self.expert_strides, self.output_size, self.sampling_ratio)

    def for_align(self) -> tuple[Any, ...]:
        """Return the arguments ``ALIGN_ARGUMENTS`` of the ops."""
        return (self.strides, self.output_size, self.sampling_ratio)


DISTILL_ARGUMENTS = "float[] strides, float[] expert_strides, int[] output_size, int sampling_ratio"
ALIGN_ARGUMENTS = "float[] strides, int[] output_size, int sampling_ratio"


_LARGEST = sys.float_info.max


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """Return ``value`` as a finite float, positive where asked."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and torch.compiler.is_compiling():
        # A number that changes from call to call is symbolic here: asking whether it is finite would fix its value,
        # comparing it does not. A comparison with infinity is no look at the value: symbolic numbers count as finite.
        if not -_LARGEST <= value <= _LARGEST or (positive and not value > 0):
            raise ValueError(f"{name}: expected a {'positive ' if positive else ''}finite number, got {value!r}")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name}: expected a {'positive ' if positive else ''}finite number, got {value!r}")
    return number


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Return ``value`` as an int from ``minimum`` to ``MAX_COUNT``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {number}")
    if number > MAX_COUNT:
        raise ValueError(f"{name}: expected an integer of at most {MAX_COUNT}, got {number}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_strides(name: str, strides: Any) -> tuple[float, ...]:
    """Return strides as floats; they must be positive and increase (fine to coarse)."""
    if isinstance(strides, (str, bytes)) or not isinstance(strides, Sequence):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(strides).__name__}")
    if not 1 <= len(strides) <= MAX_LEVELS:
        raise ValueError(f"{name}: expected 1 to {MAX_LEVELS} strides, got {len(strides)}")
    checked = tuple(check_number(f"{name}[{i}]", stride, positive=True) for i, stride in enumerate(strides))
    if any(fine >= coarse for fine, coarse in pairwise(checked)):
        raise ValueError(f"{name}: expected increasing strides (fine to coarse), got {checked}")
    return checked


def _check_options(
    strides: Any,
    expert_strides: Any,
    output_size: Any,
    sampling_ratio: Any,
    assignment: Any,
    sigma: Any,
    canonical_size: Any,
    canonical_level: Any,
) -> RoIOptions:
    if isinstance(output_size, Sequence) and not isinstance(output_size, (str, bytes)):
        if len(output_size) != 2:
            raise ValueError(f"output_size: expected one integer or two (height, width), got {output_size!r}")
        size = (
            check_integer("output_size[0]", output_size[0], 1),
            check_integer("output_size[1]", output_size[1], 1),
        )
    else:
        size = (check_integer("output_size", output_size, 1),) * 2
    steps = check_strides("strides", strides)
    expert_steps = steps if expert_strides is None else check_strides("expert_strides", expert_strides)
    if len(expert_steps) != len(steps):
        raise ValueError(f"expert_strides: expected {len(steps)} strides as in strides, got {len(expert_steps)}")
    rule = LevelRule(
        ASSIGNMENTS.index(check_choice("assignment", assignment, ASSIGNMENTS)),
        check_number("sigma", sigma, positive=True),
        check_number("canonical_size", canonical_size, positive=True),
        check_number("canonical_level", canonical_level),
    )
    samples = check_integer("sampling_ratio", sampling_ratio, 0)
    return RoIOptions(steps, expert_steps, size, samples, rule, expert_strides is not None)


# The types are part of the key: True equals 1, which is no reason to take it for a number of bins.
@functools.lru_cache(maxsize=256)
def _cached(values: tuple[Any, ...], types: tuple[Any, ...]) -> RoIOptions:
    return _check_options(*values)


def _types(value: Any) -> Any:
    return tuple(map(type, value)) if isinstance(value, tuple) else type(value)


def check_options(**options: Unpack[Keywords]) -> RoIOptions:
    """Check all options that do not depend on tensors; those that are not given have their defaults."""
    unknown = options.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"{min(unknown)}: expected one of {', '.join(DEFAULTS)}")
    values = tuple((DEFAULTS | options).values())
    if torch.compiler.is_compiling():
        return _check_options(*values)
    plain = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    try:
        check: Callable[..., RoIOptions] = _cached
        return check(plain, tuple(map(_types, plain)))
    except TypeError:  # no hash, or one of the errors below
        return _check_options(*values)
