"""Whether boxes, strides, levels and channels of two networks fit each other, and a table of how they do."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.base import Boxes
from rakd.distill.hooks import FeatureHooks
from rakd.distill.masks import indexed_boxes
from rakd_ops import level_weights


@dataclass(frozen=True)
class Level:
    """One level of both networks.

    Sizes are (rows, columns), strides in pixels of the apprentice's images, ``rms`` the root mean square of the values.
    """

    name: str
    size: tuple[int, int]
    channels: int
    stride: float
    rms: float
    expert_map_size: tuple[int, int]
    expert_channels: int
    expert_stride: float
    expert_rms: float
    boxes: float


@dataclass(frozen=True)
class Report:
    """The result of a check; its text is a small table.

    Attributes:
        images: Their number.
        image_size: Height and width in pixels.
        boxes: Their number.
        levels: Fine to coarse. ``boxes`` of a level is the sum of its soft weights.
    """

    images: int
    image_size: tuple[int, int]
    boxes: int
    levels: tuple[Level, ...]

    def __str__(self) -> str:
        """Lay the report out as a table."""
        network = ("channels", "stride", "RMS")
        rows = [("level", "apprentice", *network, "expert", *network, "boxes")]
        rows += [
            (
                level.name,
                f"{level.size[0]}×{level.size[1]}",
                str(level.channels),
                f"{level.stride:g}",
                f"{level.rms:.2g}",
                f"{level.expert_map_size[0]}×{level.expert_map_size[1]}",
                str(level.expert_channels),
                f"{level.expert_stride:g}",
                f"{level.expert_rms:.2g}",
                f"{level.boxes:.1f}",
            )
            for level in self.levels
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        height, width = self.image_size
        return "\n".join([f"{self.images} images of {height}×{width} pixels, {self.boxes} boxes", *lines])


def fits(cells: Sequence[int], size: Sequence[int], stride: float) -> bool:
    """Whether a map comes from an image by a stride, however its network rounds."""
    return all((n - 1) * stride < pixels < (n + 1) * stride for n, pixels in zip(cells, size, strict=True))


def find_strides(argument: str, maps: Mapping[str, Tensor], size: tuple[int, int]) -> tuple[float, ...]:
    """Find strides from the sizes of images and maps: powers of two where they fit, else exact ratios in whole pixels.

    A ratio that is no whole number tells of images that were resized or padded inside the network.

    Raises:
        ValueError: A map's height and width do not fit one stride, or two levels have the same.
    """
    found: list[float] = []
    for name, feature in maps.items():
        cells = (int(feature.shape[2]), int(feature.shape[3]))
        ratio = math.sqrt(size[0] / cells[0] * size[1] / cells[1])
        least = found[-1] if found else 0.0
        powers = [2.0**i for i in range(0, 12) if fits(cells, size, 2.0**i) and 2.0**i > least]
        exact = size[0] / cells[0]
        whole = size[1] / cells[1] == exact and exact > least and exact.is_integer()
        # A power of two fits by chance where cells are few: not above a level that has none, as of patches of 14.
        if whole and (not powers or any(math.log2(stride) % 1 for stride in found)):
            found.append(exact)
        elif powers:
            found.append(min(powers, key=lambda stride: abs(math.log2(stride / ratio))))
        else:
            raise ValueError(
                f"{argument}: could not find the stride of map {name!r} of shape {list(feature.shape)} from images of "
                f"{size[0]}×{size[1]} pixels{_layout_hint(feature, size)}; give {argument}=, and see that images are "
                "those that the network was given, and maps are fine to coarse, each level once"
            )
    return tuple(found)


def _layout_hint(feature: Tensor, size: tuple[int, int]) -> str:
    rows, columns = int(feature.shape[1]), int(feature.shape[2])
    if any(fits((rows, columns), size, 2.0**i) for i in range(1, 8)):
        return "; its channels seem to come last: say layout='NHWC' (apprentice) or expert_layout='NHWC'"
    return ""


def check_strides(argument: str, strides: Sequence[float], maps: Mapping[str, Tensor], size: tuple[int, int]) -> None:
    """Refuse strides that do not bring maps and images together.

    Raises:
        ValueError: Names the level, and the strides that would fit.
    """
    if len(strides) != len(maps):
        raise ValueError(f"{argument}: expected {len(maps)} strides, one per map, got {len(strides)}")
    for stride, (name, feature) in zip(strides, maps.items(), strict=True):
        if not fits(feature.shape[2:], size, stride):
            try:
                remedy = f"these maps have {argument}={find_strides(argument, maps, size)}"
            except ValueError as error:
                remedy = str(error)
            raise ValueError(
                f"{argument}: expected strides that fit images of {size[0]}×{size[1]} pixels and maps, got {stride:g} "
                f"for map {name!r} of {feature.shape[2]}×{feature.shape[3]} cells; {remedy}"
            )


def check_maps_agree(
    apprentice: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    images: int | None,
    channels: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
) -> None:
    """Compare numbers of images and channels.

    Raises:
        ValueError: Says what differs, and what to do.
    """
    for name, maps in (("apprentice_features", apprentice), ("expert_features", expert)):
        for level, feature in maps.items():
            if images is not None and feature.shape[0] != images:
                raise ValueError(
                    f"{name}: expected maps of {images} images, as many as there are images, got {feature.shape[0]} in "
                    f"map {level!r}; the maps must come from these images"
                )
    first, other = next(iter(apprentice.values())), next(iter(expert.values()))
    if first.shape[0] != other.shape[0]:
        raise ValueError(
            f"expert_features: expected maps of {first.shape[0]} images as in apprentice, got {other.shape[0]}"
        )
    for argument, maps, given in (
        ("apprentice_channels", apprentice, channels[0]),
        ("expert_channels", expert, channels[1]),
    ):
        counts = tuple(int(feature.shape[1]) for feature in maps.values())
        if given is not None and tuple(given) != counts:
            raise ValueError(
                f"{argument}: expected the maps' numbers of channels, {counts}, got {tuple(given)}; leave them out to "
                "have them found (a loaded state has those of its own networks, and fits no others), or say "
                "layout='NHWC' or expert_layout='NHWC' where channels come last"
            )


def check_learns(apprentice: Mapping[str, Tensor]) -> None:
    """See that the apprentice can learn; warns of levels that cannot.

    Raises:
        ValueError: No gradient goes to it.
    """
    still = [name for name, feature in apprentice.items() if not feature.requires_grad]
    if len(still) == len(apprentice):
        raise ValueError(
            "apprentice_features: expected maps that need a gradient, got none that do: the apprentice is frozen, ran "
            "under torch.no_grad(), or is the expert itself (a distiller freezes its expert); check=False lets it pass"
        )
    if still:
        warnings.warn(
            f"apprentice_features: no gradient goes to the maps {', '.join(map(repr, still))}, frozen or made without "
            "one: they add to the loss, and teach nothing",
            stacklevel=6,  # the caller of the distiller
        )


def check_boxes(boxes: Boxes, size: tuple[int, int], images: int, settings: tuple[str, bool]) -> Tensor:
    """Refuse boxes that cannot belong to the images.

    Args:
        boxes: In pixels.
        size: Height and width of the images.
        images: Their number.
        settings: ``box_format`` and ``normalized``, for the remedy.

    Returns:
        ``[K, 5]`` on the CPU.

    Raises:
        ValueError: Says what to change.
    """
    rows = indexed_boxes(boxes, torch.device("cpu"))
    if not len(rows):
        return rows
    box_format, normalized = settings
    height, width = size
    if not rows.isfinite().all():
        raise ValueError(f"boxes: expected finite numbers, got {rows[~rows.isfinite().all(dim=1)][0].tolist()}")
    index = rows[:, 0]
    if bool((index != index.floor()).any()) or bool((index < 0).any()) or bool((index >= images).any()):
        wrong = rows[(index != index.floor()) | (index < 0) | (index >= images)][0]
        raise ValueError(
            f"boxes: expected numbers of images from 0 to {images - 1} in column 0 of [K, 5], got {wrong.tolist()}; "
            "the columns are (image, four numbers of the box)"
        )
    edges = rows[:, 1:]
    largest = float(edges.abs().max())
    if not normalized and largest <= 1.5 and min(size) > 4:
        form = ""
        if box_format == "xyxy" and bool((edges[:, 2:] < edges[:, :2]).any()):
            form = ", box_format='cxcywh' or 'xywh' (x2 < x1 in some)"
        raise ValueError(
            f"boxes: expected pixels, but all lie in the unit square of images of {height}×{width} pixels, such as "
            f"{edges[0].tolist()}: say normalized=True{form}; YOLO's and Hugging Face's labels are "
            "box_format='cxcywh', normalized=True"
        )
    if normalized and largest > 2 * max(size):
        raise ValueError(
            "boxes: expected numbers from 0 to 1, normalised by the image's size, got numbers up to "
            f"{largest / max(size):.4g}: these are pixels, say normalized=False"
        )
    turned = (edges[:, 2] < edges[:, 0]) | (edges[:, 3] < edges[:, 1])
    if bool(turned.any()):
        raise ValueError(
            f"boxes: expected x1 <= x2 and y1 <= y2, got {edges[turned][0].tolist()} and {int(turned.sum())} like it "
            f"of {len(rows)}: read as box_format={box_format!r}; say box_format='cxcywh' or 'xywh' if they are"
        )
    if not bool(edges.any(dim=1).all()):
        raise ValueError(
            "boxes: expected boxes, got rows of four zeros, as lists are padded with: leave them out, they would count "
            "as objects in the image's corner"
        )
    limits = edges.new_tensor([width, height, width, height])
    inside = (edges.clamp(min=0)).minimum(limits)
    sides, seen = edges[:, 2:] - edges[:, :2], inside[:, 2:] - inside[:, :2]
    flat = edges[:, :2] == inside[:, :2]  # random crops leave boxes of no area: whether they begin inside
    share = torch.where(sides > 0, seen / sides.clamp(min=1e-6), flat.to(seen)).clamp(min=0).prod(dim=1)
    outside = share < 0.5
    if float(outside.double().mean()) > 0.5 or float(edges.max()) > 2 * max(size):
        worst = edges[share.argmin()].tolist()
        raise ValueError(
            f"boxes: expected boxes inside images of {height}×{width} pixels, got {int(outside.sum())} of {len(rows)} "
            f"that lie mostly outside, such as {worst}; take boxes and images after the same resizing, and see that "
            f"box_format={box_format!r} is theirs"
        )
    return rows


def warn_of_unlike_strides(names: Iterable[str], strides: Sequence[float], expert: Sequence[float]) -> None:
    """Warn where levels of unlike strides are compared in one image."""
    far = [pair for pair in zip(names, strides, expert, strict=True) if not 0.7 < pair[1] / pair[2] < 1.4]
    if far:
        name, stride, other = far[0]
        warnings.warn(
            f"features: map {name!r} of stride {stride:g} is compared with one of stride {other:g} of the expert's: "
            "choose levels of the same strides, or give expert_strides= if this is meant",
            stacklevel=8,  # the caller of the distiller
        )


def find_resizing(network: nn.Module, taken: Iterable[nn.Module]) -> str | None:
    """Name of the transform that a torchvision detector in a network has before any of these modules."""
    wanted = {id(module) for module in taken}
    for name, module in network.named_modules():
        kinds = {kind.__name__ for kind in type(getattr(module, "transform", None)).__mro__}
        if "GeneralizedRCNNTransform" in kinds and wanted & {id(part) for part in module.modules()}:
            return f"{name}.transform".lstrip(".")
    return None


def refuse_resizing(hooks: FeatureHooks | None, images: Tensor | None, remedy: str) -> None:
    """Refuse to run a torchvision detector on images that are normalised already: its own are 0 to 1.

    Raises:
        ValueError: They are.
    """
    place = None if hooks is None or hooks.network is None else find_resizing(hooks.network, hooks.modules)
    if hooks is not None and place is not None and images is not None and bool((images < 0).any()):
        raise ValueError(
            f"{hooks.argument}: expected modules that take the images as they are given, which have values below 0, "
            f"but {place} would resize and normalise them a second time: {remedy}"
        )


def warn_of_large_apprentice_maps(levels: Sequence[Level]) -> None:
    """Warn where the apprentice itself would have to change its maps' scale to imitate an expert's that is rescaled.

    Where channels differ an adapter does. 4 lies between those of docs/evidence_weights.md: one of 2 gained by
    rescaled maps, one of 13 lost by them at ten times the task loss.
    """
    far = [level for level in levels if level.channels == level.expert_channels and level.rms > 4]
    if far:
        worst = max(far, key=lambda level: level.rms)
        warnings.warn(
            f"rescale=True brings the expert's maps alone to a root mean square of 1, and the apprentice's map "
            f"{worst.name!r} has {worst.rms:.2g}: it will shrink, which may cost more than is gained; rescale='both' "
            "leaves each network its scale",
            stacklevel=4,
        )


def soft_weights(rows: Tensor, strides: Sequence[float], options: Mapping[str, Any]) -> Tensor:
    """Compute RAKD's weights per box and level.

    Levels of one stride, as a transformer's layers have, count each box once: methods without level weights take them.
    """
    if any(fine >= coarse for fine, coarse in pairwise(strides)):
        return torch.ones(len(rows), len(strides), device=rows.device)
    known = {name: options[name] for name in ("sigma", "canonical_size", "canonical_level") if name in options}
    return level_weights(rows, strides=strides, **known)
