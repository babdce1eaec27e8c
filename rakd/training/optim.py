"""The optimiser and the learning rate of each step."""

from math import cos, pi

import torch
from torch import nn

from rakd.training.settings import TrainSettings

MOMENTUM = 0.9
"""Of SGD."""


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make the optimiser of all parameters that want a gradient.

    Weight decay pulls on parameters with two or more dimensions only: scales and shifts of norms, and biases,
    have one.

    Raises:
        ValueError: No parameter wants a gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model must have a parameter with requires_grad, it has none")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    warm = min(1.0, (step + 1) / (settings.warm_up + 1))
    if settings.schedule == "cosine":
        left = 0.5 * (1.0 + cos(pi * step / settings.steps))
    else:
        left = 0.1 ** sum(step >= round(milestone * settings.steps) for milestone in settings.milestones)
    return settings.learning_rate * warm * left
