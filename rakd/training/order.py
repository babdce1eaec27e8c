"""The order of frames, and the seeds of a step: pure functions of the run's seed and the position.

Nothing here has a state, so a resumed run goes on exactly where it stopped, and the number of processes changes
who works on a frame but not which frames make up a step.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

# What a derived seed is for; keeps the streams apart.
_ORDER, _IMAGE, _STEP = 1, 2, 3


class SampleIndex(NamedTuple):
    """A frame at one point of the training.

    Attributes:
        epoch: How many times the data set has been gone through before.
        frame: Its place in the data set.
    """

    epoch: int
    frame: int


class InfiniteShuffle:
    """The data set over and over, shuffled anew every epoch.

    Args:
        count: Frames in the data set.
        seed: >= 0.

    Raises:
        ValueError: ``count`` is not positive.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"count must be 1 or more, got {count}")
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._shuffled: Sequence[int] = ()

    def draw(self, position: int) -> SampleIndex:
        """The frame at a position, >= 0."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            rng = np.random.default_rng([_ORDER, self.seed, epoch])
            self._epoch, self._shuffled = epoch, rng.permutation(self.count).tolist()
        return SampleIndex(epoch, self._shuffled[place])

    def step(self, step: int, batch_size: int, batch_indices: range | None = None) -> list[SampleIndex]:
        """The frames of a step, or those at some indices of its batch."""
        batch_indices = range(batch_size) if batch_indices is None else batch_indices
        return [self.draw(step * batch_size + place) for place in batch_indices]


class StepSampler(Sampler[list[SampleIndex]]):
    """Batches of one process, step by step, for `torch.utils.data.DataLoader`'s ``batch_sampler``.

    Args:
        order: Of all frames.
        steps: The steps to do.
        batch_size: Frames a step over all processes.
        batch_indices: This process's indices in a step's batch.
    """

    def __init__(self, order: InfiniteShuffle, steps: range, batch_size: int, batch_indices: range) -> None:
        self.order = order
        self.steps = steps
        self.batch_size = batch_size
        self.batch_indices = batch_indices

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        return (self.order.step(step, self.batch_size, self.batch_indices) for step in self.steps)


def image_seeds(seed: int, step: int, batch_indices: range) -> list[int]:
    """One seed for each image of a step, whichever process works on it.

    Args:
        seed: The run's.
        step: From 0.
        batch_indices: Indices in the step's whole batch.

    Returns:
        Integers in 0..2⁶³-1, as `torch.Generator.manual_seed` takes them.
    """
    return [_derive(_IMAGE, seed, step, place) for place in batch_indices]


def process_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch's global generators in one step of one process."""
    return _derive(_STEP, seed, step, rank)


def _derive(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
