"""A PNG writer whose bytes depend on the pixels alone.

Image libraries hand the pixels to whichever zlib they were built with, and those compress the same pixels
to different bytes. Here the pixels stand uncompressed in the PNG, which the format allows ("stored" blocks)
and every reader takes: the same picture is the same file on any machine, and it is quick to write.
"""

import struct
import zlib

import numpy as np
import numpy.typing as npt

_STORED_BLOCK = 65535


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode an RGB image ``[height, width, 3]`` uint8 as an uncompressed PNG file."""
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each row opens with filter type 0, "none"
    rows[:, 1:] = image.reshape(height, 3 * width)
    raw = rows.tobytes()
    stream = [b"\x78\x01"]
    for start in range(0, len(raw), _STORED_BLOCK):
        block = raw[start : start + _STORED_BLOCK]
        last = start + _STORED_BLOCK >= len(raw)
        stream += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    stream.append(struct.pack(">I", zlib.adler32(raw)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"".join(stream)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
