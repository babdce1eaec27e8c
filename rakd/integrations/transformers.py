"""Distillation in transformers' ``Trainer``: RT-DETR, RT-DETRv2, D-FINE, Deformable DETR and DETR.

class DistillTrainer(DistillMixin, Trainer): ...
DistillTrainer(model=model, expert=expert, distill={"weight": "auto:10"}, args=args, ...).train()
"""

from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.distiller import Distiller
from rakd.distill.hooks import unwrap
from rakd.extras import require
from rakd.integrations import keep_in_optimizer

_transformers = require("transformers", "transformers")


def decoder_maps(model: nn.Module) -> list[str]:
    """Name the modules whose outputs are the maps that a detector's encoder or decoder is given.

    The hybrid encoder of the RT-DETR family gives the maps that its decoder sees (strides 8, 16, 32); Deformable DETR
    projects its backbone's maps, and adds a coarser one; DETR projects the last.

    Args:
        model: A detector of transformers, with or without its heads.

    Raises:
        TypeError: It is built otherwise; give ``features`` and ``apprentice_features``.
    """
    base: Any = getattr(model, "model", model)
    prefix = "" if base is model else "model."
    if hasattr(base, "encoder_input_proj") and hasattr(base, "encoder"):
        return [f"{prefix}encoder"]
    if isinstance(getattr(base, "input_proj", None), nn.ModuleList):
        return [f"{prefix}input_proj.{level}" for level in range(len(base.input_proj))]
    if isinstance(getattr(base, "input_projection", None), nn.Module):
        return [f"{prefix}input_projection"]
    raise TypeError(
        f"features: could not find the feature maps of {type(model).__name__}; name the modules that give them in "
        "distill={'features': ..., 'apprentice_features': ...}"
    )


def _of_padded_images(boxes: list[Tensor], inputs: dict[str, Any]) -> list[Tensor]:
    """Boxes as shares of ``pixel_values``; given they may be of the images in them, where only those were padded."""
    mask = inputs.get("pixel_mask")
    if mask is None or bool(mask.all()):
        return boxes
    whole, placed = tuple(mask.shape[1:]), []
    valid = torch.stack([mask.amax(2).sum(1), mask.amax(1).sum(1)], dim=1).tolist()  # images are at the top left
    for i, (own, (height, width)) in enumerate(zip(boxes, valid, strict=True)):
        size = inputs["labels"][i].get("size")
        size = None if size is None else tuple(int(side) for side in size)
        if (height, width) != whole and size not in (whole, (height, width)):
            raise ValueError(
                f"labels[{i}]['size']: expected the height and width that boxes are shares of, those of pixel_values, "
                f"{whole}, or of the image in it by pixel_mask, {(height, width)}, got {size}"
            )
        if size is not None and size != whole:
            share = own.new_tensor([width / whole[1], height / whole[0]])
            own = own * torch.cat([share, share])
        placed.append(own)
    return placed


class DistillMixin:
    """Adds distillation to a ``Trainer``; stands before it among the bases.

    Labels are read as transformers' processors make them: boxes (cx, cy, w, h), normalised by the label's ``size``.
    That is the size of ``pixel_values``, or where only the images were padded (``pixel_mask``), of the image in it. The
    loss is added to the model's own, logged as ``distill_loss``, and left out of evaluation. Saved models hold nothing
    of it; adapters are in ``optimizer.pt`` of the checkpoints, from which ``resume_from_checkpoint`` goes on.

    Args:
        args: Of the ``Trainer``, by position.
        expert: A detector of transformers, or anything that `rakd.distill.distiller.Distiller` takes, given
            ``pixel_values``. None: train without distillation.
        distill: Options of the ``Distiller``, such as ``weight``, ``method`` or ``normalize``. With ``cache``, ``keys``
            is a function that gives each image's key from a batch; only sensible where images repeat.
        kwargs: Of the ``Trainer``.
    """

    distiller: Distiller | None = None
    model: Any
    optimizer: Any
    args: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: bool
    accelerator: Any

    def __init__(self, *args: Any, expert: Any = None, distill: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._expert = expert
        self._distill = dict(distill or {})
        self._distill_keys = self._distill.pop("keys", None)
        self._distill_sum: Tensor | float = 0.0
        self._distill_count = 0
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer, and have it train the adapters and carry the distiller's state."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._expert is None or (self.distiller is not None and self.distiller.apprentice is unwrap(self.model)):
            return optimizer
        if getattr(self, "is_deepspeed_enabled", False) or getattr(self, "is_fsdp_enabled", False):
            raise ValueError("args: expected neither DeepSpeed nor FSDP with distillation, which split the features")
        if self.args.n_gpu > 1:
            raise ValueError(
                "args: expected one process per GPU with distillation, got several GPUs in one: start with torchrun, "
                "or make one visible (CUDA_VISIBLE_DEVICES=0)"
            )
        settings = {"box_format": "cxcywh", "normalized": True, **self._distill}
        if "apprentice_features" not in settings:
            settings["apprentice_features"] = decoder_maps(unwrap(self.model))
        if "features" not in settings and isinstance(self._expert, _transformers.PreTrainedModel):
            settings["features"] = decoder_maps(self._expert)
        self.distiller = Distiller(self._expert, apprentice=unwrap(self.model), **settings)
        limit = self.args.max_grad_norm or None  # the Trainer clips the model's gradients alone
        keep_in_optimizer(self.distiller, getattr(self.optimizer, "optimizer", self.optimizer), limit=limit)
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Add the distillation loss to the model's own in training."""
        if self.distiller is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if all(parameter.grad is None for parameter in self.model.parameters()):
            self.distiller.zero_grad()  # the Trainer clears the model's gradients, not the optimizer's
        boxes = [label["boxes"] for label in inputs["labels"]]
        if not {"box_format", "normalized"} & self._distill.keys():
            boxes = _of_padded_images(boxes, inputs)
        # A copy, since a Trainer with a loss function of its own takes the labels out.
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, **kwargs)  # type: ignore[misc]
        keys = None if self._distill_keys is None else self._distill_keys(inputs)
        # A Trainer divides the sum by the batches that are accumulated, unless the loss came divided.
        divided = self._is_divided(kwargs.get("num_items_in_batch"))
        parts = getattr(self, "current_gradient_accumulation_steps", 1) if divided else 1  # not in all versions
        with self.accelerator.autocast():  # on a GPU a Trainer has it around the model's forward alone
            added = self.distiller(inputs["pixel_values"], boxes, task_loss=parts * loss.detach(), keys=keys)
        self._distill_sum, self._distill_count = self._distill_sum + added.detach().float(), self._distill_count + 1
        total = loss + (added / parts).to(loss.dtype)
        return (total, outputs) if return_outputs else total

    def _is_divided(self, items: Any) -> bool:
        """Whether the model's own loss is over all accumulated batches already, as the Trainer finds it out."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        return self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and items is not None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with hooks in the model for as long as that takes."""
        if self.distiller is not None:
            self.distiller.attach(apprentice=unwrap(self.model))
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self.distiller is not None:
                self.distiller.close()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean distillation loss since the last time beside the loss."""
        if "loss" in logs and self._distill_count:
            logs = {**logs, "distill_loss": float(self._distill_sum / self._distill_count)}
            self._distill_sum, self._distill_count = 0.0, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
