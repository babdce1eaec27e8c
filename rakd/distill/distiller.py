"""Distillation in anyone's trainer: a frozen expert, a method and a weight in one module, and a tap for features."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.maps import name_maps

Features = Mapping[str, Tensor] | Sequence[Tensor]
"""Feature maps ``[B, C, H, W]``, fine to coarse."""


class Distiller(nn.Module):
    """Gives the weighted distillation loss of an apprentice's features against a frozen expert's.

    The expert runs in eval mode and without gradients, and training leaves its parameters and buffers as they are to
    the bit. It is no submodule: ``parameters``, ``state_dict`` and ``train`` know nothing of it, so that optimizers,
    checkpoints and DistributedDataParallel carry only what the method learns (adapters); ``to``, ``cuda`` and the like
    take it along.

    What the method learns must be trained: give ``parameters`` to the optimizer, and where there are any, let
    DistributedDataParallel wrap the distiller or a module that holds it and the apprentice.

    Args:
        expert: Maps a batch of images to feature maps, a dict or a sequence, fine to coarse: a module, an object with
            ``extract_features``, or a function. A module, also one whose method this is, is frozen in place. None where
            all calls bring ``expert_features``.
        method: The loss, such as `rakd.distill.methods.make_method` gives: called with the expert's maps, the
            apprentice's and the boxes.
        weight: What the method's loss is multiplied with.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The weight is negative or not finite.

    Example:
        A torchvision RetinaNet learns from a larger one. Both have levels of strides 8 to 128. torchvision's detectors
        resize and normalise images inside, **so boxes must be taken from inside as well**: boxes in pixels of the
        original images would lie elsewhere on the maps, and nothing would fail but the results. Tapping ``transform``
        gives images and boxes as the backbone sees them; tapping ``backbone`` gives the features that the detector's
        own losses are computed from, without another pass.

        >>> method = make_method(
        ...     "rakd", strides=(8, 16, 32, 64, 128), expert_channels=256, apprentice_channels=256
        ... )
        >>> distiller = Distiller(expert.backbone, method, weight=0.5)
        >>> optimizer = torch.optim.SGD([*apprentice.parameters(), *distiller.parameters()], lr=0.001)
        >>> for images, targets in loader:
        ...     with tap(apprentice.transform) as transform, tap(apprentice.backbone) as backbone:
        ...         losses = apprentice(images, targets)
        ...     seen, seen_targets = transform.output
        ...     boxes = [target["boxes"] for target in seen_targets]
        ...     loss = sum(losses.values()) + distiller(seen.tensors, backbone.output, boxes)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    def __init__(
        self, expert: Callable[[Tensor], Features] | Any | None, method: nn.Module, weight: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(method, nn.Module):
            raise TypeError(f"method: expected a module, got {type(method).__name__}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"weight: expected a number, got {type(weight).__name__}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight: expected a finite number of 0 or more, got {weight}")
        if expert is not None and not callable(expert) and not hasattr(expert, "extract_features"):
            raise TypeError(
                f"expert: expected a module, an object with extract_features or a function, got {type(expert).__name__}"
            )
        self.method = method
        self.weight = float(weight)
        self._expert = (expert,)  # in a tuple, where nn.Module does not find it
        self._freeze()

    @property
    def expert(self) -> Any:
        """The expert as it was given."""
        return self._expert[0]

    def _expert_module(self) -> nn.Module | None:
        """The module to freeze and move: the expert, or the one whose method it is."""
        for candidate in (self.expert, getattr(self.expert, "__self__", None)):
            if isinstance(candidate, nn.Module):
                return candidate
        return None

    def _freeze(self) -> None:
        module = self._expert_module()
        if module is not None:
            module.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        """Take the expert along in ``to``, ``cuda``, ``double`` and all that nn.Module builds on this."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        module = self._expert_module()
        if module is not None:
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        images: Tensor | None,
        apprentice_features: Features,
        boxes: Sequence[Tensor],
        expert_features: Features | None = None,
    ) -> Tensor:
        """Compute the weighted loss.

        Args:
            images: ``[B, 3, H, W]``, what the expert takes; None with ``expert_features``.
            apprentice_features: The apprentice's maps, a dict or a sequence. Their graph is kept.
            boxes: ``[K_b, 4]`` per image, (x1, y1, x2, y2) in pixels of the tensor that the apprentice's backbone was
                given, after all resizing.
            expert_features: The expert's maps for these images, such as cached ones; the expert then does not run.

        Returns:
            A scalar.

        Raises:
            ValueError: Neither images nor expert features came, or the method does not take these maps or boxes.
            TypeError: The features are neither dicts nor sequences of tensors.
        """
        apprentice = name_maps("apprentice_features", apprentice_features)
        if expert_features is None:
            expert = name_maps("expert's output", self.teach(images), list(apprentice))
        else:
            expert = name_maps("expert_features", expert_features, list(apprentice))
        loss: Tensor = self.method(expert, apprentice, boxes)
        return loss if self.weight == 1.0 else self.weight * loss

    def teach(self, images: Tensor | None) -> Features:
        """Run the expert, such as for filling a cache.

        Args:
            images: ``[B, 3, H, W]``, what the expert takes.

        Returns:
            What it gives; no gradient flows to it.

        Raises:
            ValueError: There is no expert, or there are no images.
        """
        if self.expert is None:
            raise ValueError("expert_features: expected the expert's maps, since this Distiller has no expert")
        if images is None:
            raise ValueError("images: expected images for the expert, or expert_features in their place, got None")
        self._freeze()  # someone who holds the expert as well may have called train() on it
        run = getattr(self.expert, "extract_features", self.expert)
        with torch.no_grad():
            features: Features = run(images)
        return features

    def extra_repr(self) -> str:
        """Show the expert's kind and the weight in ``repr``."""
        return f"expert={type(self.expert).__name__}, weight={self.weight}"


class Tap:
    """What a tapped module gave last; see `tap`."""

    def __init__(self) -> None:
        self._outputs: list[Any] = []

    @property
    def output(self) -> Any:
        """The module's last output, with its graph.

        Raises:
            RuntimeError: The module did not run while it was tapped.
        """
        if not self._outputs:
            raise RuntimeError("the tapped module did not run inside the with block: there is no output")
        return self._outputs[-1]

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._outputs[:] = [output]


@contextmanager
def tap(module: nn.Module) -> Iterator[Tap]:
    """Within the block, note what a module gives when others call it.

    For networks that keep their features to themselves: the features come from the very pass that the network's own
    losses come from. Under DistributedDataParallel tap ``network.module``'s parts. Calls of other methods than
    ``module(...)`` are not seen.

    Args:
        module: Any part of a network.

    Yields:
        A `Tap`; its ``output`` can be read during and after the block. It holds the output, and with it the graph, for
        as long as it lives itself.

    Raises:
        TypeError: This is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    tapped = Tap()
    handle = module.register_forward_hook(tapped._keep)
    try:
        yield tapped
    finally:
        handle.remove()
