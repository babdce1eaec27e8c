"""Rendered street scenes for 2D detectors: data for examples and tests of other frameworks."""

from pathlib import Path

from rakd.data.boxes2d import BoxDataset
from rakd.scenes.generate import make_scenes


def rendered_boxes(out: Path | str, frames: int, width: int, *, first_label: int = 0) -> tuple[BoxDataset, BoxDataset]:
    """Render street scenes, twice as wide as high, and read them.

    Args:
        out: Folder for `rakd.scenes.make_scenes`.
        frames: Their number; every fifth is for validation.
        width: Of the images in pixels.
        first_label: See `rakd.data.boxes2d.BoxDataset`.

    Returns:
        Data to train on, and to validate with.
    """
    make_scenes(out, frames, size=(width, width // 2))
    train, val = (BoxDataset(out, split, first_label=first_label) for split in ("train", "val"))
    return train, val
