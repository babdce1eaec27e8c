"""Distillation in Lightning: one callback, for automatic and manual optimisation.

callback = DistillCallback(expert, apprentice="detector", apprentice_features="backbone", weight="auto:10")
Trainer(callbacks=[callback]).fit(model, data)
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rakd.distill.checks import find_resizing
from rakd.distill.distiller import Distiller
from rakd.extras import require

Callback_: Any = require("lightning.pytorch", "lightning").Callback

_REPLACED = ("training_step", "manual_backward")


def images_and_boxes(batch: Any) -> tuple[Any, Any]:
    """Read a batch of ``(images, targets)``, ``targets`` being dicts with ``boxes`` per image, or the boxes.

    Raises:
        TypeError: It is another batch.
    """
    if not (isinstance(batch, (list, tuple)) and len(batch) >= 2):
        raise TypeError(
            f"batch: expected batches (images, targets), got a {type(batch).__name__}; give batch=, a function that "
            "takes (images, boxes) from yours"
        )
    images, targets = batch[0], batch[1]
    if isinstance(targets, (list, tuple)) and targets and isinstance(targets[0], dict):
        return images, [target["boxes"] for target in targets]
    return images, targets


class _Steps:
    """Stands before a module's ``training_step`` and ``manual_backward``, once for all callbacks of a fit."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.callbacks: list[DistillCallback] = []
        self.waiting: Any = None  # the batch of a step to which nothing was added yet
        self.stepped = self.added = False  # with manual optimisation: whether a step was done, and had the loss
        self.before = {name: vars(module)[name] for name in _REPLACED if name in vars(module)}
        step, backward = module.training_step, module.manual_backward

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.waiting = args[0] if args else kwargs["batch"]
            result = step(*args, **kwargs)
            if module.automatic_optimization and result is not None:
                return {**result, "loss": self._add(result["loss"])} if isinstance(result, dict) else self._add(result)
            self.stepped, self.added = True, self.added or self.waiting is None
            self.waiting = None
            return result

        @functools.wraps(backward)
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            backward(loss if self.waiting is None else self._add(loss), *args, **kwargs)

        training_step.steps = self  # type: ignore[attr-defined]
        module.training_step, module.manual_backward = training_step, manual_backward

    def _add(self, loss: Tensor) -> Any:
        batch, self.waiting = self.waiting, None
        added: Any = sum(callback._distill(batch, loss.detach()) for callback in self.callbacks)
        self.module.log("distill_loss", added.detach(), prog_bar=True)
        return loss + added.to(loss.dtype)


class DistillCallback(Callback_):  # type: ignore[misc]
    """Adds the distillation loss to what ``training_step`` returns, or to the first ``manual_backward`` in it.

    The loss is logged as ``distill_loss``; of several callbacks their sum. Adapters join the first optimizer; they and
    the measured scales are the callback's state, which Lightning saves and loads: the module's own ``state_dict`` holds
    nothing of them.

    Args:
        expert: See `rakd.distill.distiller.Distiller`.
        weight: Same.
        method: Same.
        apprentice: Name of the learning network in the LightningModule; "": the module itself.
        batch: Gives (images, boxes) of a training batch, as the apprentice's backbone saw them; with ``cache``
            (images, boxes, keys). It is called after ``training_step``. None: `images_and_boxes`, which is refused
            where a detector of torchvision resizes images inside.
        options: Of the ``Distiller``; ``apprentice_features`` names modules in the apprentice, "": its own output.
    """

    def __init__(
        self,
        expert: Any,
        weight: float | str | None = None,
        *,
        method: str | nn.Module = "rakd",
        apprentice: str = "",
        batch: Callable[[Any], tuple[Any, ...]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.distiller: Distiller | None = None
        self._apprentice = apprentice
        self._batch = batch or images_and_boxes
        self._reads_batch = batch is None
        self._settings = {"expert": expert, "weight": weight, "method": method, "apprentice_features": "", **options}
        self._steps: _Steps | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Hook the apprentice, and stand before the module's training step.

        Raises:
            ValueError: The apprentice's detector resizes images, and nothing says what its backbone saw.
        """
        if stage != "fit":
            return
        network = pl_module.get_submodule(self._apprentice)
        if self.distiller is None:
            self.distiller = Distiller(apprentice=network, **self._settings)
        else:
            self.distiller.attach(expert=self._settings["expert"], apprentice=network)
        if self._reads_batch:
            self._refuse_resizing(pl_module, network)
        self._steps = getattr(vars(pl_module).get("training_step"), "steps", None) or _Steps(pl_module)
        self._steps.callbacks.append(self)

    def _refuse_resizing(self, pl_module: nn.Module, network: nn.Module) -> None:
        """Refuse a detector of torchvision around the modules whose maps are taken."""
        assert self.distiller is not None
        hooks = self.distiller._hooks
        place = find_resizing(pl_module, [network] if hooks is None else hooks.modules)
        if place is not None:
            self.distiller.close()
            raise ValueError(
                f"batch: expected a function that gives the images and boxes that the backbone saw, as {place} resizes "
                "and pads them; or put rakd.integrations.torchvision.DistilledDetector into the module, which needs no "
                "callback"
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell of a manual optimisation that goes past the loss.

        Raises:
            RuntimeError: No step has called ``manual_backward``.
        """
        steps = self._steps
        if steps and not pl_module.automatic_optimization and steps.stepped and not steps.added:
            raise RuntimeError(
                "training_step: expected self.manual_backward(loss), to which the distillation loss is added, but no "
                "step so far called it"
            )

    def _distill(self, batch: Any, task_loss: Tensor) -> Any:
        """Compute the loss of a batch."""
        assert self.distiller is not None
        images, boxes, *keys = self._batch(batch)
        return self.distiller(images, boxes, task_loss=task_loss, keys=keys[0] if keys else None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Have the first optimizer train the adapters, before its state is loaded."""
        assert self.distiller is not None
        self.distiller.to(pl_module.device)
        self.distiller.train()
        self.distiller.add_to(trainer.optimizers[0])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        if self._steps is not None:
            for name in _REPLACED:
                vars(pl_module).pop(name, None)
            vars(pl_module).update(self._steps.before)
            self._steps = None
        if self.distiller is not None:
            self.distiller.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was: Lightning does not tear down after an error or an interruption."""
        self.teardown(trainer, pl_module, "fit")

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints: callbacks of other methods or maps have others."""
        # Functions by their name: their text holds an address, and a resumed run would not find its state.
        named = {"apprentice": self._apprentice}
        for name in ("method", "apprentice_features"):
            value = self._settings[name]
            named[name] = getattr(value, "__qualname__", type(value).__name__) if callable(value) else str(value)
        key: str = self._generate_state_key(**named)
        return key

    def state_dict(self) -> dict[str, Any]:
        """Adapters and measured scales."""
        return {} if self.distiller is None else {"distiller": dict(self.distiller.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up `state_dict`."""
        if self.distiller is not None and "distiller" in state_dict:
            self.distiller.load_state_dict(state_dict["distiller"])
