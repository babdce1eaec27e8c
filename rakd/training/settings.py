"""Settings of a training run. Imports no torch, so that the command line can read them quickly."""

import warnings
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Literal

from rakd.errors import UserError

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["steps", "cosine"]
Precision = Literal["auto", "off", "bfloat16", "float16"]


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: Steps in all.
        batch_size: Frames a step, over all processes; a multiple of their number.
        learning_rate: The highest, after the warm-up.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        weight_decay: Of weights with two or more dimensions: neither norms nor biases.
        warm_up: Steps over which the learning rate rises linearly to its height.
        schedule: "steps": the rate falls to a tenth at each milestone. "cosine": it falls along a half cosine to 0.
        milestones: Shares of ``steps``, rising, each in 0..1 without the ends; read by the schedule "steps" only.
        clip: Gradients are scaled down to this norm over all parameters; None: they are taken as they are.
        amp: Autocast dtype of the model's forward; "float16" scales the loss as well. "auto": bfloat16 on CUDA, off
            on a CPU.
        workers: Processes that load frames for each training process; 0: it loads them itself.
        seed: Of the order of frames and of all draws within steps.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between rows of the log.
        validate_every: Steps between validations, where the trainer is given one; 0: none.

    Raises:
        ValueError: A value is out of range.
    """

    steps: int = 30_000
    batch_size: int = 8
    learning_rate: float = 0.02
    optimizer: Optimizer = "sgd"
    weight_decay: float = 1e-4
    warm_up: int = 500
    schedule: Schedule = "steps"
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    clip: float | None = 10.0
    amp: Precision = "auto"
    workers: int = 0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    validate_every: int = 0

    def __post_init__(self) -> None:
        for names, least in (
            (("steps", "batch_size", "checkpoint_every", "log_every"), 1),
            (("warm_up", "workers", "seed", "validate_every"), 0),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise UserError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.seed >= 2**63 - 1:
            raise UserError(f"seed must be under 2**63 - 1, got {self.seed}")
        if not (self.learning_rate > 0 and isfinite(self.learning_rate)):
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if not (self.weight_decay >= 0 and isfinite(self.weight_decay)):
            raise UserError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip must be positive or None, got {self.clip}")
        inner = (0.0, *self.milestones, 1.0)
        if not all(a < b for a, b in pairwise(inner)):
            raise UserError(f"milestones must rise and lie between 0 and 1, got {self.milestones}")
        for name, known in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("steps", "cosine")),
            ("amp", ("auto", "off", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def warn_of_warm_up(self) -> None:
        """Tell of a training that ends before the learning rate is at its height."""
        if self.warm_up >= self.steps:
            warnings.warn(
                f"warm_up: the learning rate rises over {self.warm_up} steps and the training has {self.steps}: it "
                "ends before its height",
                stacklevel=2,
            )
