"""Finds a loss that is not finite, and the level it comes from, without waiting for a GPU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class FiniteCheck:
    """Looks at each loss: at once on the CPU; on other devices when it has arrived, a step or so later."""

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._event: Any = None

    def __call__(self, loss: Tensor, apprentice: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> None:
        """Note the loss of a step and look at an earlier one.

        Raises:
            FloatingPointError: A loss is not finite; names the level.
        """
        if loss.device.type == "cpu":
            if not bool(loss.detach().isfinite()):
                raise FloatingPointError(f"the distillation loss is not finite: {blame(apprentice, expert)}")
            return
        if loss.device.type == "cuda":
            with torch.cuda.device(loss.device):  # whose stream the copy is in, and so must be the event
                self._look_later(loss, apprentice, expert)

    def _look_later(self, loss: Tensor, apprentice: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        if self._event is not None:
            if not self._event.query():
                return
            if self._flag is not None and not bool(self._flag):
                self._event = None
                raise FloatingPointError(
                    f"the distillation loss of an earlier step is not finite; now: {blame(apprentice, expert)}"
                )
        if self._flag is None:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._flag.copy_(loss.detach().isfinite(), non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def __getstate__(self) -> dict[str, Any]:
        """Start anew in copies."""
        return {"_flag": None, "_event": None}


def blame(apprentice: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> str:
    """Say which maps hold values that are not finite, or which is largest."""
    told, largest = [], []
    for side, maps in (("expert", expert), ("apprentice", apprentice)):
        for level, feature in maps.items():
            wrong = int((~feature.detach().isfinite()).sum())
            if wrong:
                told.append(f"{side}'s map {level!r} has {wrong} of {feature.numel()} values that are NaN or infinite")
            elif feature.numel():
                largest.append((float(feature.detach().abs().max()), side, level))
    if told:
        return "; ".join(told)
    if not largest:
        return "the maps hold no values, as of a batch without images"
    value, side, level = max(largest)
    return f"all maps are finite, the largest value is {value:.3g} in the {side}'s map {level!r}"
