"""A timm backbone as expert or apprentice: strides, channels and layout from its ``feature_info``.

distiller = distill("convnext_tiny", apprentice, weight=1.0)
distiller.add_to(optimizer)
loss = task_loss + distiller(images, boxes, apprentice(images))
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from rakd.distill.distiller import Distiller
from rakd.distill.outputs import find_maps
from rakd.extras import require

_timm = require("timm", "timm")


def distill(
    expert: Any,
    apprentice: Any = None,
    weight: float | str | None = None,
    *,
    method: str | nn.Module = "rakd",
    pretrained: bool = True,
    **options: Any,
) -> Distiller:
    """Make a distiller of which at least one side is a timm backbone.

    For each of the apprentice's levels the expert's of the same stride is taken, of several the deepest. Of two
    backbones adapters are there at once, so that ``distiller.parameters()`` can go to the optimizer.

    Args:
        expert: A backbone made with ``features_only=True``, the name of one for ``timm.create_model``, or anything
            that `rakd.distill.distiller.Distiller` takes.
        apprentice: A backbone made with ``features_only=True``, or a network that holds one, whose maps have the
            backbone's strides; None: calls bring the maps, and ``strides`` are given.
        weight: See the ``Distiller``.
        method: Same.
        pretrained: Whether an expert given by name has its published weights.
        options: Of the ``Distiller``.

    Returns:
        The distiller; its calls bring the apprentice's maps, unless ``apprentice_features`` names their module.

    Raises:
        ValueError: The expert has no level of a stride that the apprentice has, or the layout of the apprentice's maps
            is not known.
        TypeError: Neither side is a timm backbone.
    """
    if isinstance(expert, str):
        expert = _timm.create_model(expert, pretrained=pretrained, features_only=True)
    ours = _info(apprentice)
    theirs = _info(expert) if _backbone(expert) is expert else None
    if ours is None and theirs is None:
        raise TypeError(
            "expert: expected a timm backbone on one side at least, made by timm.create_model(..., features_only=True)"
            f", got {type(expert).__name__} and {type(apprentice).__name__}"
        )
    if ours is not None:
        wanted = options.get("apprentice_features")
        options.setdefault("strides", ours[0])
        if _gives_maps(apprentice, wanted):  # else they may be a neck's
            options.setdefault("apprentice_channels", ours[1])
            options.setdefault("layout", ours[2])
        elif wanted is None and ours[2] != "NCHW" and "layout" not in options:
            raise ValueError(
                "layout: expected 'NCHW' or 'NHWC' for the maps of a network around a backbone that gives "
                f"{ours[2]}, whose own they may be or a neck's, got neither"
            )
    if theirs is not None and "features" not in options:
        strides = tuple(float(stride) for stride in options.get("strides", theirs[0]))
        options.setdefault("strides", strides)
        absent = [stride for stride in strides if stride not in theirs[0]]
        if absent:
            common = [i for i, stride in enumerate(strides) if stride in theirs[0]]
            raise ValueError(
                f"expert: expected levels of strides {strides} as the apprentice's, got {theirs[0]}; make the "
                f"apprentice with the levels of both, such as out_indices={tuple(common)}"
            )
        deepest = {stride: level for level, stride in enumerate(theirs[0])}
        levels = [deepest[stride] for stride in strides]
        options["features"] = partial(_take, levels=levels)
        options.setdefault("expert_channels", tuple(theirs[1][level] for level in levels))
        options.setdefault("expert_layout", theirs[2])
    _warn_of_normalisation(expert, apprentice)
    return Distiller(expert, method, weight, apprentice=apprentice, **options)


def _warn_of_normalisation(expert: Any, apprentice: Any) -> None:
    """Tell of an expert that learned on images of another mean and standard deviation than the apprentice's are."""
    theirs, ours = (_pixels(_backbone(network)) for network in (expert, apprentice))
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"expert: its images had mean and standard deviation {theirs}, the apprentice's have {ours}; it gets the "
            "apprentice's, unless calls bring its own as expert_images=",
            stacklevel=3,
        )


def _pixels(backbone: nn.Module | None) -> tuple[Any, ...]:
    settings: Any = getattr(backbone, "pretrained_cfg", None) or {}
    return tuple(tuple(settings[name]) for name in ("mean", "std") if settings.get(name))


def _take(expert: nn.Module, images: Tensor, *, levels: Sequence[int]) -> list[Tensor]:
    maps = list(find_maps("expert", expert(images)).values())
    return [maps[level] for level in levels]


def _gives_maps(network: nn.Module, wanted: Any) -> bool:
    """Whether the maps of a network, or of the module ``wanted`` in it, are those of its backbone."""
    named = dict(network.named_modules())
    return isinstance(wanted or "", str) and named.get(wanted or "") is _backbone(network)


def _info(network: Any) -> tuple[tuple[float, ...], tuple[int, ...], str] | None:
    """Strides, channels and layout of a backbone, or of the one inside a network."""
    backbone: Any = _backbone(network)
    if backbone is None:
        return None
    form = getattr(backbone, "output_fmt", "NCHW")  # EfficientNets and some others lack it
    layout = str(getattr(form, "value", form))
    return tuple(map(float, backbone.feature_info.reduction())), tuple(backbone.feature_info.channels()), layout


def _backbone(network: Any) -> nn.Module | None:
    """A backbone of timm: the network, or the one inside it."""
    for module in network.modules() if isinstance(network, nn.Module) else ():
        info: Any = getattr(module, "feature_info", None)
        if callable(getattr(info, "reduction", None)):
            return module
    return None
