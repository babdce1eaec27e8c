"""Frames for 2D detectors of other frameworks: a plain torch dataset, and a copy in YOLO's layout.

Three classes: cars (with vans), pedestrians and cyclists. Other objects, DontCare regions among them, are background.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rakd.data.frames import Frame, find_frames, read_image_size
from rakd.data.labels import CLASSES as CLASSES
from rakd.data.labels import Objects
from rakd.errors import UserError
from rakd.files import atomic_write, write_text
from rakd.geometry import FloatArray

_CLASS_OF = {"Car": 0, "Van": 0, "Pedestrian": 1, "Cyclist": 2}


class BoxDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and boxes of a KITTI folder, such as `rakd.scenes.make_scenes` renders.

    Items are (image ``[3, H, W]`` float32 of 0..1, ``{"boxes": [K, 4], "labels": [K]}``); boxes are (x1, y1, x2, y2) in
    pixels. Images are read once and kept.

    Args:
        data: The folder.
        split: Name of a list in ``ImageSets``; None: all frames.
        first_label: Number of the first class: 0, or 1 where 0 means background (torchvision).

    Raises:
        FileNotFoundError, ValueError: As `rakd.data.frames.find_frames`.
    """

    def __init__(self, data: Path | str, split: str | None = None, *, first_label: int = 0) -> None:
        self.items = [_read_item(frame, first_label) for frame in find_frames(Path(data), split)]

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """Make a shuffling loader of full batches: lists of images and of targets.

        Raises:
            ValueError: There are fewer frames than that.
        """
        if not 1 <= batch_size <= len(self):
            raise ValueError(f"batch_size: expected 1 to the number of frames, {len(self)}, got {batch_size}")
        return DataLoader(self, batch_size, shuffle=True, drop_last=True, collate_fn=_as_lists)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Give an image with its boxes and labels."""
        image, target = self.items[index]
        return image.float() / 255, dict(target)


def write_yolo(data: Path | str, out: Path | str) -> Path:
    """Copy a KITTI folder with lists ``train`` and ``val`` into YOLO's layout.

    Writes ``images/{train,val}``, ``labels/{train,val}`` (one line an object: class, cx, cy, w, h, as shares of the
    image's sides) and ``data.yaml``, which appears last.

    Args:
        data: The KITTI folder.
        out: Folder to write to.

    Returns:
        Path of ``data.yaml``.

    Raises:
        FileNotFoundError, ValueError: As `rakd.data.frames.find_frames`; or the folder holds other images, which would
            be learned from, too.
    """
    out = Path(out).absolute()
    frames = {split: find_frames(Path(data), split) for split in ("train", "val")}
    for split, wanted in frames.items():
        # Ultralytics keeps images (NAME.npy) and labels, and does not see that they are written anew.
        kept = {frame.image.with_suffix(".npy").name for frame in wanted}
        known = kept | {frame.image.name for frame in wanted}
        for there in sorted((out / "images" / split).glob("[!.]*")):
            if there.name not in known:
                raise UserError(f"out: expected a folder with no other images, got {there}")
        for stale in [out / "images" / split / name for name in kept] + [out / "labels" / f"{split}.cache"]:
            stale.unlink(missing_ok=True)
    for split, wanted in frames.items():
        for frame in wanted:
            with atomic_write(out / "images" / split / frame.image.name) as temporary:
                shutil.copyfile(frame.image, temporary)
            width, height = read_image_size(frame.image)
            classes, boxes = _classes_and_boxes(frame.read_labels(), width, height)
            lines = []
            for label, (x1, y1, x2, y2) in zip(classes, boxes.tolist(), strict=True):
                box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                lines.append(" ".join([str(label), *(f"{value:.6f}" for value in box)]) + "\n")
            write_text(out / "labels" / split / f"{frame.image.stem}.txt", "".join(lines))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    settings = f"path: {json.dumps(str(out))}\ntrain: images/train\nval: images/val\nnames:\n{names}"
    write_text(out / "data.yaml", settings)
    return out / "data.yaml"


def _as_lists(items: Sequence[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [image for image, _ in items], [target for _, target in items]


def _classes_and_boxes(objects: Objects, width: int, height: int) -> tuple[list[int], FloatArray]:
    """Classes and ``[N, 4]`` boxes of the objects that have a class and can be seen.

    Boxes count from the outer edge of the first pixel, as YOLO's and torchvision's do (KITTI's from its centre), and
    end at the image. Those without area, as where a label holds a 3D box alone, are left out: YOLO would leave out the
    image.
    """
    kept = objects.select(objects.is_type(*_CLASS_OF))
    boxes = (kept.boxes.reshape(-1, 4) + 0.5).clip(0, [width, height, width, height])
    seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return [_CLASS_OF[name.capitalize()] for name in kept.types[seen].tolist()], boxes[seen]


def _read_item(frame: Frame, first_label: int) -> tuple[Tensor, dict[str, Tensor]]:
    image = torch.from_numpy(frame.read_image().copy()).permute(2, 0, 1).contiguous()
    classes, boxes = _classes_and_boxes(frame.read_labels(), image.shape[2], image.shape[1])
    labels = torch.tensor(classes, dtype=torch.int64) + first_label
    return image, {"boxes": torch.from_numpy(boxes).float(), "labels": labels}
