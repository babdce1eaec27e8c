import io
import shutil
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rakd.data.checks import count_shared, warn_of_centre
from rakd.data.frames import (
    digest,
    find_frames,
    read_calibration,
    read_image,
    read_image_size,
    read_split,
    write_calibration,
)
from rakd.errors import UserError
from rakd.evaluation.kitti import evaluate
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


def test_frames_that_are_learned_and_evaluated_are_counted(scenes):
    train, val = (find_frames(scenes, split) for split in ("train", "val"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_shared(train, val) == 0
    with pytest.warns(UserWarning, match="2 of the 2 frames to evaluate on are learned from"):
        assert count_shared(find_frames(scenes), val) == 2


def test_calibrations_of_other_images_are_told(kitti):
    frame = find_frames(kitti)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_centre([(frame.image, frame.calib, frame.read_calibration())] * 3)
    Image.fromarray(frame.read_image()).resize((207, 62)).save(frame.image)  # without its calibration
    other = find_frames(kitti)[1]
    far = r"the principal point, .*, is far from the centre of .* 207 x 62 pixels"
    for images, more in (([frame], ""), ([other, frame], ""), ([frame, other, frame], ", and 1 more like it")):
        with pytest.warns(UserWarning, match=f"{far}{more}: distances are wrong") as told:
            warn_of_centre((one.image, one.calib, one.read_calibration()) for one in images)
        assert len(told) == 1


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
    double = kitti / "training" / "image_2" / "000001.jpg"
    double.touch()
    with pytest.raises(ValueError, match=r"image_2: expected one image a frame, got 000001\.jpg and 000001\.png"):
        find_frames(kitti)
    double.unlink()
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
        ("P2: 7_00" + " 0" * 11, r"c\.txt:1: P2 must be 12 numbers, got '7_00 0"),
        ("P2: " + "x " * 12, r"c\.txt:1: P2 must be 12 numbers"),
        ("P2: " + "1 " * 12, r"c\.txt:1: projection must be a rectified pinhole"),
        ("P0: 1\n", r"c\.txt: expected a line 'P2: <12 numbers>' \(or P_rect_02, as in raw data\), found only P0"),
    ],
)
def test_bad_calibrations(tmp_path, text, message):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_calibration(tmp_path / "c.txt")


RAW = """calib_time: 09-Jan-2012 13:57:47
corner_dist: 9.950000e-02
K_02: 9.597910e+02 0.000000e+00 6.960217e+02 0.000000e+00 9.569251e+02 2.241806e+02 0 0 1
P_rect_00: 7.2e+02 0 6.1e+02 0 0 7.2e+02 1.7e+02 0 0 0 1 0
P_rect_02: 7.215377e+02 0 6.095593e+02 4.485728e+01 0 7.215377e+02 1.728540e+02 2.163791e-01 0 0 1 2.745884e-03
"""


def test_calibrations_of_the_raw_data(tmp_path):
    path = tmp_path / "calib_cam_to_cam.txt"
    path.write_text(RAW)
    expected = [[721.5377, 0, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791], [0, 0, 1, 0.002745884]]
    assert read_calibration(path).projection.tolist() == expected
    # Where both stand, the object data's name counts.
    path.write_text(f"{RAW}P2: 5 0 0 0 0 5 0 0 0 0 1 0\n")
    assert read_calibration(path).projection[0, 0] == 5
    path.write_text(RAW.replace("P_rect_02", "P_rect_03"))
    with pytest.raises(UserError, match=r"found only calib_time, corner_dist, K_02, P_rect_00, P_rect_03$"):
        read_calibration(path)
    path.write_text("721 0 609\n")
    with pytest.raises(UserError, match="found no line of that form"):
        read_calibration(path)
    path.write_text(RAW.replace("P_rect_02: 7.215377e+02", "P_rect_02:"))
    with pytest.raises(UserError, match=r"cam\.txt:5: P_rect_02 must be 12 numbers"):
        read_calibration(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_editors_in_calibrations_and_splits(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_text("P2: 5 0 1 0 0 6 2 0 0 0 1 0\n", encoding=encoding)
    assert read_calibration(path).projection[1, 1] == 6
    path.write_text("000007\n000002\n", encoding=encoding)
    assert read_split(path) == ["000007", "000002"]


@pytest.mark.parametrize("digits", [1, 7, 10])
def test_frame_names_of_any_count_of_digits(kitti, digits):
    for name in ("image_2", "label_2", "calib"):
        for path in sorted((kitti / "training" / name).iterdir()):
            path.rename(path.with_name(f"{int(path.stem):0{digits}d}{path.suffix}"))
    frames = [f"{i:0{digits}d}" for i in range(10)]
    assert [frame.id for frame in find_frames(kitti)] == frames
    (kitti / "ImageSets" / "mine.txt").write_text(f"{frames[7]}\n{frames[2]}\n")
    assert [frame.id for frame in find_frames(kitti, "mine")] == [frames[7], frames[2]]
    labels = kitti / "training" / "label_2"
    for path in labels.iterdir():
        path.write_text("".join(f"{row} 0.5\n" for row in path.read_text().splitlines()))
    assert evaluate(labels, labels)["Car"]["3d"]["objects"][2] > 0


def test_images_that_no_number_names_are_told(kitti):
    for path in (kitti / "training" / "image_2").iterdir():
        path.rename(path.with_name(f"img_{path.name}"))
    with pytest.raises(UserError, match=r"holds no images NNNNNN\.png or \.jpg; img_000000\.png is not named by a num"):
        find_frames(kitti)


def png(path, rows, color_type, depth):
    """Write a PNG image of the bytes of its rows, whatever Pillow can write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(rows[0]) * 8 // depth // {0: 1, 2: 3}[color_type]
    head = struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def test_images_of_16_bits_are_scaled(tmp_path):
    path = tmp_path / "a.png"
    values = np.array([[0, 257, 1000, 32768, 65278], [65535, 12850, 128, 129, 4095]])
    expected = np.array([[0, 1, 4, 128, 254], [255, 50, 0, 1, 16]])
    png(path, [row.astype(">u2").tobytes() for row in values], 0, 16)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=2))
    # Colours: Pillow takes the higher byte.
    colours = np.array([[[65535, 32896, 0], [257, 514, 51400]]])
    png(path, [row.astype(">u2").tobytes() for row in colours], 2, 16)
    np.testing.assert_array_equal(read_image(path), [[[255, 128, 0], [1, 2, 200]]])


@pytest.mark.parametrize("values", [np.full((2, 2), 70000, np.int32), np.full((2, 2), 0.5, np.float32)])
def test_images_of_more_bits_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(UserError, match=r"a\.png: expected 8 or 16 bits a channel, got 32"):
        read_image(tmp_path / "a.png")


TURNS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["color.jpg", "color.png", "grey16.png"])
def test_images_stand_upright(tmp_path, kind, orientation):
    path = tmp_path / kind
    stored = np.zeros((16, 48), dtype=np.uint8)
    stored[:8, :16], stored[:8, 16:32], stored[8:, :16] = 255, 160, 80
    image = Image.fromarray(stored.astype(np.uint16) * 257 if "16" in kind else np.repeat(stored[..., None], 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=100)
    expected = TURNS[orientation](stored)
    read = read_image(path)
    assert read.shape == (*expected.shape, 3)
    assert np.abs(read.astype(int) - expected[..., None]).max() <= 2  # JPEG rounds
    assert read_image_size(path) == expected.shape[::-1]


def test_an_odd_tag_beside_the_orientation_does_not_matter(tmp_path):
    """A resolution of one byte, which Pillow cannot write again."""
    entries = bytes.fromhex("1201 0300 01000000 06000000") + bytes.fromhex("1a01 0100 01000000 07000000")
    block = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00" + entries + bytes(4)
    Image.new("RGB", (20, 12)).save(tmp_path / "a.jpg", exif=block)
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises((TypeError, ValueError, struct.error)):
        ImageOps.exif_transpose(image)
    assert read_image_size(tmp_path / "a.jpg") == (12, 20)
    assert read_image(tmp_path / "a.jpg").shape == (20, 12, 3)


def test_tags_that_cannot_be_read_do_not_matter(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (20, 12)).save(tmp_path / name, exif=b"Exif\x00\x00garbage")
        assert read_image_size(tmp_path / name) == (20, 12)
        assert read_image(tmp_path / name).shape == (12, 20, 3)


def test_images_that_pillow_takes_for_an_attack_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"P5 40000 40000 255\n")
    for read in (read_image, read_image_size):
        with pytest.raises(UserError, match=r"a\.png: cannot be read as an image: Image size"):
            read(tmp_path / "a.png")


@given(st.data(), st.sampled_from(["PNG", "JPEG"]))
def test_damaged_images_are_read_or_refused_by_name(tmp_path_factory, data, kind):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, kind, exif=exif)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(8, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.png"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    for read in (read_image, read_image_size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
            except UserError as error:
                assert f"{path}: cannot be read as an image" in str(error)
