"""The KITTI data set as PyTorch samples and batches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rakd.data.augment import Augmentation, distort, zoom
from rakd.data.frames import Part, find_frames, read_image_size
from rakd.data.labels import Objects
from rakd.data.rules import DataRules
from rakd.data.targets import CLASSES, PackedTargets, Targets, make_targets
from rakd.errors import UserError
from rakd.geometry import Calibration

DIVISOR = 64
"""Width and height of padded images are multiples of it unless a size is given: the coarsest stride of a detector."""

_CACHE_BYTES = 1 << 30  # of images that a training keeps in memory


def cache_share(workers: int) -> int:
    """Bytes of images that each process of a training's loader may keep in memory: 1 GiB over all."""
    return _CACHE_BYTES // max(1, workers)


@dataclass(frozen=True, eq=False)
class Sample:
    """One frame, ready for a detector. Image, calibration, objects and targets belong together.

    Attributes:
        id: The frame's name, ``NNNNNN``.
        image: ``[3, height, width]`` float32 in 0..1, RGB.
        calibration: Camera of this (resized, perhaps mirrored) image.
        original_size: (width, height) of the image in the file.
        objects: All labels, in this image's pixels; None in ``testing``.
        targets: Objects to learn; None in ``testing``.
        mirrored: Whether augmentation mirrored it.
        expert_image: The same image in the height of an expert's images, where that is another.
    """

    id: str
    image: Tensor
    calibration: Calibration
    original_size: tuple[int, int]
    objects: Objects | None
    targets: Targets | None
    mirrored: bool = False
    expert_image: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples in one padded tensor.

    Attributes:
        images: ``[B, 3, height, width]`` float32; images stand at the top left, zeros fill the rest.
        sizes: (width, height) of each image without the padding.
        samples: What the batch is made of; their images are views of ``images``.
        packed: The samples' targets for a device; None where a sample has none.
        expert_images: The same images in the size of an expert's, padded too; None: the expert sees ``images``.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    samples: list[Sample]
    packed: PackedTargets | None
    expert_images: Tensor | None = None

    def targets(self, device: torch.device | str) -> list[Targets]:
        """The samples' targets on a device.

        Raises:
            UserError: A sample has none.
        """
        if self.packed is None:
            names = ", ".join(sample.id for sample in self.samples if sample.targets is None)
            raise UserError(f"frame {names} has no labels to learn from")
        return self.packed.unpack(device)

    def pin_memory(self) -> "Batch":
        """The same in pinned memory, from which a GPU copies faster and without a wait; loaders call it."""
        images = self.images.pin_memory()
        expert_images = None if self.expert_images is None else self.expert_images.pin_memory()
        samples = [
            replace(sample, image=image[:, :height, :width])
            for sample, image, (width, height) in zip(self.samples, images, self.sizes, strict=True)
        ]
        return Batch(images, self.sizes, samples, self.packed and self.packed.pin_memory(), expert_images)


class KittiDataset(Dataset[Sample]):
    """Frames of a KITTI folder.

    Augmentation of a frame depends on the seed, the epoch and the frame's index only: neither on the number of workers
    nor on the order of loading.

    Args:
        root: Folder that holds ``training`` and ``ImageSets``.
        split: List in ``ImageSets`` ("train", "val", ...); None: all frames.
        part: "training" or "testing".
        height: Height that images are resized to, keeping their proportions; None: as they are.
        augmentation: Random changes of images; None: none.
        seed: Seed of the augmentation, >= 0.
        cache_bytes: Images kept in memory, in every worker process of a loader: as they were read (1.4 MB for each of
            KITTI's), or resized where mirroring alone varies them. Those that do not fit are read again.
        rules: Which objects are learned, and how augmentation zooms; see `rakd.detector.base_config.BaseConfig.rules`.
        expert_size: (width, height) that an expert's images are padded to, where their height is another than
            ``height``: samples then bring both.

    Raises:
        MissingFileError: A folder, list or file is missing.
        UserError: The folder or list is empty or malformed.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        root: Path | str,
        split: str | None = None,
        *,
        part: Part = "training",
        height: int | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache_bytes: int = 0,
        rules: DataRules | None = None,
        expert_size: tuple[int, int] | None = None,
    ) -> None:
        if height is not None and height < 1:
            raise ValueError(f"height must be positive, got {height}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.frames = find_frames(Path(root), split, part)
        self.height = height
        self.expert_size = expert_size
        self.augmentation = augmentation
        self.seed = seed
        self.cache_bytes = cache_bytes
        self.rules = DataRules() if rules is None else rules
        varies = augmentation is not None and (augmentation.photometric > 0 or self.rules.zoom > 0)
        self._resize_first = height is not None and expert_size is None and not varies
        self._images: dict[tuple[int, bool], tuple[Image.Image, tuple[int, int]]] = {}
        self._image_bytes = 0
        # In shared memory, so that workers that live through epochs see it change.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.frames)

    def check_targets(self) -> None:
        """Make sure that there is something to learn, before a training does its steps without.

        Reads frames up to the first with a target.

        Raises:
            UserError: No frame has one; names the types of objects that there are.
        """
        types: Counter[str] = Counter()
        for frame in self.frames:
            objects = frame.read_labels()
            types.update(objects.types.tolist())
            if len(make_targets(objects, frame.read_calibration(), read_image_size(frame.image), rules=self.rules)):
                return
        found = ", ".join(f"{name} ({count})" for name, count in types.most_common()) or "none"
        raise UserError(
            f"{self.frames[0].image.parent.parent}: none of the {len(self.frames)} frames holds an object to learn "
            f"({', '.join(CLASSES[:-1])} or {CLASSES[-1]} with a 3D box, {self.rules.min_height:g} pixels high or "
            f"more, visible, its centre inside the image); the labels hold {found}"
        )

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is about to be loaded, so that augmentation differs from the last one's.

        Args:
            epoch: >= 0. Set it before iterating over the loader; workers see it.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        """Load, vary and resize one frame, as in the epoch that was set."""
        return self.load(index, int(self._epoch))

    def load(self, index: int, epoch: int) -> Sample:
        """Load, vary and resize one frame.

        Args:
            index: Of the frame.
            epoch: Augmentation depends on it besides the frame, >= 0; `set_epoch` is ignored here.
        """
        frame = self.frames[index]
        mirror = False
        if self.augmentation is not None:
            rng = np.random.default_rng([self.seed, epoch, index % len(self)])
            mirror = bool(rng.random() < self.augmentation.flip)
        image, original = self._image(index % len(self), mirror)
        calibration = frame.read_calibration()
        objects = None if frame.label is None else frame.read_labels()
        if mirror:
            calibration = calibration.flipped(original[0])
            objects = None if objects is None else objects.flipped(original[0])
        if self.augmentation is not None:
            image = distort(image, self.augmentation, rng)
            image, calibration, objects = zoom(image, calibration, objects, self.rules, rng)
        sample = make_sample(frame.id, image, calibration, objects, self.height, self.rules, original=original)
        expert_image = None if self.expert_size is None else _pixels(_resized(image, self.expert_size[1]))
        return replace(sample, mirrored=mirror, expert_image=expert_image)

    def _image(self, index: int, mirror: bool) -> tuple[Image.Image, tuple[int, int]]:
        """An image, mirrored or not, and its size in the file; resized already where nothing comes before that."""
        key = (index, mirror and self._resize_first)
        kept = self._images.get(key)
        if kept is None:
            image = Image.fromarray(self.frames[index].read_image())
            original = image.size
            if self._resize_first:
                image = _mirrored(image) if mirror else image
                image = _resized(image, self.height)
            kept = image, original
            size = 3 * image.width * image.height
            if self._image_bytes + size <= self.cache_bytes:
                # Nothing that follows changes an image in place, so that a kept one stays as it is.
                self._images[key] = kept
                self._image_bytes += size
        image, original = kept
        return _mirrored(image) if mirror and not self._resize_first else image, original


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _pixels(image: Image.Image) -> Tensor:
    """``[3, height, width]`` float32 in 0..1."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255).contiguous()


def _resized(image: Image.Image, height: int | None) -> Image.Image:
    if height is None:
        return image
    return image.resize((resized_width(image.size, height), height), Image.Resampling.BILINEAR)


def resized_width(size: tuple[int, int], height: int) -> int:
    """The width, 1 pixel or more, that an image of ``size``, (width, height), has when it is resized to a height."""
    return max(1, round(size[0] * height / size[1]))


def make_sample(
    name: str,
    image: Image.Image,
    calibration: Calibration,
    objects: Objects | None,
    height: int | None,
    rules: DataRules | None = None,
    *,
    original: tuple[int, int] | None = None,
) -> Sample:
    """Make a sample of an image and what is known of it.

    Args:
        name: Name of the frame.
        image: RGB.
        calibration: Camera of the image in its original size.
        objects: Labels, in pixels of that size; None: no targets.
        height: Height in pixels to resize to, keeping the proportions; None: as it is.
        rules: Which objects are learned; None: the default ones.
        original: The image's (width, height) before it was resized to ``height``; None: it is as it was.
    """
    if original is None:
        original = image.size
    scale_y = 1.0
    if height is not None:
        image = _resized(image, height)
        scale_x, scale_y = image.width / original[0], height / original[1]
        calibration = calibration.resized(scale_x, scale_y)
        objects = None if objects is None else objects.resized(scale_x, scale_y)
    targets = None
    if objects is not None:
        rules = DataRules() if rules is None else rules
        targets = make_targets(objects, calibration, image.size, scale=scale_y, rules=rules)
    return Sample(name, _pixels(image), calibration, original, objects, targets)


def collate(
    samples: Sequence[Sample],
    *,
    size: tuple[int, int] | None = None,
    expert_size: tuple[int, int] | None = None,
) -> Batch:
    """Pad samples of any sizes to one tensor. Padding goes right and below, so calibrations still hold.

    Args:
        samples: At least one.
        size: (width, height) to pad to, for batches that all have one shape; None: multiples of `DIVISOR`.
        expert_size: The same for the expert's images, where samples bring them.

    Raises:
        ValueError: There are no samples, or not all bring an expert's image.
        UserError: One does not fit into ``size``.
    """
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    names = [sample.id for sample in samples]
    images, sizes = _padded(names, [sample.image for sample in samples], size)
    # A batch travels from worker to trainer: it should not carry each image twice.
    padded = [
        replace(sample, image=image[:, :height, :width], expert_image=None)
        for sample, image, (width, height) in zip(samples, images, sizes, strict=True)
    ]
    targets = [sample.targets for sample in samples if sample.targets is not None]
    packed = PackedTargets.pack(targets) if len(targets) == len(samples) else None
    seen = [sample.expert_image for sample in samples if sample.expert_image is not None]
    if seen and len(seen) < len(samples):
        raise ValueError(f"samples must all bring an expert's image or none, got {len(seen)} of {len(samples)}")
    expert_images = _padded(names, seen, expert_size)[0] if seen else None
    return Batch(images, sizes, padded, packed, expert_images)


def _padded(
    names: Sequence[str], images: Sequence[Tensor], size: tuple[int, int] | None
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images in one tensor, zeros right of and below each, and their (width, height)."""
    sizes = [(image.shape[2], image.shape[1]) for image in images]
    if size is None:
        width, height = (-(-max(lengths) // DIVISOR) * DIVISOR for lengths in zip(*sizes, strict=True))
        size = (width, height)
    padded = images[0].new_zeros((len(images), 3, size[1], size[0]))
    for name, image, place, (width, height) in zip(names, images, padded, sizes, strict=True):
        if width > size[0] or height > size[1]:
            raise UserError(
                f"frame {name}: too large: resized it is {width} x {height} pixels, expected at most "
                f"{size[0]} x {size[1]}"
            )
        place[:, :height, :width] = image
    return padded, sizes
