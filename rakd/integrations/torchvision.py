"""Distillation of torchvision's detectors: Faster and Mask R-CNN, RetinaNet, FCOS, SSD.

    detector = DistilledDetector(fasterrcnn_mobilenet_v3_large_fpn(), expert, weight="auto:0.1")
    losses = detector(images, targets)  # as before, and "loss_distill"
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.checks import find_strides
from rakd.distill.distiller import Distiller
from rakd.distill.hooks import tap
from rakd.distill.outputs import find_maps
from rakd.integrations import require

_detection = require("torchvision.models.detection", "torchvision")

_TRIAL = 256  # pixels of the images that show strides and channels, where the detector has no fixed size


class DistilledDetector(nn.Module):
    """A detector whose training losses gain ``"loss_distill"``; in eval mode it is the detector.

    Images are resized and normalised inside torchvision's detectors, and boxes with them; both are taken from there,
    and the expert's backbone is given the same images (in its own normalisation, where that differs). The detector's
    own weights are ``detector.model.state_dict()``; adapters are part of ``parameters()`` and of ``state_dict()``.

    Args:
        model: The apprentice, a detector with ``transform`` and ``backbone``.
        expert: A detector of torchvision, or anything that `rakd.distill.distiller.Distiller` takes for the
            apprentice's normalised images.
        weight: See the `Distiller`.
        method: Same.
        options: Same, such as ``normalize=True``. Strides and channels are found here unless told.

    Raises:
        TypeError: The model is no detector of this kind.
        ValueError: Levels of the two do not agree.
    """

    def __init__(
        self,
        model: nn.Module,
        expert: Any,
        weight: float | str | None = None,
        *,
        method: str | nn.Module = "rakd",
        **options: Any,
    ) -> None:
        super().__init__()
        for part in ("transform", "backbone"):
            if not isinstance(getattr(model, part, None), nn.Module):
                raise TypeError(f"model: expected a detector of torchvision with a {part}, got {type(model).__name__}")
        self.model = model
        self._expert_scale: tuple[Tensor, Tensor] | None = None
        # Found before the first step, so that an optimizer made now has the adapters.
        size = tuple(getattr(model.transform, "fixed_size", None) or (_TRIAL, _TRIAL))
        device = next(model.parameters()).device
        found = _try(model, model.backbone, size, device)
        if "apprentice_features" not in options:
            options.setdefault("strides", found[0])
            options.setdefault("apprentice_channels", found[1])
        if isinstance(getattr(expert, "transform", None), nn.Module) and hasattr(expert, "backbone"):
            self._expert_scale = _change_of_scale(model.transform, expert.transform)
            expert_found = _try(expert.to(device), expert.backbone, size, device)
            if "features" not in options:
                options.setdefault("expert_channels", expert_found[1])
                if expert_found[0] != found[0] and len(expert_found[0]) == len(found[0]):
                    options.setdefault("expert_strides", expert_found[0])
            expert = expert.backbone
        elif isinstance(expert, nn.Module) and "features" not in options:
            options.setdefault("expert_channels", _try(expert, expert.to(device), size, device)[1])
        options.setdefault("apprentice_features", "backbone")
        self.distiller = Distiller(expert, method, weight, apprentice=model, **options)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """Run the detector.

        Args:
            images: ``[3, H, W]`` each, as the detector takes them.
            targets: Same.

        Returns:
            In training the detector's losses and ``"loss_distill"``; else its detections.
        """
        if not self.training:
            return self.model(images, targets)
        with tap(self.model.transform) as transform:  # type: ignore[arg-type]
            losses: dict[str, Tensor] = self.model(images, targets)
        batch, resized = transform.output
        seen = batch.tensors
        expert_images = None
        if self._expert_scale is not None:
            factor, shift = (value.to(seen) for value in self._expert_scale)
            expert_images = seen * factor + shift
        task = torch.stack([loss.detach().sum() for loss in losses.values()]).sum()
        boxes = [target["boxes"] for target in resized]
        added = self.distiller(seen, boxes, task_loss=task, expert_images=expert_images)
        return {**losses, "loss_distill": added}


def _try(
    detector: nn.Module, backbone: nn.Module, size: Sequence[int], device: torch.device
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Strides and channels of a backbone's maps."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    with torch.no_grad():
        maps = find_maps("backbone", backbone(torch.zeros(1, 3, *size, device=device)))
    for module, mode in modes.items():
        module.training = mode
    # SSD's coarsest maps come from convolutions without padding; its default boxes say where their cells lie.
    steps = getattr(getattr(detector, "anchor_generator", None), "steps", None)
    strides = tuple(map(float, steps)) if steps else find_strides("strides", maps, (int(size[0]), int(size[1])))
    return strides, tuple(feature.shape[1] for feature in maps.values())


def _change_of_scale(ours: Any, theirs: Any) -> tuple[Tensor, Tensor] | None:
    """Factor and shift, ``[3, 1, 1]``, that bring the apprentice's normalisation to the expert's; None if equal."""
    mean, std, other_mean, other_std = (
        torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
        for values in (ours.image_mean, ours.image_std, theirs.image_mean, theirs.image_std)
    )
    if torch.equal(mean, other_mean) and torch.equal(std, other_std):
        return None
    return std / other_std, (mean - other_mean) / other_std
