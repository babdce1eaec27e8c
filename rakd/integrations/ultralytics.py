"""Distillation in ultralytics' own trainer: YOLO and RT-DETR apprentices, any expert.

    from rakd.integrations.ultralytics import distill
    distill(YOLO("yolo11n.yaml"), expert=YOLO("yolo11s.pt"), weight="auto:10").train(data="data.yaml", epochs=100)

Ultralytics is AGPL-3.0 (or under a licence of its makers): using this module means using their package. This file holds
nothing of it; it subclasses the trainer of the installed package.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill.distiller import Distiller
from rakd.distill.hooks import unwrap
from rakd.extras import require
from rakd.integrations import keep_in_optimizer

_ultralytics = require("ultralytics", "ultralytics")

_LIMIT = 10.0  # norm that ultralytics clips the model's gradients at
_TASKS = ("detect", "segment", "pose")


def head_inputs(network: nn.Module) -> str:
    """Name the maps that a network's head is given: P3, P4 and P5 of a YOLO or RT-DETR.

    Args:
        network: The ``.model`` of a ``YOLO`` or ``RTDETR``.

    Raises:
        TypeError: This is no such network.
    """
    layers = getattr(network, "model", None)
    if not isinstance(layers, nn.Sequential) or not isinstance(getattr(layers[-1], "f", None), list):
        raise TypeError(f"expected a network of ultralytics with a detection head, got {type(network).__name__}")
    return f"input:model.{len(layers) - 1}"


def distill(
    model: Any,
    expert: Any,
    weight: float | str | None = None,
    *,
    method: str | nn.Module = "rakd",
    keys: Callable[[dict[str, Any]], Sequence[Any]] | None = None,
    **options: Any,
) -> "DistilledTraining":
    """Have a model train with distillation.

    The loss is added to the trainer's own (times the batch size, where the trainer does so to its own) and logged as
    ``distill_loss``. Checkpoints hold the apprentice as ever; adapters are kept with the optimizer's state, and gone
    with it in the final files. To resume, call this again with the same arguments: ``distill(YOLO("last.pt"),
    ...).train(resume=True)``.

    Args:
        model: ``YOLO`` or ``RTDETR``: the apprentice.
        expert: ``YOLO`` or ``RTDETR`` (the inputs of its head are taken), or anything that
            `rakd.distill.distiller.Distiller` takes, with ``features``; it is given the trainer's images, RGB of 0..1.
        weight: Same.
        method: Same.
        keys: With ``cache``: gives each image's key from a batch. Only sensible where images repeat, that is with
            mosaic, flips and the other random augmentation switched off.
        options: Of the ``Distiller``, such as ``normalize=True`` or ``cache``.

    Returns:
        The model with another ``train``; all else is passed on to it.

    Raises:
        ValueError: The model's task has no boxes to distil in.
        TypeError: This is no model of ultralytics, or an option is the trainer's to set.
    """
    if not hasattr(model, "task_map"):
        raise TypeError(f"model: expected a YOLO or RTDETR of ultralytics, got {type(model).__name__}")
    if model.task not in _TASKS:
        raise ValueError(f"model: expected the task {', '.join(_TASKS)}, got {model.task!r}")
    for name in ("apprentice", "box_format", "normalized"):
        if name in options:
            raise TypeError(f"{name}: expected none, as network and boxes are the trainer's, got {options[name]!r}")
    if hasattr(expert, "task_map"):
        expert = expert.model
        options.setdefault("features", head_inputs(expert))
    settings = {"expert": expert, "weight": weight, "method": method, **options}
    return DistilledTraining(model, settings, keys)


class DistilledTraining:
    """A model whose ``train`` distils; see `distill`."""

    def __init__(self, model: Any, settings: dict[str, Any], keys: Any) -> None:
        self.model = model
        self.settings = settings
        self.keys = keys

    def train(self, trainer: Any = None, **arguments: Any) -> Any:
        """Train as ``model.train`` does.

        Args:
            trainer: Trainer class to build on; None: the task's.
            arguments: Of ``model.train``.

        Returns:
            The result of ``model.train``.
        """
        base = trainer or self.model.task_map[self.model.task]["trainer"]
        # A class of its own, which ultralytics can pickle with everything in it for the processes of a multi-GPU run.
        members = {"distill_settings": self.settings, "distill_keys": staticmethod(self.keys) if self.keys else None}
        return self.model.train(trainer=type(f"Distilled{base.__name__}", (_Distilling, base), members), **arguments)

    def tune(self, *_: Any, **__: Any) -> None:
        """Refuse: ultralytics tunes in processes of its own, which would train without distillation.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("tune: ultralytics tunes without distillation; tune the apprentice alone, by its own")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Detect as ``model(...)`` does."""
        return self.model(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        """Pass all else on to the model."""
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


class _Distilling:
    """Mixin of a trainer class whose other base is a trainer of ultralytics."""

    distill_settings: dict[str, Any]
    distill_keys: Any
    distiller: Distiller
    args: Any
    model: Any
    optimizer: Any

    def resume_training(self, ckpt: Any) -> None:
        """Begin, between the optimizer's making and its loading; the EMA was copied before, without hooks."""
        if self.args.compile:
            raise ValueError("compile: expected False with distillation, since compiled networks hide their features")
        if getattr(self.args, "distill_model", None) is not None:
            raise ValueError(
                "distill_model: expected None; ultralytics' own distillation and this one exclude each other"
            )
        network = unwrap(self.model)
        settings = {"apprentice_features": head_inputs(network), **self.distill_settings}
        self.distiller = Distiller(apprentice=network, box_format="cxcywh", normalized=True, **settings)
        self.distiller.train()
        # Of MuSGD's groups of weights one is for class heads alone, at a higher rate.
        groups = self.optimizer.param_groups
        weights = [i for i, group in enumerate(groups) if group.get("param_group") == "weight"]
        group = min(weights, key=lambda i: groups[i]["lr"], default=0)
        keep_in_optimizer(self.distiller, self.optimizer, group, limit=_LIMIT)
        super().resume_training(ckpt)  # type: ignore[misc]

    def run_callbacks(self, event: str) -> None:
        """Add the loss while batches are trained on, so that validation, copies and checkpoints see none of it."""
        if event == "on_train_epoch_start":
            network: Any = unwrap(self.model)
            network.loss = partial(self._loss, network)
        elif event in ("on_train_epoch_end", "teardown") and isinstance(self.model, nn.Module):
            unwrap(self.model).__dict__.pop("loss", None)
        if event == "teardown" and hasattr(self, "distiller"):
            self.distiller.close()
        super().run_callbacks(event)  # type: ignore[misc]

    def _loss(self, network: Any, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, items = type(network).loss(network, batch, preds)
        if not network.training:
            return loss, items
        images = batch["img"]
        boxes = torch.cat([batch["batch_idx"].view(-1, 1), batch["bboxes"]], dim=1)
        keys = None if self.distill_keys is None else self.distill_keys(batch)
        # YOLO's losses come times the batch size; RT-DETR's do not.
        scale = 1 if hasattr(network.model[-1], "decoder") else len(images)
        added = self.distiller(images, boxes, task_loss=loss.detach().sum() / scale, keys=keys)
        loss = torch.cat([loss.reshape(-1), (scale * added).reshape(1).to(loss.dtype)])
        return loss, {**items, "distill_loss": added.detach()}
