"""What Pillow does not say about an encoded image: the number of scans of a JPEG, and where the data of a PNG end."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

from rllava_pl.datamodules.rejections import RowError

PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps between them, of the passes of an interlaced PNG (its specification, 8.2)."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers per pixel by the colour type of a PNG."""
CHUNK_BYTES = 1 << 20
"""Inflated at a time."""


def count_scans(image: Image.Image) -> int:
    """Scans of a JPEG file: their marker cannot occur within compressed data."""
    return _content(image).count(b"\xff\xda")


def in_several_scans(image: Image.Image) -> bool:
    """Whether a JPEG keeps all coefficients until its last scan: progressive, or one scan a component."""
    if image.info.get("progressive"):
        return True
    content, place, components = _content(image), 2, 0
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
        if marker in (0xC0, 0xC1):
            components = content[place + 9] if place + 9 < len(content) else 0
        if marker == 0xDA:
            return place + 4 < len(content) and content[place + 4] < components
        place += 2 + length
    return False


def check_length(file: BinaryIO, field: str) -> None:
    """Refuse (E10) a PNG whose data end before its last row, which Pillow would leave black."""
    place = file.tell()
    file.seek(8)
    chunks = _chunks(file)
    name, header = next(chunks, (b"", b""))
    if name == b"IHDR" and len(header) == 13:
        expected = _expected_bytes(header)
        if (inflated := _inflated_bytes(chunks, expected)) < expected:
            raise RowError("E10", field, f"is truncated: its data end after {inflated} of {expected} bytes")
    file.seek(place)


def _expected_bytes(header: bytes) -> int:
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * CHANNELS.get(colour, 0)
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)


def _inflated_bytes(chunks: Iterator[tuple[bytes, bytes]], enough: int) -> int:
    """Unpacked bytes of the image data, counted until there are enough; none of them is kept."""
    inflate, total = zlib.decompressobj(), 0
    for name, data in chunks:
        while name == b"IDAT" and data and total < enough and not inflate.eof:
            total += len(inflate.decompress(data, CHUNK_BYTES))
            data = inflate.unconsumed_tail
        if name == b"IEND" or total >= enough or inflate.eof:
            break
    return total


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and data of the chunks of a PNG; others than header and image data without their data."""
    while len(start := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", start)
        if name in (b"IHDR", b"IDAT"):
            yield name, file.read(length)
        else:
            file.seek(length, 1)
            yield name, b""
        file.seek(4, 1)


def _content(image: Image.Image) -> bytes:
    """The whole file; empty for an image that was passed decoded."""
    file = getattr(image, "fp", None)
    if file is None:
        return b""
    place = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(place)
    return content
