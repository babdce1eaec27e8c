"""Makes distillation methods by their names, with adapters where channels differ.

Names and classes are listed in `rakd.distill.registry`, the place to add one. All methods have one interface,
``forward(expert, apprentice, boxes) -> scalar``: two dicts of maps ``[B, C, H, W]``, fine to coarse, and boxes. The
loss carries no weight of its own. No gradient flows to the expert's maps.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rakd.distill.base import DistillationMethod, Setup
from rakd.distill.maps import check_channels
from rakd.distill.registry import METHODS, find_method

_COMMON_OPTIONS = ("canonical_size", "canonical_level", "backend")
"""Settings that belong to a detector or a machine: given for all methods, taken by those that know them."""


def make_method(
    name: str,
    *,
    strides: Sequence[float],
    expert_channels: int | Sequence[int],
    apprentice_channels: int | Sequence[int],
    batch_size: int | None = None,
    seed: int = 0,
    expert_strides: Sequence[float] | None = None,
    adapters: bool = True,
    **options: Any,
) -> nn.Module | None:
    """Make a distillation method by its name, with adapters where channels differ.

    Args:
        name: One of `rakd.distill.registry.METHODS`, or "none".
        strides: Pixels per cell of the apprentice's maps, fine to coarse.
        expert_channels: Channels of the expert's maps: per level, or one number for all.
        apprentice_channels: Of the apprentice's.
        batch_size: Images in every batch of a process; only "semckd" needs it.
        seed: Of the initial weights of adapters, projections and attention.
        expert_strides: Pixels of the apprentice's images per cell of the expert's maps; default ``strides``.
        adapters: False refuses channels that differ.
        options: Further arguments of the method's class. ``canonical_size``, ``canonical_level`` and ``backend`` may be
            given for any method and do nothing for those without boxes.

    Returns:
        A module to be called as ``method(expert, apprentice, boxes)``; None for "none".

    Raises:
        ValueError: The name or an option is not known, "semckd" has no batch size, or a setting is wrong.
        TypeError: A setting has the wrong type.
    """
    if name == "none":
        return None
    if name not in METHODS:
        raise ValueError(f"name: expected one of {', '.join(map(repr, (*METHODS, 'none')))}, got {name!r}")
    check_method(name, options)
    spec = METHODS[name]
    cls = spec.load()
    taken = cls.option_names()
    options = {key: value for key, value in options.items() if key not in _COMMON_OPTIONS or key in taken}
    steps = tuple(float(stride) for stride in strides)
    setup = Setup(
        strides=steps,
        expert_strides=steps if expert_strides is None else tuple(float(stride) for stride in expert_strides),
        expert_channels=check_channels("expert_channels", expert_channels, len(strides)),
        apprentice_channels=check_channels("apprentice_channels", apprentice_channels, len(strides)),
        batch_size=batch_size,
        seed=seed,
        adapters=adapters,
    )
    method: DistillationMethod = cls.build(setup, **{**spec.options, **options})
    return method


def check_method(method: Any, options: Mapping[str, Any]) -> None:
    """Refuse what is no method, and options that it does not take.

    Args:
        method: Name or module.
        options: Of its class.

    Raises:
        TypeError: It is neither, its ``forward`` does not take expert's maps, apprentice's maps and boxes, or there
            are options beside a module.
        ValueError: There is no such method, or no such option; names those that there are.
    """
    if isinstance(method, nn.Module):
        try:
            inspect.signature(method.forward).bind(None, None, None)
        except TypeError as error:
            raise TypeError(
                f"method: expected a name or a module whose forward takes (expert's maps, apprentice's maps, boxes), "
                f"got a {type(method).__name__}: {error}; the apprentice is given by name, apprentice="
            ) from None
        if options:
            raise TypeError(f"{next(iter(options))}: expected no options beside a method that is a module")
        return
    if not isinstance(method, str):
        raise TypeError(f"method: expected a name or a module, got {type(method).__name__}")
    spec = find_method(method)
    own = [
        option
        for option in spec.load().option_names()
        if option not in (*_COMMON_OPTIONS, *spec.options, *Setup.__dataclass_fields__, "channels")
    ]
    for option in options:
        if option not in own and option not in _COMMON_OPTIONS:
            known = ", ".join((*own, *_COMMON_OPTIONS))
            raise ValueError(f"{option}: {spec.label} takes no such option; it takes {known}")
