"""Frames of a KITTI folder: where their files are, and reading images and calibrations.

The layout, as KITTI is distributed::

    ROOT/training/{image_2,label_2,calib}/NNNNNN.{png,txt,txt}
    ROOT/testing/{image_2,calib}/NNNNNN.{png,txt}
    ROOT/ImageSets/{train,val,...}.txt        one frame number a line
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from rakd.data.labels import Objects, read_labels
from rakd.files import write_text
from rakd.geometry import Calibration

Part = Literal["training", "testing"]

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Frame:
    """The files of one frame.

    Attributes:
        id: The frame's name, ``NNNNNN``.
        image: Path of the image.
        calib: Path of the calibration.
        label: Path of the label file; None in ``testing``.
    """

    id: str
    image: Path
    calib: Path
    label: Path | None

    def read_image(self) -> npt.NDArray[np.uint8]:
        """The image, ``[height, width, 3]`` uint8 RGB."""
        return read_image(self.image)

    def read_calibration(self) -> Calibration:
        """The calibration of the left colour camera."""
        return read_calibration(self.calib)

    def read_labels(self) -> Objects:
        """The labelled objects.

        Raises:
            ValueError: The frame has no labels.
        """
        if self.label is None:
            raise ValueError(f"frame {self.id} of {self.image.parent} has no labels")
        return read_labels(self.label)


def find_frames(root: Path, split: str | None = None, part: Part = "training") -> list[Frame]:
    """List the frames of a KITTI folder.

    Args:
        root: The folder that holds ``training`` and ``ImageSets``.
        split: Name of a list in ``ImageSets`` ("train", "val", ...), in its order. None: every image, sorted.
        part: "training" (with labels) or "testing" (without).

    Raises:
        FileNotFoundError: A folder, the split's list or a listed frame's file is missing.
        ValueError: The folder or list is empty, or a line of the list is not a frame number.
    """
    root = Path(root)
    folder = root / part
    images = folder / "image_2"
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is not there: expected a KITTI folder with {part}/image_2")
    found = {path.stem: path for path in sorted(images.iterdir()) if is_image(path) and path.stem.isdigit()}
    ids = sorted(found) if split is None else read_split(root / "ImageSets" / f"{split}.txt")
    if not ids:
        raise ValueError(f"{images} holds no images NNNNNN.png or .jpg")
    frames = []
    for id_ in ids:
        if id_ not in found:
            raise FileNotFoundError(f"frame {id_} of split {split!r} has no image in {images}")
        label = folder / "label_2" / f"{id_}.txt" if part == "training" else None
        frame = Frame(id_, found[id_], folder / "calib" / f"{id_}.txt", label)
        for path in (frame.calib, frame.label):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"frame {id_} has no {path}")
        frames.append(frame)
    return frames


def digest(frames: Sequence[Frame]) -> str:
    """What tells these frames from others, wherever their folder lies.

    Ids, labels and calibrations count in full; of images, which would take minutes to read, the size of the file.

    Args:
        frames: In their order, which counts as well.

    Returns:
        16 hexadecimal digits.

    Raises:
        FileNotFoundError: A file is missing.
    """
    found = hashlib.sha256()
    for frame in frames:
        label = b"" if frame.label is None else frame.label.read_bytes()
        for part in (frame.id.encode(), str(frame.image.stat().st_size).encode(), frame.calib.read_bytes(), label):
            # With its length before it, no part can be taken for the end of the one before.
            found.update(b"%d:" % len(part) + part)
    return found.hexdigest()[:16]


def read_split(path: Path) -> list[str]:
    """Read a list of frame numbers, one a line.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a text file, a line is not a frame number, a frame is listed twice, or the list is empty.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(_read_lines(path, "a list of frame numbers, one a line"), start=1):
        id_ = line.strip()
        if not id_:
            continue
        if not (id_.isascii() and id_.isdigit()):
            raise ValueError(f"{path}:{number}: expected a frame number such as 000123, got {id_!r}")
        if id_ in lines:
            raise ValueError(f"{path}:{number}: frame {id_} is listed twice, first in line {lines[id_]}")
        lines[id_] = number
    if not lines:
        raise ValueError(f"{path} lists no frames")
    return list(lines)


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image (PNG or JPEG)."""
    return path.suffix.lower() in _IMAGE_SUFFIXES


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image as ``[height, width, 3]`` uint8 RGB.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image, or a broken one.
    """
    with _open_image(path) as image:
        return np.array(image.convert("RGB"))


def read_image_size(path: Path) -> tuple[int, int]:
    """Read the (width, height) of an image in pixels, without its pixels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image.
    """
    with _open_image(path) as image:
        return image.size


def read_calibration(path: Path, camera: str = "P2") -> Calibration:
    """Read the projection matrix of one camera from a calibration file.

    Args:
        path: The file, lines such as ``P2: <12 numbers>``.
        camera: Name of the matrix; "P2" is the left colour camera, which took ``image_2``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a text file, or the matrix is missing or malformed; names file and line.
    """
    for number, line in enumerate(_read_lines(path, "a calibration file"), start=1):
        name, _, rest = line.partition(":")
        if name.strip() != camera:
            continue
        try:
            values = [float(text) for text in rest.split()]
        except ValueError:
            values = []
        if len(values) != 12:
            raise ValueError(f"{path}:{number}: {camera} must be 12 numbers, got {rest.strip()!r}")
        try:
            return Calibration(np.array(values).reshape(3, 4))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    raise ValueError(f"{path}: expected a line '{camera}: <12 numbers>', found none")


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration file in KITTI's form, atomically.

    All four cameras get the one projection matrix; rectification and the transforms to the other sensors,
    which a rendered or monocular data set does not have, are identities.
    """
    matrix = " ".join(f"{value:.12e}" for value in calibration.projection.flat)
    rotation = " ".join(f"{value:.12e}" for value in np.eye(3).flat)
    transform = " ".join(f"{value:.12e}" for value in np.eye(4)[:3].flat)
    lines = [f"P{camera}: {matrix}" for camera in range(4)]
    lines += [f"R0_rect: {rotation}", f"Tr_velo_to_cam: {transform}", f"Tr_imu_to_velo: {transform}"]
    write_text(path, "\n".join(lines) + "\n")


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image; what goes wrong in the block, too, is said of the file."""
    _check_file(path, "an image")
    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def _check_file(path: Path, expected: str) -> None:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {what}: expected {expected}")


def _read_lines(path: Path, expected: str) -> list[str]:
    _check_file(path, expected)
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
