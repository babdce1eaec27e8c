"""Batches for the trainer: the frames of each step, loaded here or by worker processes."""

from collections.abc import Iterator
from functools import partial
from traceback import clear_frames
from typing import TypeVar

import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

from rakd.data.kitti import Batch, KittiDataset, Sample, collate
from rakd.training.order import SampleIndex, StepSampler

T = TypeVar("T")


class _ByIndex(Dataset[Sample]):
    """A data set indexed by frame and epoch, since one batch may hold frames of two epochs."""

    def __init__(self, dataset: KittiDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: SampleIndex) -> Sample:
        return self.dataset.load(draw.frame, draw.epoch)


def make_loader(
    dataset: KittiDataset, sampler: StepSampler, *, image_size: tuple[int, int] | None, workers: int, pin: bool
) -> DataLoader[Batch]:
    """Make the loader of one process's batches.

    Args:
        dataset: The frames.
        sampler: Gives the frames of each batch.
        image_size: (width, height) that images are padded to; None: as `rakd.data.kitti.collate` sees fit.
        workers: Processes that load; 0: this one does.
        pin: Give batches in pinned memory.
    """
    return DataLoader(
        _ByIndex(dataset),  # type: ignore[arg-type]  # batches of SampleIndex make batches of Sample, which collate makes a Batch
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(collate, size=image_size, expert_size=dataset.expert_size),
        pin_memory=pin,
        worker_init_fn=_share_by_name if workers else None,
    )


def each_of(loader: DataLoader[T]) -> Iterator[T]:
    """Give a loader's batches; where a worker process fails, end the others at once.

    Left in the error's traceback the loader's iterator is found by the garbage collector, which closes its queues
    before it asks the workers to end: this process then waits five seconds for each of them.
    """
    try:
        yield from loader
    except Exception as error:
        clear_frames(error.__traceback__)
        raise


def _share_by_name(_worker: int) -> None:
    # A batch has a dozen small tensors an image. Sharing each by an open file descriptor, the default, exhausts the
    # usual limit of 1024 with a few workers.
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
