"""Feature maps as distillation takes them: checked, named, and in one order for both networks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_maps(argument: str, maps: Any) -> list[Tensor]:
    """Return the values of a dict of feature maps, in its order.

    Args:
        argument: Name of the argument, for errors.
        maps: The argument.

    Returns:
        Maps ``[B, C, H, W]`` of one batch size and device.

    Raises:
        ValueError: A shape, batch size or device is wrong.
        TypeError: This is no dict of floating-point tensors.
    """
    if not isinstance(maps, Mapping):
        raise TypeError(f"{argument}: expected a dict of maps by name, got {type(maps).__name__}")
    if not maps:
        raise ValueError(f"{argument}: expected at least one map, got none")
    first_name, first = next(iter(maps.items()))
    for name, feature in maps.items():
        label = f"{argument}[{name!r}]"
        if not isinstance(feature, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(feature).__name__}")
        if not feature.is_floating_point():
            raise TypeError(f"{label}: expected floating-point numbers, got {feature.dtype}")
        if feature.dim() != 4 or 0 in feature.shape[1:]:
            raise ValueError(f"{label}: expected shape [B, C, H, W] without zeros, got {list(feature.shape)}")
        if feature.shape[0] != first.shape[0]:
            expected = f"{first.shape[0]} images as in {argument}[{first_name!r}]"
            raise ValueError(f"{label}: expected {expected}, got shape {list(feature.shape)}")
        if feature.device != first.device:
            expected = f"device {first.device} as in {argument}[{first_name!r}]"
            raise ValueError(f"{label}: expected {expected}, got {feature.device}")
    return list(maps.values())


def check_both(expert: Any, apprentice: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Check the maps of two networks: the same images, on one device.

    Returns:
        The expert's maps, detached, and the apprentice's.

    Raises:
        ValueError, TypeError: As `check_maps`; or batch size or device differ.
    """
    theirs, ours = check_maps("expert", expert), check_maps("apprentice", apprentice)
    if theirs[0].shape[0] != ours[0].shape[0]:
        raise ValueError(
            f"expert: expected maps of {ours[0].shape[0]} images as in apprentice, got {theirs[0].shape[0]}"
        )
    if theirs[0].device != ours[0].device:
        raise ValueError(f"expert: expected maps on {ours[0].device} as in apprentice, got them on {theirs[0].device}")
    return [feature.detach() for feature in theirs], ours


def check_pairs(expert: Any, apprentice: Any) -> tuple[list[Tensor], list[Tensor]]:
    """`check_both` for methods that compare level with level: the expert's maps come in the apprentice's order.

    Raises:
        ValueError, TypeError: As `check_both`; or the levels' names differ.
    """
    if isinstance(expert, Mapping) and isinstance(apprentice, Mapping):
        missing = [name for name in apprentice if name not in expert]
        extra = [name for name in expert if name not in apprentice]
        if missing or extra:
            wrong = [f"{what} {names}" for what, names in (("lacks", missing), ("has besides", extra)) if names]
            raise ValueError(f"expert: expected the maps {list(apprentice)} as in apprentice; it {' and '.join(wrong)}")
        expert = {name: expert[name] for name in apprentice}
    return check_both(expert, apprentice)


def check_channels(argument: str, channels: Any, levels: int = 0) -> tuple[int, ...]:
    """Check the numbers of channels of a network's levels.

    Args:
        argument: Its name, for errors.
        channels: One for each level; where ``levels`` is given, also one number for all.
        levels: Their number; 0: not known.

    Raises:
        ValueError: There are none, more or fewer than levels, or one is not positive.
        TypeError: They are no sequence of integers.
    """
    if levels and isinstance(channels, int) and not isinstance(channels, bool):
        channels = (channels,) * levels
    if isinstance(channels, (str, bytes)) or not isinstance(channels, Sequence):
        raise TypeError(f"{argument}: expected a sequence of integers, one per level, got {type(channels).__name__}")
    if not channels:
        raise ValueError(f"{argument}: expected at least one level, got none")
    for i, count in enumerate(channels):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{argument}[{i}]: expected an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"{argument}[{i}]: expected 1 or more channels, got {count}")
    if levels and len(channels) != levels:
        raise ValueError(f"{argument}: expected {levels} numbers, one per stride, got {len(channels)}")
    return tuple(channels)
