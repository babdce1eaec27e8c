"""Distillation of torchvision's detectors: Faster and Mask R-CNN, RetinaNet, FCOS, SSD.

detector = DistilledDetector(fasterrcnn_mobilenet_v3_large_fpn(), expert, weight="auto:10")
losses = detector(images, targets)  # as before, and "loss_distill"
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.checks import find_strides
from rakd.distill.distiller import Distiller
from rakd.distill.hooks import tap
from rakd.distill.outputs import find_maps
from rakd.extras import require

_detection = require("torchvision.models.detection", "torchvision")

_TRIAL = 256  # pixels of the images that show strides and channels, where the detector has no fixed size


class DistilledDetector(nn.Module):
    """A detector whose training losses gain ``"loss_distill"``; in eval mode it is the detector.

    Images are resized and normalised inside torchvision's detectors, and boxes with them; both are taken from there,
    and the expert's backbone is given the same images (in its own normalisation, where that differs). Levels of equal
    strides are compared, whatever they are called, so that a RetinaNet may teach a Faster R-CNN. The detector's own
    weights are ``detector.model.state_dict()``; adapters are part of ``parameters()`` and of ``state_dict()``.

    Args:
        model: The apprentice, a detector with ``transform`` and ``backbone``.
        expert: A detector of torchvision, or anything that `rakd.distill.distiller.Distiller` takes for the
            apprentice's normalised images.
        weight: See the ``Distiller``.
        method: Same.
        keys: With ``cache``: gives each image's key from the batch's targets, such as their ``image_id``. Only sensible
            where images repeat.
        options: Same, such as ``normalize=True``. ``features`` and ``apprentice_features`` choose other maps.

    Raises:
        TypeError: The model is no detector of this kind, or an option is given that is found here.
        ValueError: The two have no stride in common.
    """

    def __init__(
        self,
        model: nn.Module,
        expert: Any,
        weight: float | str | None = None,
        *,
        method: str | nn.Module = "rakd",
        keys: Callable[[Sequence[dict[str, Tensor]]], Sequence[Any]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for part in ("transform", "backbone"):
            _part(model, part)
        self.model = model
        self._keys = keys
        self._expert_scale: tuple[Tensor, Tensor] | None = None
        self._names: list[str] | None = None
        # Found before the first step, so that an optimizer made now has the adapters.
        device = next(model.parameters()).device
        fixed = [getattr(getattr(net, "transform", None), "fixed_size", None) for net in (model, expert)]
        size = next((tuple(found) for found in fixed if found), (_TRIAL, _TRIAL))
        expert_model = expert.to(device) if isinstance(expert, nn.Module) else None
        if isinstance(getattr(expert, "transform", None), nn.Module) and hasattr(expert, "backbone"):
            self._expert_scale = _change_of_scale(model.transform, expert.transform)
            expert = expert.backbone
        if "apprentice_features" in options or "features" in options or not isinstance(expert, nn.Module):
            options.setdefault("apprentice_features", "backbone")
        else:
            ours = _levels(model, _part(model, "backbone"), size, device)
            theirs = _levels(expert_model, expert, size, device)
            strides = [stride for stride in ours if stride in theirs]
            if not strides:
                raise ValueError(f"expert: expected a level of one of the strides {list(ours)}, got {list(theirs)}")
            self._names = [ours[stride][0] for stride in strides]
            pairs = [(ours[stride][0], theirs[stride][0]) for stride in strides]
            found = {
                "features": partial(_take, names=dict(pairs)),
                "strides": strides,
                "apprentice_channels": [ours[stride][1] for stride in strides],
                "expert_channels": [theirs[stride][1] for stride in strides],
            }
            given = next((name for name in found if name in options), None)
            if given is not None:
                raise TypeError(
                    f"{given}: expected none, since it is found, or features= beside it, got {options[given]!r}"
                )
            options |= found
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
        with tap(_part(self.model, "transform")) as transform, tap(_part(self.model, "backbone")) as backbone:
            losses: dict[str, Tensor] = self.model(images, targets)
        batch, resized = transform.output
        seen = batch.tensors
        expert_images = None
        if self._expert_scale is not None:
            factor, shift = (value.to(seen) for value in self._expert_scale)
            expert_images = seen * factor + shift
            for image, (height, width) in zip(expert_images, batch.image_sizes, strict=True):
                image[:, height:] = 0  # padding is 0 after normalisation
                image[:, :, width:] = 0
        task = torch.stack([loss.detach().sum() for loss in losses.values()]).sum()
        boxes = [target["boxes"] for target in resized]
        maps = None
        if self._names is not None:
            found = find_maps("backbone", backbone.output)
            maps = {name: found[name] for name in self._names}
        keys = None if self._keys is None else self._keys(targets or ())
        added = self.distiller(seen, boxes, maps, task_loss=task, expert_images=expert_images, keys=keys)
        return {**losses, "loss_distill": added}


def _part(model: nn.Module, name: str) -> nn.Module:
    part = getattr(model, name, None)
    if not isinstance(part, nn.Module):
        raise TypeError(f"model: expected a detector of torchvision with a {name}, got {type(model).__name__}")
    return part


def _take(backbone: nn.Module, images: Tensor, *, names: dict[str, str]) -> dict[str, Tensor]:
    maps = find_maps("expert's backbone", backbone(images))
    return {ours: maps[theirs] for ours, theirs in names.items()}


def _levels(
    detector: nn.Module | None, backbone: nn.Module, size: Sequence[int], device: torch.device
) -> dict[float, tuple[str, int]]:
    """Name and channels of a backbone's maps by their stride; of several with one stride, the deepest."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    with torch.no_grad():
        maps = find_maps("backbone", backbone(torch.zeros(1, 3, *size, device=device, dtype=dtype)))
    for module, mode in modes.items():
        module.training = mode
    # SSD's coarsest maps come from convolutions without padding; its default boxes say where their cells lie.
    strides = getattr(getattr(detector, "anchor_generator", None), "steps", None)
    pixels = (int(size[0]), int(size[1]))
    if not strides:
        try:
            strides = find_strides("strides", maps, pixels)  # together, as a map of 2 cells fits several
        except ValueError:  # several levels have one stride
            strides = [find_strides("strides", {name: feature}, pixels)[0] for name, feature in maps.items()]
    found = zip(strides, maps.items(), strict=True)
    return {float(stride): (name, feature.shape[1]) for stride, (name, feature) in found}


def _change_of_scale(ours: Any, theirs: Any) -> tuple[Tensor, Tensor] | None:
    """Factor and shift, ``[3, 1, 1]``, that bring the apprentice's normalisation to the expert's; None if equal."""
    mean, std, other_mean, other_std = (
        torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
        for values in (ours.image_mean, ours.image_std, theirs.image_mean, theirs.image_std)
    )
    if torch.equal(mean, other_mean) and torch.equal(std, other_std):
        return None
    return std / other_std, (mean - other_mean) / other_std
