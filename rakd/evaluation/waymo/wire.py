"""Waymo's ``.bin`` files, read and written without protobuf: serialised ``Objects`` messages.

Fields, of ``metrics.proto`` and ``label.proto`` in the devkit: Objects: 1 Object. Object: 1 Label, 2 score (float), 3
in a no-label zone, 4 segment, 5 time in microseconds, 6 camera. Label: 1 Box, 3 type, 5 difficulty, 7 lidar points, 11
most visible camera, 12 camera-synced Box, 13 points of the top lidar. Box (doubles): 1 cx, 2 cy, 3 cz, 4 width, 5
length, 6 height, 7 heading. Other fields are skipped.
"""

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rakd.errors import UserError
from rakd.evaluation.waymo.objects import FrameKey, WaymoObjects
from rakd.files import atomic_write, check_file

# A Box with all seven doubles in the order of their numbers, as every writer leaves it: tag, value, tag, value ...
_BOX = struct.Struct("<" + "Bd" * 7)
_BOX_TAGS = tuple(range(0x09, 0x40, 8))

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_Value = int | bytes


def read_bin(path: Path, *, synced: bool = False) -> WaymoObjects:
    """Read a ``.bin`` file of truths or predictions.

    Args:
        path: The file.
        synced: Read truths as LET-3D-AP takes them: boxes are the camera-synced ones, points those of the top lidar,
            and objects without a most visible camera have no points.

    Returns:
        The objects. An object without a score has the score 1, as in the devkit.

    Raises:
        MissingFileError: There is no such file.
        UserError: The file is not a whole ``Objects`` message, or a number in it is not finite; names the file.
    """
    path = Path(path)
    check_file(path, "a .bin file of Waymo's")
    data = path.read_bytes()
    keys: dict[FrameKey, int] = {}
    integers, scores, boxes = array("q"), array("f"), array("d")
    offset = 0
    try:
        for number, _, value in _fields(data):
            offset += 1
            if number == 1:
                _read_object(_message(value), keys, integers, scores, boxes, synced)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a whole Objects message of Waymo's: object {offset}: {error}") from None
    table = np.array(integers, dtype=np.int64).reshape(-1, 5)
    rows = np.array(boxes, dtype=np.float64).reshape(-1, 7)
    result = WaymoObjects(
        keys=list(keys),
        frames=table[:, 0].copy(),
        types=table[:, 1].astype(np.int8),
        boxes=rows[:, [0, 1, 2, 4, 3, 5, 6]],
        scores=np.array(scores, dtype=np.float32),
        in_no_label_zone=table[:, 2].astype(np.bool_),
        points=table[:, 3].copy(),
        difficulty=table[:, 4].astype(np.int8),
    )
    bad = ~np.isfinite(result.boxes).all(axis=1) | np.isnan(result.scores)
    if bad.any():
        raise UserError(f"{path}: boxes and scores must be finite, those of object {int(bad.argmax()) + 1} are not")
    return result


def write_bin(path: Path, objects: WaymoObjects) -> None:
    """Write objects as a ``.bin`` file, atomically: what the devkit's tools and the challenge's server take.

    Truths (objects with points or a difficulty) get those; `read_bin` gives back equal columns.

    Args:
        path: The file to write.
        objects: The objects; frames need their segment and time for the server.
    """
    heads = [_key(key) for key in objects.keys]
    rows = objects.boxes[:, [0, 1, 2, 4, 3, 5, 6]].tolist()
    columns = zip(
        objects.frames.tolist(),
        objects.types.tolist(),
        rows,
        objects.scores.tolist(),
        objects.in_no_label_zone.tolist(),
        objects.points.tolist(),
        objects.difficulty.tolist(),
        strict=True,
    )
    with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
        for frame, type_, box, score, zone, points, difficulty in columns:
            label = _tagged(1, _BOX.pack(*(part for pair in zip(_BOX_TAGS, box, strict=True) for part in pair)))
            label += b"\x18" + _varint(type_)
            if difficulty:
                label += b"\x28" + _varint(difficulty)
            if points:
                label += b"\x38" + _varint(points)
            body = _tagged(1, label) + b"\x15" + struct.pack("<f", score) + (b"\x18\x01" if zone else b"")
            file.write(_tagged(1, body + heads[frame]))


def _read_object(
    data: bytes, keys: dict[FrameKey, int], integers: "array[int]", scores: "array[float]", boxes: "array[float]",
    synced: bool,
) -> None:  # fmt: skip
    """Append one Object to the columns: frame, type, zone, points, difficulty; score; box."""
    segment, time, camera, zone, label, score = b"", 0, 0, 0, b"", 1.0
    for number, kind, value in _fields(data):
        if number == 1:
            label = _message(value)
        elif number == 2 and kind == _FLOAT:
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3:
            zone = _number(value)
        elif number == 4:
            segment = _message(value)
        elif number == 5:
            time = _number(value)
            time -= (time >> 63) << 64  # a negative int64 is written as its complement
        elif number == 6:
            camera = _number(value)
    type_, difficulty, points, top_points = 0, 0, 0, 0
    box = synced_box = visible = b""
    for number, _, value in _fields(label):
        if number == 1:
            box = _message(value)
        elif number == 3:
            type_ = _number(value)
        elif number == 5:
            difficulty = _number(value)
        elif number == 7:
            points = _number(value)
        elif synced and number == 11:
            visible = _message(value)
        elif synced and number == 12:
            synced_box = _message(value)
        elif synced and number == 13:
            top_points = _number(value)
    if synced:
        box, points = synced_box, top_points if visible else 0
    if type_ > 4 or difficulty > 2 or points > 1 << 31:
        raise ValueError(f"type {type_}, difficulty {difficulty} or {points} points are not Waymo's")
    frame = keys.setdefault((segment.decode(), time, camera), len(keys))
    integers.extend((frame, type_, bool(zone), points, difficulty))
    scores.append(score)
    boxes.extend(_read_box(box))


def _read_box(data: bytes) -> tuple[float, ...]:
    if len(data) == _BOX.size:
        values = _BOX.unpack(data)
        if values[::2] == _BOX_TAGS:
            return values[1::2]
    found = [0.0] * 7
    for number, kind, value in _fields(data):
        if number <= 7 and kind == _DOUBLE:
            (found[number - 1],) = struct.unpack("<d", _message(value))
    return tuple(found)


def _fields(data: bytes) -> Iterator[tuple[int, int, _Value]]:
    """Number, wire type and value of each field of a message."""
    at, size = 0, len(data)
    while at < size:
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield tag >> 3, kind, value
            continue
        if kind == _BYTES:
            length, at = _read_varint(data, at)
        elif kind in (_DOUBLE, _FLOAT):
            length = 8 if kind == _DOUBLE else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at} is none that Waymo's messages have")
        if not tag >> 3 or at + length > size:
            raise ValueError(f"a field of {length} bytes at byte {at} runs over the end at {size}")
        yield tag >> 3, kind, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 128:
        return value, at + 1
    value &= 127
    for shift in range(7, 70, 7):
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
    raise ValueError(f"a number at byte {at} has more than 10 bytes")


def _message(value: _Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a message, a text or a decimal number belongs")
    return value


def _number(value: _Value) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes stand where a whole number belongs")
    return value


def _key(key: FrameKey) -> bytes:
    segment, time, camera = key
    return _tagged(4, segment.encode()) + b"\x28" + _varint(time) + (b"\x30" + _varint(camera) if camera else b"")


def _tagged(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | _BYTES,)) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)
