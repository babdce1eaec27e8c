import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rakd.data.frames import (
    digest,
    find_frames,
    read_calibration,
    read_image,
    read_image_size,
    read_split,
    write_calibration,
)
from rakd.geometry import Calibration


@pytest.fixture
def kitti(scenes, tmp_path):
    """A copy of the scenes that a test may spoil."""
    return shutil.copytree(scenes, tmp_path / "kitti")


def test_all_frames_and_splits(scenes):
    frames = find_frames(scenes)
    assert [frame.id for frame in frames] == [f"{i:06d}" for i in range(10)]
    assert [frame.id for frame in find_frames(scenes, "val")] == ["000004", "000009"]
    assert frames[0].read_image().shape == (125, 414, 3)
    assert len(frames[0].read_labels()) > 0
    assert frames[0].read_calibration().projection[0, 0] == pytest.approx(721.5377 / 3)


def test_digest_knows_frames_by_what_is_in_them(scenes, kitti):
    first = digest(find_frames(scenes))
    assert len(first) == 16 and int(first, 16) >= 0
    assert digest(find_frames(kitti)) == first  # of another folder
    assert digest(find_frames(kitti)[::-1]) != first
    assert digest(find_frames(kitti, "train")) != first
    seen = {first}
    for name in ("label_2/000003.txt", "calib/000003.txt", "image_2/000003.png"):
        path = kitti / "training" / name
        before = path.read_bytes()
        # Text of the same length; images count by their size.
        path.write_bytes(before + b"0" if path.suffix == ".png" else before.replace(b"1", b"2", 1))
        seen.add(digest(find_frames(kitti)))
        path.write_bytes(before)
    assert len(seen) == 4
    assert digest(find_frames(kitti)) == first
    label = kitti / "training" / "label_2"
    (label / "000003.txt").rename(label / "x")
    (label / "000004.txt").rename(label / "000003.txt")
    (label / "x").rename(label / "000004.txt")
    assert digest(find_frames(kitti)) != first


def test_digest_does_without_labels(scenes):
    frames = find_frames(scenes)
    bare = [replace(frame, label=None) for frame in frames]
    assert digest(bare) != digest(frames)


def test_splits_keep_their_order(kitti):
    (kitti / "ImageSets" / "mine.txt").write_text("000007\n\n000002\n")
    assert [frame.id for frame in find_frames(kitti, "mine")] == ["000007", "000002"]


def test_testing_has_no_labels_and_images_may_be_jpg(kitti):
    (kitti / "testing" / "image_2").mkdir(parents=True)
    shutil.copytree(kitti / "training" / "calib", kitti / "testing" / "calib")
    with Image.open(kitti / "training" / "image_2" / "000000.png") as image:
        image.save(kitti / "testing" / "image_2" / "000000.jpg")
    (frame,) = find_frames(kitti, part="testing")
    assert frame.label is None
    assert frame.read_image().shape == (125, 414, 3)
    with pytest.raises(ValueError, match=r"frame 000000 .* has no labels"):
        frame.read_labels()


def test_missing_things_are_named(kitti, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a KITTI folder with training/image_2"):
        find_frames(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt is not there: expected a list"):
        find_frames(kitti, "nothing")
    (kitti / "ImageSets" / "more.txt").write_text("000001\n000099\n")
    with pytest.raises(FileNotFoundError, match="frame 000099 of split 'more' has no image"):
        find_frames(kitti, "more")
    (kitti / "training" / "label_2" / "000003.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"frame 000003 has no .*label_2/000003\.txt"):
        find_frames(kitti)
    shutil.rmtree(kitti / "training" / "image_2")
    (kitti / "training" / "image_2").mkdir()
    (kitti / "training" / "image_2" / ".000001-left-over.png").write_text("of a killed run")
    with pytest.raises(ValueError, match=r"holds no images NNNNNN\.png or \.jpg"):
        find_frames(kitti)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000001\nabc\n", r"s\.txt:2: expected a frame number such as 000123, got 'abc'"),
        ("000001\n000002\n000001\n", r"s\.txt:3: frame 000001 is listed twice, first in line 1"),
        ("\n", r"s\.txt lists no frames"),
    ],
)
def test_bad_splits(tmp_path, text, message):
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split(tmp_path / "s.txt")


def test_broken_images(tmp_path, scenes):
    path = tmp_path / "a.png"
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image"):
        read_image(path)
    path.write_bytes((scenes / "training" / "image_2" / "000000.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image"):
        read_image(path)
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image"):
        read_image_size(path)
    for read in (read_image, read_image_size):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "b.png")


def test_image_sizes(scenes):
    assert read_image_size(scenes / "training" / "image_2" / "000000.png") == (414, 125)


def test_files_that_are_not_text_are_named(scenes):
    image = scenes / "training" / "image_2" / "000000.png"
    for read in (read_calibration, read_split):
        with pytest.raises(ValueError, match=r"000000\.png: not a text file"):
            read(image)


def test_calibration_round_trip(tmp_path):
    matrix = np.array([[721.5377, 0, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791], [0, 0, 1, 0.002745884]])
    path = tmp_path / "000000.txt"
    write_calibration(path, Calibration(matrix))
    np.testing.assert_allclose(read_calibration(path).projection, matrix, rtol=1e-12)
    assert [line.split(":")[0] for line in path.read_text().splitlines()] == [
        *("P0", "P1", "P2", "P3", "R0_rect", "Tr_velo_to_cam", "Tr_imu_to_velo")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P0: 1\nP2: 1 2 3\n", r"c\.txt:2: P2 must be 12 numbers, got '1 2 3'"),
        ("P2: " + "x " * 12, r"c\.txt:1: P2 must be 12 numbers"),
        ("P2: " + "1 " * 12, r"c\.txt:1: projection must be a rectified pinhole"),
        ("P0: 1\n", r"c\.txt: expected a line 'P2: <12 numbers>' \(or P_rect_02, as in raw data\), found only P0"),
    ],
)
def test_bad_calibrations(tmp_path, text, message):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_calibration(tmp_path / "c.txt")
