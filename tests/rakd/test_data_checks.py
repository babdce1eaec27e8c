"""What is looked at before a training: labels, calibrations and images of all frames, not of some."""

import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image

from rakd.data.checks import check_end, check_frames
from rakd.data.frames import find_frames
from rakd.errors import UserError


@pytest.fixture
def kitti(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that a test may spoil."""
    return shutil.copytree(scenes, tmp_path / "kitti")


def check(data: Path, width: int | None = None) -> int:
    return check_frames(find_frames(data, "train"), find_frames(data, "val"), [(128, width), (128, None)])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("fault", ["label_2", "calib", "image_2"])
def test_a_fault_in_the_last_frame_is_named(split: str, fault: str, kitti: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(kitti) == 0
    last = (kitti / "ImageSets" / f"{split}.txt").read_text().split()[-1]
    (file,) = (kitti / "training" / fault).glob(f"{last}.*")
    file.write_bytes(file.read_bytes()[:-100] if fault == "image_2" else b"Car 0 0\n")
    with pytest.raises(UserError, match=file.name):
        check(kitti)


def test_the_camera_of_any_frame_is_looked_at(kitti: Path) -> None:
    image = find_frames(kitti, "val")[-1].image
    Image.open(image).resize((207, 62)).save(image)
    with pytest.warns(UserWarning, match=r"the principal point, .*, is far from the centre of .* 207 x 62 pixels"):
        check(kitti)


def test_frames_of_both_and_wide_images(kitti: Path) -> None:
    val = find_frames(kitti, "val")
    with pytest.warns(UserWarning, match="of the 2 frames to evaluate on are learned from"):
        assert check_frames(val[:1], val, [(128, None)]) == 1
    with pytest.raises(UserError, match=r"too wide for the detector: .* expected at most 96"):
        check(kitti, width=96)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_cut_images_are_refused_and_others_are_not(kind: str, kitti: Path, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    Image.open(find_frames(kitti)[0].image).save(file)
    whole = file.read_bytes()
    for tail in (b"", b"\0" * 10, b"\0" * 100_000):  # the last has no end mark where one is looked for, and is read
        file.write_bytes(whole + tail)
        check_end(file)
    for share in (0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=rf"a\.{kind}: cannot be read as an image"):
            check_end(file)
