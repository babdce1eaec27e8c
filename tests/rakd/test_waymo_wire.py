"""``.bin`` files: read as the devkit writes them, written as it reads them."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rakd.evaluation.waymo.objects import WaymoObjects
from rakd.evaluation.waymo.wire import read_bin, write_bin

COLUMNS = ("frames", "types", "boxes", "scores", "in_no_label_zone", "points", "difficulty")

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ROW = st.tuples(
    st.tuples(st.sampled_from(["", "10023_ü", "s" * 200]), st.integers(-(2**63), 2**63 - 1), st.integers(0, 5)),
    st.integers(0, 4),
    st.tuples(*[FINITE] * 7),
    st.floats(0, 1, width=32),
    st.booleans(),
    st.integers(0, 2**31),
    st.integers(0, 2),
)


@given(st.lists(ROW, max_size=6))
def test_what_is_written_is_read_back_equal(tmp_path_factory, rows):
    keys = list(dict.fromkeys(row[0] for row in rows))
    objects = WaymoObjects(
        keys,
        np.array([keys.index(row[0]) for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.int8),
        np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 7),
        np.array([row[3] for row in rows], dtype=np.float32),
        np.array([row[4] for row in rows], dtype=np.bool_),
        np.array([row[5] for row in rows], dtype=np.int64),
        np.array([row[6] for row in rows], dtype=np.int8),
    )
    path = tmp_path_factory.mktemp("bin") / "a.bin"
    write_bin(path, objects)
    back = read_bin(path)
    assert back.keys == objects.keys
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(back, name), getattr(objects, name), err_msg=name)
        assert getattr(back, name).dtype == getattr(objects, name).dtype


def field(number: int, value: bytes | int | float) -> bytes:
    """One field of a message, by the format's specification; floats are doubles."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def read(tmp_path: Path, data: bytes, **options: bool) -> WaymoObjects:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    return read_bin(path, **options)


def test_fields_in_any_order_and_unknown_ones(tmp_path):
    box = b"".join(field(number, float(number)) for number in (7, 4, 3, 1))  # no y, length and height
    label = field(20, b"new") + field(5, 2) + field(7, 300) + field(3, 4) + field(1, box) + field(2, b"")
    data = field(2, b"zone") + field(1, field(5, 7) + field(9, 1.5) + field(1, label) + field(4, b"s"))
    read_ = read(tmp_path, data)
    assert read_.keys == [("s", 7, 0)]
    assert read_.boxes.tolist() == [[1, 0, 3, 0, 4, 0, 7]]
    assert (read_.types[0], read_.difficulty[0], read_.points[0], read_.scores[0]) == (4, 2, 300, 1)


def test_synced(tmp_path):
    boxes = [b"".join(field(number, float(number) + shift) for number in range(1, 8)) for shift in (0, 10)]
    seen = field(1, boxes[0]) + field(3, 1) + field(7, 50) + field(11, b"FRONT") + field(12, boxes[1]) + field(13, 3)
    unseen = field(1, boxes[0]) + field(3, 1) + field(7, 50) + field(11, b"") + field(13, 3)
    data = field(1, field(1, seen)) + field(1, field(1, unseen))
    assert read(tmp_path, data).points.tolist() == [50, 50]
    synced = read(tmp_path, data, synced=True)
    assert synced.points.tolist() == [3, 0]
    assert synced.boxes[0].tolist() == [11, 12, 13, 15, 14, 16, 17]


def test_every_truncation_is_an_error_that_names_the_file(tmp_path):
    """But at the end of a whole object, where a message may end."""
    one = WaymoObjects(
        [("segment", 1_500_000_000_000_000, 1)],
        *(np.zeros(2, kind) for kind in (np.int64, np.int8)),
        np.ones((2, 7)),
        np.ones(2, np.float32),
        np.zeros(2, np.bool_),
        np.full(2, 300),
        np.zeros(2, np.int8),
    )
    write_bin(tmp_path / "whole.bin", one)
    data = (tmp_path / "whole.bin").read_bytes()
    assert len(data) % 2 == 0
    for length in set(range(1, len(data))) - {len(data) // 2}:
        with pytest.raises(ValueError, match=r"a\.bin: not a whole Objects message"):
            read(tmp_path, data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF",  # no message
        field(1, 5),
        field(1, field(1, 5)),
        field(1, field(4, 5)),
        field(1, field(4, b"\xff")),
        field(1, field(1, field(3, b"car"))),
        field(1, field(1, field(3, 9))),
        field(1, field(1, field(5, 3))),
        b"\x0b",  # wire type 3
        b"\x08" + b"\xff" * 11,
    ],
)
def test_what_is_no_objects_message(tmp_path, data):
    with pytest.raises(ValueError, match=r"a\.bin: not a whole Objects message of Waymo's: object [01]"):
        read(tmp_path, data)


def test_numbers_that_are_not_finite(tmp_path):
    box = field(1, float("nan"))
    with pytest.raises(ValueError, match=r"a\.bin: boxes and scores must be finite, those of object 1 are not"):
        read(tmp_path, field(1, field(1, field(1, box))))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_bin(tmp_path / "a.bin")
