"""PNGs whose data end early and JPEGs of many scans, made byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rllava_pl.datamodules.encoded import PASSES, in_several_scans
from rllava_pl.datamodules.images import MOST_SCANS, ImageReader
from rllava_pl.datamodules.rejections import RowError

READER = ImageReader(None)
BITS = {0: 8, 2: 24, 3: 2, 4: 16, 6: 32}
"""Of a pixel, by colour type; the palette has four colours."""


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, colour: int = 2, interlaced: bool = False, missing: int = 0, **more: bytes) -> bytes:
    """A black image whose rows are counted one by one, without the last ``missing`` bytes."""
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    rows = [
        bytes(1 + -(-len(range(x, width, dx)) * BITS[colour] // 8))
        for x, y, dx, dy in passes
        for _ in range(y, height, dy)
        if range(x, width, dx)
    ]
    data = b"".join(rows)
    header = struct.pack(">IIBBBBB", width, height, 2 if colour == 3 else 8, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(12)) if colour == 3 else b""
    between = b"".join(chunk(name.encode(), content) for name, content in more.items())
    body = zlib.compress(data[: len(data) - missing])
    halves = chunk(b"IDAT", body[: len(body) // 2]) + chunk(b"IDAT", body[len(body) // 2 :])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + between + halves + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "interlaced"])
@pytest.mark.parametrize("colour", BITS)
@pytest.mark.parametrize("size", [(2, 2), (3, 5), (8, 8), (33, 17), (600, 700)])
def test_png_that_lacks_one_byte_is_refused(size, colour, interlaced):
    whole = png(*size, colour, interlaced)
    READER.check(whole, "image")
    assert READER.load(whole, "image").size == size
    with pytest.raises(RowError, match=r"is truncated: its data end after \d+ of \d+ bytes"):
        READER.check(png(*size, colour, interlaced, missing=1), "image")


def test_png_written_by_pillow_is_accepted():
    pixels = np.random.default_rng(0).integers(0, 255, (61, 47, 4), dtype=np.uint8)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        file = io.BytesIO()
        image = (
            Image.fromarray(pixels[..., 0].astype(np.uint16))
            if mode == "I;16"
            else Image.fromarray(pixels).convert(mode)
        )
        image.save(file, "PNG")
        READER.check(file.getvalue(), "image")


def test_broken_table_of_transparent_colours_is_refused():
    with pytest.raises(RowError, match="palette index out of range"):
        READER.check(png(8, 8, colour=3, tRNS=bytes(257)), "image")


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(("options", "several"), [({}, False), ({"progressive": True}, True)])
def test_jpeg_with_several_scans_is_recognised(options, several):
    assert in_several_scans(Image.open(io.BytesIO(jpeg(**options)))) is several


def test_preview_in_a_jpeg_header_is_not_a_scan():
    exif = Image.Exif()
    exif[0x9286] = jpeg().decode("latin-1")
    assert not in_several_scans(Image.open(io.BytesIO(jpeg(exif=exif))))


def test_jpeg_with_too_many_scans_is_refused():
    """libjpeg would go over all pixels once a scan."""
    whole = jpeg()
    start = whole.index(b"\xff\xda")
    scan = whole[start:-2]
    with pytest.raises(RowError, match=f"is a JPEG of {MOST_SCANS + 1} scans; the limit is {MOST_SCANS}"):
        READER.check(whole[:-2] + scan * MOST_SCANS + b"\xff\xd9", "image")


def test_ratio_of_sides_is_checked_after_scaling_down():
    """150 pixels become 144 and 30,000 become 28,963: 201 to 1."""
    file = io.BytesIO()
    Image.new("L", (30_000, 150)).save(file, "PNG")
    READER.check(file.getvalue(), "image")
    with pytest.raises(RowError, match="is 30000 x 150, scaled down to"):
        ImageReader(None, resize_above=4_194_304).check(file.getvalue(), "image")
