"""The interface of distillation methods: expert's and apprentice's maps and boxes in, a scalar loss out."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from rakd.distill.adapters import ChannelAdapters
from rakd.distill.maps import check_pairs
from rakd.nn import widen

Boxes = Tensor | Sequence[Tensor]
"""``[K, 5]`` (image, x1, y1, x2, y2), or ``[K_b, 4]`` (x1, y1, x2, y2) per image; pixels of the apprentice's input."""

Maps = Mapping[str, Tensor]
"""``[B, C, H, W]`` by name, fine to coarse."""


@dataclass(frozen=True)
class Setup:
    """Facts of the two networks and of the training, from which methods are built.

    Attributes:
        strides: Pixels per cell of the apprentice's maps.
        expert_strides: Pixels of the apprentice's images per cell of the expert's maps.
        expert_channels: Per level.
        apprentice_channels: Per level.
        batch_size: Images in every batch of a process; None: not known.
        seed: Of initial weights.
        adapters: Whether channels may be adapted.
    """

    strides: tuple[float, ...]
    expert_strides: tuple[float, ...]
    expert_channels: tuple[int, ...]
    apprentice_channels: tuple[int, ...]
    batch_size: int | None = None
    seed: int = 0
    adapters: bool = True

    def adapter(self) -> ChannelAdapters | None:
        """Make the adapters that the channels need; None if they agree.

        Raises:
            ValueError: The channels differ and adapters are switched off.
        """
        if self.expert_channels == self.apprentice_channels:
            return None
        if not self.adapters:
            raise ValueError(
                f"adapters: expected equal channels where adapters=False, got {self.expert_channels} of the expert and "
                f"{self.apprentice_channels} of the apprentice"
            )
        return ChannelAdapters(self.apprentice_channels, self.expert_channels, seed=self.seed)


class DistillationMethod(nn.Module):
    """A method: a module called as ``method(expert, apprentice, boxes)``.

    No gradient flows to the expert's maps, and the loss carries no weight of its own. A subclass needs `forward`. Where
    its constructor takes more than options and an adapter, it says how it is made from a `Setup` (`build`); where its
    loss is a squared difference, what the expert alone amounts to (`energy`).

    Args:
        adapter: Brings the apprentice's maps to the expert's channels; None: they agree.
    """

    needs_scores: ClassVar[bool] = False
    """Whether it takes ``scores``, the expert's class logits."""

    expert_strides: tuple[float, ...] | None = None
    """Pixels of the apprentice's images per cell of the expert's maps, where the method uses them. A distiller that
    finds them at its first step sets them."""

    def __init__(self, *, adapter: ChannelAdapters | None = None) -> None:
        super().__init__()
        self.adapter = adapter

    @classmethod
    def build(cls, setup: Setup, **options: Any) -> "DistillationMethod":
        """Make the method for two networks.

        Args:
            setup: The networks.
            options: Further arguments of the constructor.
        """
        return cls(adapter=setup.adapter(), **options)

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes) -> Tensor:
        """Compute the loss.

        Args:
            expert: Maps with the apprentice's names.
            apprentice: Fine to coarse; resized bilinearly where sizes differ.
            boxes: ``[K, 5]``, or ``[K_b, 4]`` per image, in pixels of the apprentice's input. All methods are called
                alike, also those that do not use them.

        Returns:
            A scalar, float64 for float64 maps, else float32.

        Raises:
            ValueError, TypeError: Names, shapes or channels are wrong.
        """
        raise NotImplementedError

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the constructor's arguments."""
        return [name for name in inspect.signature(cls).parameters if name != "adapter"]

    def energy(self, expert: Maps, boxes: Boxes, scores: Sequence[Tensor] | None = None) -> Tensor:
        """Compute the loss of an apprentice whose (adapted) maps are all zeros, without gradient.

        Raises:
            ValueError: The method's loss does not grow with the expert's features.
        """
        raise ValueError(f"normalize: {type(self).__name__} does not depend on the features' scale, or not as a square")


def resize(feature: Tensor, like: Tensor) -> Tensor:
    """Bring an apprentice's map to the expert's size, bilinearly, in float32 or float64."""
    feature = widen(feature)
    if feature.shape[2:] == like.shape[2:]:
        return feature
    return F.interpolate(feature, size=like.shape[2:], mode="bilinear", align_corners=False)


def pair_maps(expert: Maps, apprentice: Maps, adapter: ChannelAdapters | None) -> tuple[list[Tensor], list[Tensor]]:
    """Both networks' maps level by level, the apprentice's adapted, for methods that compare channels one to one.

    Args:
        expert: Maps with the apprentice's names.
        apprentice: Their order is that of the levels.
        adapter: Brings the apprentice's channels to the expert's; None: they agree.

    Returns:
        The expert's and the apprentice's.

    Raises:
        ValueError, TypeError: Names, shapes or channels are wrong.
    """
    expert_maps, maps = check_pairs(expert, apprentice)
    if adapter is not None:
        maps = adapter(maps)
    for name, ours, theirs in zip(apprentice, maps, expert_maps, strict=True):
        if ours.shape[1] != theirs.shape[1]:
            raise ValueError(
                f"apprentice[{name!r}]: expected {theirs.shape[1]} channels as in expert, got shape "
                f"{list(ours.shape)}; channels are compared one to one, an adapter brings them to one number"
            )
    return expert_maps, maps
