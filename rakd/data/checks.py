"""What is looked at before a training: faults of the data that would be noticed hours later, or never."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rakd.data.frames import Frame, count_shared, read_image, read_image_size, warn_of_centre
from rakd.data.kitti import resized_width
from rakd.errors import UserError

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
