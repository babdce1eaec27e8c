"""Frames of a KITTI folder: where their files are, and reading images and calibrations.

The layout, as KITTI is distributed::

    ROOT/training/{image_2,label_2,calib}/NNNNNN.{png,txt,txt}
    ROOT/testing/{image_2,calib}/NNNNNN.{png,txt}
    ROOT/ImageSets/{train,val,...}.txt        one frame number a line

A frame's name is its number, of six digits in KITTI's object data and ten in its raw data; any count will do.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from rakd.data.labels import Objects, read_labels
from rakd.errors import MissingFileError, UserError
from rakd.files import check_file, read_text, write_text
from rakd.geometry import Calibration, FloatArray

Part = Literal["training", "testing"]

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_FRAME_NAME = re.compile("[0-9]+")
_CAMERAS = ("P2", "P_rect_02")  # the left colour camera in the object data, and in the raw data
_MAX_LISTED = 40  # names that an error gives; calib_cam_to_cam.txt has 34
_WHITE = 65535  # of 16 bits
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))  # what undoes each orientation


@dataclass(frozen=True)
class Frame:
    """The files of one frame.

    Attributes:
        id: The frame's name, see `is_frame_name`.
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
            UserError: The frame has no labels.
        """
        if self.label is None:
            raise UserError(f"frame {self.id} of {self.image.parent} has no labels")
        return read_labels(self.label)


def find_frames(root: Path, split: str | None = None, part: Part = "training") -> list[Frame]:
    """List the frames of a KITTI folder.

    Args:
        root: The folder that holds ``training`` and ``ImageSets``.
        split: Name of a list in ``ImageSets`` ("train", "val", ...), in its order. None: every image, sorted.
        part: "training" (with labels) or "testing" (without).

    Raises:
        MissingFileError: A folder, the split's list or a listed frame's file is missing.
        UserError: The folder or list is empty, or a line of the list is not a frame number.
    """
    root = Path(root)
    folder = root / part
    images = folder / "image_2"
    if not images.is_dir():
        raise MissingFileError(f"{images} is not there: expected a KITTI folder with {part}/image_2")
    found: dict[str, Path] = {}
    for image in sorted(images.iterdir()):
        if is_image(image) and is_frame_name(image.stem) and found.setdefault(image.stem, image) != image:
            raise UserError(f"{images}: expected one image a frame, got {found[image.stem].name} and {image.name}")
    ids = sorted(found) if split is None else read_split(root / "ImageSets" / f"{split}.txt")
    if not ids:
        other = next((path.name for path in sorted(images.iterdir()) if is_image(path) and path.name[0] != "."), None)
        what = f"; {other} is not named by a number" if other else ""
        raise UserError(f"{images} holds no images NNNNNN.png or .jpg{what}")
    frames = []
    for id_ in ids:
        if id_ not in found:
            raise MissingFileError(f"frame {id_} of split {split!r} has no image in {images}")
        label = folder / "label_2" / f"{id_}.txt" if part == "training" else None
        frame = Frame(id_, found[id_], folder / "calib" / f"{id_}.txt", label)
        for path in (frame.calib, frame.label):
            if path is not None and not path.is_file():
                raise MissingFileError(f"frame {id_} has no {path}")
        frames.append(frame)
    return frames


def digest(frames: Sequence[Frame]) -> str:
    """Hash frames, independently of the place of their folder.

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
        MissingFileError: There is no such file.
        UserError: It is not a text file, a line is not a frame number, a frame is listed twice, or the list is empty.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "a list of frame numbers, one a line").splitlines(), start=1):
        id_ = line.strip()
        if not id_:
            continue
        if not is_frame_name(id_):
            raise UserError(f"{path}:{number}: expected a frame number such as 000123, got {id_!r}")
        if id_ in lines:
            raise UserError(f"{path}:{number}: frame {id_} is listed twice, first in line {lines[id_]}")
        lines[id_] = number
    if not lines:
        raise UserError(f"{path} lists no frames")
    return list(lines)


def is_frame_name(text: str) -> bool:
    """Whether a text is the name of a frame: a number of any count of digits."""
    return _FRAME_NAME.fullmatch(text) is not None


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image (PNG or JPEG)."""
    return path.suffix.lower() in _IMAGE_SUFFIXES


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image as ``[height, width, 3]`` uint8 RGB.

    It is turned as its EXIF orientation says. OpenCV and labelling tools turn images, too: labels and calibrations
    made with them are of these pixels, and so are networks' upright cars. KITTI's images have no orientation.
    Grey images of 16 bits are scaled: 65535 is white.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is not an image, a broken one, or one of more than 16 bits.
    """
    with _open_image(path) as image:
        turn = _TURNS.get(_orientation(image))
        if turn is not None:  # Pillow's exif_transpose writes all tags anew, and fails where one is odd
            image = image.transpose(turn)
        if image.mode[0] in "IF":
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > _WHITE:
                raise UserError(f"{path}: expected 8 or 16 bits a channel, got 32")
            image = Image.fromarray(np.rint(values / (_WHITE / 255)).astype(np.uint8))
        return np.array(image.convert("RGB"))


def read_image_size(path: Path) -> tuple[int, int]:
    """Read the (width, height) that `read_image` gives an image, without its pixels.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is not an image.
    """
    with _open_image(path) as image:
        return image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size


def _orientation(image: Image.Image) -> int:
    """The orientation that EXIF tells before the pixels; 1, upright, where it does not or cannot be read."""
    if "exif" not in image.info:  # Pillow would decode a PNG image to look behind its pixels
        return 1
    try:
        told = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1
    return told if isinstance(told, int) else 1


def read_calibration(path: Path) -> Calibration:
    """Read the projection matrix of the left colour camera, which took ``image_2``.

    Args:
        path: A calibration file of the object data, with a line ``P2: <12 numbers>``, or ``calib_cam_to_cam.txt`` of
            the raw data, in which the same matrix is called ``P_rect_02``.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is not a text file, or the matrix is missing or malformed; names file and line.
    """
    found: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(read_text(path, "a calibration file").splitlines(), start=1):
        name, colon, rest = line.partition(":")
        if colon:
            found.setdefault(name.strip(), (number, rest))
    camera = next((name for name in _CAMERAS if name in found), None)
    if camera is None:
        listed = f"only {', '.join(list(found)[:_MAX_LISTED])}" if found else "no line of that form"
        raise UserError(f"{path}: expected a line 'P2: <12 numbers>' (or P_rect_02, as in raw data), found {listed}")
    number, rest = found[camera]
    try:
        values = [float(text) for text in rest.split() if "_" not in text]  # float() takes "1_0" for 10
    except ValueError:
        values = []
    if len(values) != 12:
        raise UserError(f"{path}:{number}: {camera} must be 12 numbers, got {rest.strip()!r}")
    try:
        return Calibration(np.array(values).reshape(3, 4))
    except ValueError as error:
        raise UserError(f"{path}:{number}: {error}") from None


def write_calibration(path: Path, calibration: Calibration, vehicle: FloatArray | None = None) -> None:
    """Write a calibration file in KITTI's form, atomically.

    Args:
        path: File to write.
        calibration: Its projection is that of all four cameras; rectification is the identity.
        vehicle: Transform ``[4, 4]`` from the vehicle's frame to the camera's, in the place of the lidar's. None: the
            transforms to other sensors, which a rendered or monocular data set does not have, are identities.
    """
    matrices = {f"P{camera}": calibration.projection for camera in range(4)}
    matrices |= {"R0_rect": np.eye(3), "Tr_velo_to_cam": np.eye(4)[:3] if vehicle is None else vehicle[:3]}
    if vehicle is None:
        matrices["Tr_imu_to_velo"] = np.eye(4)[:3]
    lines = [f"{name}: {' '.join(f'{value:.12e}' for value in matrix.flat)}\n" for name, matrix in matrices.items()]
    write_text(path, "".join(lines))


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image; what goes wrong in the block, too, is said of the file."""
    check_file(path, "an image")
    try:
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise UserError(f"{path}: cannot be read as an image: {error}") from error
