"""Adapters in an optimizer that exists already, and a warning where they are in none."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def add_parameters(optimizer: Any, parameters: Sequence[nn.Parameter], group: int = 0) -> None:
    """Put parameters into a group that the optimizer has.

    A new group would break schedulers that exist already: they keep one rate per group.

    Args:
        optimizer: A torch optimizer, or a wrapper with ``param_groups``.
        parameters: To be added, unless they are in it already.
        group: Index of the group whose settings they take.

    Raises:
        TypeError: This is no optimizer.
        ValueError: It has no such group.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not groups:
        raise TypeError(f"optimizer: expected an optimizer with param_groups, got {type(optimizer).__name__}")
    if not -len(groups) <= group < len(groups):
        raise ValueError(f"group: expected one of the optimizer's {len(groups)} groups, got {group}")
    there = {id(parameter) for each in groups for parameter in each["params"]}
    groups[group]["params"].extend(parameter for parameter in parameters if id(parameter) not in there)


class TrainingWatch:
    """Warns once where parameters have not changed over many training steps: no optimizer has them."""

    STEPS = 512  # more than anyone accumulates gradients over

    def __init__(self) -> None:
        self._steps = 0
        self._before: list[Tensor] = []

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Count a training step."""
        if self._steps >= self.STEPS or not parameters:
            return
        if len(parameters) != len(self._before):
            # Values, since fused optimizers do not raise version counters.
            self._before, self._steps = [parameter.detach().clone() for parameter in parameters], 0
        self._steps += 1
        if self._steps < self.STEPS:
            return
        pairs = zip(parameters, self._before, strict=True)
        same = all(torch.equal(now, before.to(now)) for now, before in pairs)
        self._before = []
        if same:
            warnings.warn(
                f"the distiller's {len(parameters)} parameters (adapters) did not change in {self.STEPS} steps: give "
                "distiller.parameters() to the optimizer, or call distiller.add_to(optimizer)",
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Start anew in copies."""
        return {"_steps": 0, "_before": []}
