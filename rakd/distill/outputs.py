"""Feature maps out of whatever networks give: dicts, lists, (map, mask) pairs, Hugging Face outputs, NHWC."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["NCHW", "NHWC"]


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _one_map(value: Any) -> Tensor | None:
    """A map by itself, with its padding mask, or as an object that holds both (DETR's NestedTensor)."""
    if _is_map(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, (tuple, list)) and len(value) == 2 and _is_map(value[0]):
        mask = value[1]
        if mask is None or (isinstance(mask, Tensor) and not _is_map(mask)):
            return value[0]  # type: ignore[no-any-return]
    inner = getattr(value, "tensors", None)
    return inner if _is_map(inner) else None


def find_maps(argument: str, output: Any, layout: Layout = "NCHW") -> dict[str, Tensor]:
    """Bring the output of a network to named maps ``[B, C, H, W]``, in its order.

    Args:
        argument: Name of the argument, for errors.
        output: A map; a sequence or dict of maps or (map, mask) pairs; an object with ``feature_maps``; a dict or
            tuple of which one part is such a sequence (encoder outputs, DETR backbones with position embeddings).
        layout: "NHWC" where the maps' channels come last.

    Raises:
        TypeError: There are no maps in it; says what there is.
    """
    maps = _search(output)
    if maps is None:
        raise TypeError(
            f"{argument}: expected feature maps [B, C, H, W] (a dict, a sequence, (map, mask) pairs, or an object with "
            f"feature_maps), got {describe(output)}; name the modules that give them, or pass a function that does"
        )
    if layout == "NHWC":
        return {name: feature.permute(0, 3, 1, 2) for name, feature in maps.items()}
    return maps


def _search(output: Any) -> dict[str, Tensor] | None:
    single = _one_map(output)
    if single is not None:
        return {"0": single}
    if not isinstance(output, (Mapping, Sequence)) or isinstance(output, (str, bytes)):
        inner = getattr(output, "feature_maps", None)
        return None if inner is None else _search(inner)
    inner = getattr(output, "feature_maps", None)
    if isinstance(inner, (Mapping, Sequence)):
        return _search(inner)
    if isinstance(output, Mapping):
        named = {str(name): _one_map(value) for name, value in output.items()}
        if "feature_maps" in output:
            return _search(output["feature_maps"])
        values: list[Any] = list(output.values())
    else:
        values = list(output)
        named = {str(i): _one_map(value) for i, value in enumerate(values)}
    found = {name: feature for name, feature in named.items() if feature is not None}
    if found and len(found) == len(named):
        return found
    if found:
        return None  # maps among other things: which of them are meant cannot be told
    groups = [_search(value) for value in values if isinstance(value, (Mapping, Sequence))]
    groups = [group for group in groups if group]
    if isinstance(output, Mapping):
        return groups[0] if len(groups) == 1 else None
    return groups[0] if groups and isinstance(output, tuple) and groups[0] is not None else None


def describe(value: Any, depth: int = 2) -> str:
    """Say in a few words what a network gave."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name}: {describe(v, depth - 1)}" for name, v in list(value.items())[:4])
        return f"a {type(value).__name__} of {{{inner}}}" if depth else f"a {type(value).__name__}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(describe(v, depth - 1) for v in list(value)[:3])
        more = ", ..." if len(value) > 3 else ""
        return f"a {type(value).__name__} of {len(value)} ({inner}{more})" if depth else f"a {type(value).__name__}"
    return f"a {type(value).__name__}" if value is not None else "None"


def pair_names(apprentice: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> list[str]:
    """The expert's name of each of the apprentice's maps: the same where the names agree, else that in its place.

    Raises:
        ValueError: The numbers of maps differ, or only some of the names agree.
    """
    if set(apprentice) == set(expert):
        return list(apprentice)
    if len(apprentice) != len(expert):
        raise ValueError(
            f"features: expected as many expert maps as the apprentice has, {len(apprentice)} ({_shapes(apprentice)}), "
            f"got {len(expert)} ({_shapes(expert)}); choose the levels to compare by features= and apprentice_features="
        )
    common = [name for name in apprentice if name in expert]
    if common and any(not name.isdigit() for name in common):
        raise ValueError(
            f"features: expected maps of the same names, or of none in common, got {list(expert)} of the expert and "
            f"{list(apprentice)} of the apprentice"
        )
    return list(expert)


def _shapes(maps: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(feature.shape)}" for name, feature in maps.items())


def list_tensors(value: Any, depth: int = 4) -> list[Tensor]:
    """The tensors in what a module gave or was given, wherever `find_maps` would look for maps."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = [getattr(value, name, None) for name in ("tensors", "feature_maps")]
    return [tensor for part in parts for tensor in list_tensors(part, depth - 1)] if depth else []


def version(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor; those made under inference_mode do not count theirs."""
    return -1 if tensor.is_inference() else tensor._version


def versions(value: Any) -> list[int]:
    """Number of in-place changes of each tensor in a value."""
    return [version(tensor) for tensor in list_tensors(value)]


def keep(value: Any) -> Any:
    """A value as it is now: a copy of a list or dict, into which detection heads put their results.

    Under torch.compile also of the maps themselves, since a compiled graph does not count in-place changes.
    """
    copied = value.copy() if type(value) in (list, dict, OrderedDict) else value
    if not torch.compiler.is_compiling():
        return copied
    if isinstance(copied, Tensor):
        return copied.clone()
    if isinstance(copied, dict):
        for name, part in copied.items():
            copied[name] = keep(part)
        return copied
    return type(copied)(keep(part) for part in copied) if type(copied) in (list, tuple) else copied
