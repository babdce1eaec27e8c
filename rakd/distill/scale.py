"""Scales: of the expert's maps, of the loss (the expert's energy), and a weight from a share of the task loss.

All live on the loss's device and are not waited for, but in the first steps. Their values are plain numbers in the
distiller's state: a float written as text comes back to the bit.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rakd.distill import auto_share
from rakd.distributed import all_reduce_mean


def _exact_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _exact(value: Tensor) -> Tensor:
    return value.detach().to(_exact_dtype(value.device))


def number_on(device: torch.device, value: Tensor | float) -> Tensor:
    """Bring a number to a device without waiting for it, in float64 where the device has it."""
    dtype = _exact_dtype(device)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    return value.to(device, dtype)


def mean_square(values: Tensor) -> Tensor:
    """Mean of the squares, in float64 where the device has it; no gradient."""
    norm: Tensor = torch.linalg.vector_norm(values.detach(), dtype=_exact_dtype(values.device))
    return norm.square() / values.numel()


class UnitScale:
    """Factors that bring each map to a root mean square of 1: measured over 20 calls, then fixed.

    Fixed, since an apprentice would follow a target that moves. Maps that are all zeros, or not finite, do not count;
    a level without any other keeps a factor of 1.
    """

    CALLS = 20

    def __init__(self) -> None:
        self.calls = 0
        self.squares = torch.zeros(())
        self.counts = torch.zeros(())
        self.before: UnitScale | None = None  # of a validation before training, which ends with it

    @property
    def known(self) -> bool:
        """Whether maps were measured."""
        return self.calls > 0 or self.before is not None

    def update(self, maps: Sequence[Tensor], *, shared: bool = True) -> None:
        """Count a call with its maps.

        Args:
            maps: One a level.
            shared: With those of all processes, which must then all call this.

        Raises:
            ValueError: There are more or fewer levels than before.
        """
        self._check(len(maps))
        squares = torch.stack([mean_square(m) for m in maps])
        squares = all_reduce_mean(squares) if shared else squares
        there = squares.isfinite() & (squares > 0)
        self.counts = there + self.counts.to(squares)
        self.squares = torch.where(there, squares, 0.0) + self.squares.to(squares)
        self.calls += 1

    def look(self, maps: Sequence[Tensor], *, learns: bool) -> None:
        """Measure in training, and at the first call of a validation before it, which waits for no other process."""
        if learns and self.calls < self.CALLS:
            self.update(maps)
        elif not self.known:
            self.before = UnitScale()
            self.before.update(maps, shared=False)

    def factors(self, maps: Sequence[Tensor]) -> Tensor:
        """One factor for each map, on the device of the first.

        Raises:
            ValueError: There are more or fewer levels than were measured.
        """
        if not self.calls and self.before is not None:
            return self.before.factors(maps)
        self._check(len(maps))
        squares, counts = (number_on(maps[0].device, value) for value in (self.squares, self.counts))
        return torch.where(counts > 0, (counts / squares).sqrt(), 1.0)

    def _check(self, levels: int) -> None:
        if self.calls and len(self.squares) != levels:
            raise ValueError(f"expert_features: expected {len(self.squares)} maps, as at the first step, got {levels}")

    def state(self) -> list[Any]:
        """Numbers to save."""
        return [self.calls, self.squares.tolist(), self.counts.tolist()]

    def load(self, state: list[Any]) -> None:
        """Take up `state`."""
        self.calls, squares, counts = state
        self.squares, self.counts = (torch.tensor(value, dtype=torch.float64) for value in (squares, counts))


class RunningEnergy:
    """The expert's energy: the method's loss of an apprentice of zeros, as a running mean.

    Measuring costs a third of the loss (few large maps) to as much as it (many boxes), so it is done at calls 1, 2, 4,
    8, 16 and then at every 16th: 2 to 7 % of the loss. Features of a frozen expert change little in their mean from
    batch to batch. The value is the mean over the last 64 or so measurements, so that the divisor neither jumps nor
    follows a single batch. Batches without boxes do not count: until one had boxes, each call measures.
    """

    EVERY, SPAN = 16, 64

    def __init__(self) -> None:
        self.calls = 0
        self.count: Tensor | float = 0.0
        self.value: Tensor | float = 0.0
        self.measured = False
        self.before: RunningEnergy | None = None  # of a validation before training, which ends with it

    @property
    def known(self) -> bool:
        """Whether there was energy."""
        return self.measured or (self.before is not None and self.before.measured)

    @property
    def due(self) -> bool:
        """Whether this call measures."""
        number = self.calls + 1
        return not self.measured or number % self.EVERY == 0 or (number < self.EVERY and number & (number - 1) == 0)

    def update(self, measure: Callable[[], Tensor], *, shared: bool = True) -> None:
        """Count a call, and measure if it is due. Waits for the device until there was energy once.

        Args:
            measure: Gives the energy.
            shared: With that of all processes, which must then all call this.
        """
        if self.due:
            energy = _exact(measure())
            energy = all_reduce_mean(energy) if shared else energy
            there = energy.isfinite() & (energy > 0)
            count = number_on(energy.device, self.count) + there
            value = number_on(energy.device, self.value)
            step = (energy - value) / count.clamp(1, self.SPAN)
            self.value = torch.where(there, value + step, value)
            self.count = count
            self.measured = self.measured or bool(there)
        self.calls += 1

    def look(self, measure: Callable[[], Tensor], *, learns: bool) -> None:
        """As `UnitScale.look`."""
        if learns:
            self.update(measure)
        elif not self.known:
            self.before = RunningEnergy()
            self.before.update(measure, shared=False)

    def factor(self, device: torch.device) -> Tensor:
        """Factor of the loss, a scalar; 1 as long as there was no energy."""
        if not self.measured and self.before is not None:
            return self.before.factor(device)
        value = number_on(device, self.value)
        return torch.where(value > 0, 1 / value, torch.ones_like(value))

    def state(self) -> list[float]:
        """Numbers to save."""
        return [self.calls, float(self.count), float(self.value)]

    def load(self, state: list[float]) -> None:
        """Take up `state`."""
        self.calls, self.count, self.value = int(state[0]), state[1], state[2]
        self.measured = self.value > 0


_EMPTY = 100  # steps without a distillation loss after which a warning tells


class TaskShare:
    """A weight that makes the loss a share of the task loss: measured over the first calls, then fixed.

    Args:
        share: Of the task loss.
    """

    CALLS = 20  # to measure over, as the ratio of sums

    def __init__(self, share: float) -> None:
        self.share = share
        self.calls = 0
        self._empty = 0  # calls whose loss was 0
        self.task: Tensor | float = 0.0
        self.loss: Tensor | float = 0.0

    @property
    def known(self) -> bool:
        """Whether there was a loss to compare with."""
        return self.calls > 0

    @property
    def measuring(self) -> bool:
        """Whether the weight is not fixed yet."""
        return self.calls < self.CALLS

    def measures(self, task: Any, *, learns: bool) -> bool:
        """Whether a call with this task loss is to be counted; warns where none ever is."""
        if task is not None and not learns and not self.known and torch.is_grad_enabled():
            warnings.warn(
                f"weight: 'auto:{self.share:g}' is measured in training mode and 0 until then, and this distiller is "
                "in evaluation mode: call its train()",
                stacklevel=6,  # the caller of the distiller
            )
        return learns and self.measuring

    def update(self, task: Any, loss: Tensor) -> None:
        """Count a call with its task loss and its unweighted distillation loss. Waits for the device.

        A call does not count whose loss is not finite, as float16 has now and then, or whose distillation loss is 0, as
        without boxes.

        Raises:
            TypeError: The task loss is no number.
            ValueError: It is missing, or several numbers. It is negative: a share of it would be a weight that drives
                the apprentice away from the expert, and a share of a loss that passes through 0 may be any weight. Or
                it is always 0.
        """
        if task is None:
            raise ValueError("task_loss: expected the apprentice's own loss, of which weight='auto:...' is a share")
        if not hasattr(task, "__float__"):
            raise TypeError(f"task_loss: expected one number, the sum of terms, got a {type(task).__name__}")
        task = torch.as_tensor(task, dtype=None if isinstance(task, Tensor) else torch.float64)
        if task.numel() != 1:
            raise ValueError(f"task_loss: expected one number, got shape {list(task.shape)}")
        task = task.reshape(())
        pair = all_reduce_mean(torch.stack([_exact(task).to(loss.device), _exact(loss)]))
        value, other = pair.tolist()
        if not math.isfinite(value + other):
            return
        if value < 0:
            raise ValueError(
                f"weight: 'auto:{self.share:g}' is a share of the task loss, expected one that is never negative, got "
                f"{value:g}; where it has terms such as log-likelihoods, give a number"
            )
        if other < 0:
            raise ValueError(
                f"weight: 'auto:{self.share:g}' needs a distillation loss that is never negative, got {other:g}: give "
                "a number"
            )
        if other == 0:
            self._empty += 1
            if self._empty == _EMPTY and not self.calls:
                warnings.warn(
                    f"the distillation loss was 0 in all of the first {_EMPTY} steps, and 'auto:{self.share:g}' has no "
                    "weight yet: do the batches have boxes?",
                    stacklevel=5,
                )
            return
        self.task = number_on(pair.device, self.task) + pair[0]
        self.loss = number_on(pair.device, self.loss) + pair[1]
        self.calls += 1
        if not self.measuring and not float(self.task):
            raise ValueError(
                f"task_loss: expected the apprentice's own loss, of which 'auto:{self.share:g}' is a share, got 0 in "
                f"{self.CALLS} steps"
            )

    def factor(self, device: torch.device) -> Tensor:
        """The weight, a scalar; 0 as long as the distillation loss was."""
        task, loss = number_on(device, self.task), number_on(device, self.loss)
        return torch.where(loss > 0, self.share * task / loss, torch.zeros_like(loss))

    def state(self) -> list[float]:
        """Numbers to save."""
        return [self.calls, float(self.task), float(self.loss)]

    def load(self, state: list[float]) -> None:
        """Take up `state`."""
        self.calls, self.task, self.loss = int(state[0]), state[1], state[2]


def parse_weight(weight: Any, default: float) -> float | TaskShare:
    """Read the argument ``weight``: a number, None (the default) or ``"auto:SHARE"``.

    Raises:
        TypeError: This is neither a number nor text.
        ValueError: It is negative or not finite, or another text.
    """
    if weight is None:
        return default
    if isinstance(weight, str):
        return TaskShare(auto_share(weight))
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight: expected a number or 'auto:SHARE', got {type(weight).__name__}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight: expected a finite number of 0 or more, got {weight}")
    return float(weight)
