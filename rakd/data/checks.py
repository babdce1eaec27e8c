"""What is looked at before a training: faults of the data that would be noticed hours later, or never."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from rakd.data.frames import Frame, read_image, read_image_size
from rakd.data.kitti import resized_width
from rakd.errors import UserError
from rakd.geometry import Calibration

_CENTRE = (0.25, 0.75)  # shares of width and height between which principal points lie
_TAIL = 65536  # bytes in which an image's end mark is looked for: some cameras write more behind it
_PNG, _PNG_END, _JPEG_END = b"\x89PNG", b"IEND\xaeB\x60\x82", b"\xff\xd9"


def check_frames(train: Sequence[Frame], val: Sequence[Frame], sizes: Iterable[tuple[int, int | None]]) -> int:
    """Read labels, calibrations, and headers and ends of images of all frames of a training.

    Warns of frames that are learned from and evaluated on, and of cameras whose principal point is off the centre.

    Args:
        train: Frames to learn from.
        val: Frames to evaluate on.
        sizes: Height, and width or None, of the images of each detector.

    Returns:
        Number of the frames to evaluate on that are also learned from.

    Raises:
        UserError: A file cannot be read, or an image is too wide; names the file.
    """
    shared = count_shared(train, val)
    frames = list({frame.id: frame for frame in (*train, *val)}.values())
    for frame in frames:
        frame.read_labels()
        check_end(frame.image)
    for height, width in dict.fromkeys(sizes):
        check_widths([frame.image for frame in frames], height, width)
    warn_of_centre((frame.image, frame.calib, frame.read_calibration()) for frame in frames)
    return shared


def count_shared(train: Sequence[Frame], val: Sequence[Frame]) -> int:
    """Number of the frames to evaluate on that are also learned from; warns if there are any."""
    shared = len({frame.id for frame in train} & {frame.id for frame in val})
    if shared:
        warnings.warn(
            f"{shared} of the {len(val)} frames to evaluate on are learned from: their figures do not tell how well "
            "other frames are done",
            stacklevel=3,
        )
    return shared


def warn_of_centre(cameras: Iterable[tuple[Path, Path, Calibration]]) -> None:
    """Warn where a camera's principal point is far from the image's centre, as after one of them was resized.

    Args:
        cameras: An image, its calibration file, and what that holds. The first that is so is told, and how many more
            there are.
    """
    told, count = "", 0
    for image, calib, calibration in cameras:
        size = read_image_size(image)
        point = calibration.projection[:2, 2]
        shares = (point + 0.5) / size
        if ((shares < _CENTRE[0]) | (shares > _CENTRE[1])).any():
            count += 1
            told = told or (
                f"{calib}: the principal point, ({point[0]:.0f}, {point[1]:.0f}), is far from the centre of {image}, "
                f"{size[0]} x {size[1]} pixels"
            )
    if told:
        more = f", and {count - 1} more like it" if count > 1 else ""
        warnings.warn(
            f"{told}{more}: distances are wrong if an image was resized or cropped after calibration", stacklevel=3
        )


def check_end(path: Path) -> None:
    """Refuse an image that was cut off; only one whose file has no end mark is read whole.

    Raises:
        UserError: It is; names the file.
    """
    with path.open("rb") as file:
        end = _PNG_END if file.read(len(_PNG)) == _PNG else _JPEG_END
        file.seek(max(0, path.stat().st_size - _TAIL))
        tail = file.read()
    if end not in tail:
        read_image(path)


def check_widths(images: Iterable[Path], height: int, width: int | None) -> None:
    """Refuse images that are wider than a detector's, before anything is computed; reads their headers only.

    Args:
        images: Files.
        height: Of the detector's images.
        width: Same; None: any.

    Raises:
        UserError: Names the image.
    """
    if width is None:
        return
    for path in images:
        size = read_image_size(path)
        wide = resized_width(size, height)
        if wide > width:
            raise UserError(
                f"{path}: too wide for the detector: resized from {size[0]} x {size[1]} pixels to its height, "
                f"{height}, it is {wide} wide; expected at most {width}"
            )
