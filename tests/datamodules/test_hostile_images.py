"""Images made to hurt: what each costs in memory, and by which rule it is refused or converted."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rllava_pl.datamodules.images import MIB, ImageReader
from rllava_pl.datamodules.rejections import RowError
from tests.datamodules.hostile import encoded, noise, png_bomb, png_header

LIMIT_MIB = 256
RESIZED = 4_194_304
READER = ImageReader(root=None, resize_above=RESIZED)


def memory_mib(name: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def growth_mib(action: Callable[[], None]) -> float:
    """By how much the process grew at most while ``action`` ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    action()
    return memory_mib("VmHWM") - before


def code_of(data: bytes) -> str:
    """The code an image is refused by, or mode and size of what it becomes; ``check`` and ``load`` agree."""
    found = set()
    for read in (READER.check, READER.load):
        try:
            image = read(data, "images[0]")
            found.add("fine")
        except RowError as error:
            found.add(error.code)
    (one,) = found
    return one if one != "fine" else f"{image.mode} {image.width}x{image.height}"


def animated(kind: str) -> bytes:
    return encoded(noise(), kind, save_all=True, append_images=[noise(seed=1)])


def text_bomb() -> bytes:
    """A PNG whose comment unpacks to 32 MiB."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "a" * (32 * MIB), zip=True)
    return encoded(noise(), "PNG", pnginfo=info)


def many_scans() -> bytes:
    """A progressive JPEG with a scan repeated a thousand times; each costs a pass over all coefficients."""
    data = encoded(noise(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + b"\xff\xd9"


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(20, 12), "JPEG", exif=exif)


SMALL: dict[str, tuple[Callable[[], bytes], str]] = {
    "bomb, whole": (lambda: png_bomb(13_300), "E09"),
    "bomb, header": (lambda: png_header(65_000, 65_000), "E09"),
    "bomb, header beyond any size": (lambda: png_header(2**31 - 1, 2**31 - 1), "E09"),
    "bomb in a comment": (text_bomb, "E10"),
    "a thousand scans": (many_scans, "E09"),
    "truncated JPEG": (lambda: encoded(noise(60, 60), "JPEG")[:1000], "E10"),
    "truncated PNG": (lambda: encoded(noise(60, 60))[:-300], "E10"),
    "1x1": (lambda: encoded(noise(1, 1)), "E11"),
    "1x5000": (lambda: encoded(noise(1, 5000)), "E11"),
    "5000x1": (lambda: encoded(noise(5000, 1)), "E11"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "E08"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "E08"),
    "HTML behind a PNG's name": (lambda: b"<html>", "E08"),
    "animated PNG": (lambda: animated("PNG"), "E08"),
    "animated WebP": (lambda: animated("WEBP"), "E08"),
    "GIF": (lambda: animated("GIF"), "E08"),
    "polyglot of PNG and ZIP": (lambda: encoded(noise()) + b"PK\x03\x04" + bytes(1000), "RGB 20x12"),
    "CMYK": (lambda: encoded(noise().convert("CMYK"), "JPEG"), "RGB 20x12"),
    "16 bits": (lambda: encoded(Image.fromarray(np.full((12, 20), 0x8040, np.uint16))), "RGB 20x12"),
    "grey with alpha": (lambda: encoded(noise().convert("LA")), "RGB 20x12"),
    "palette with alpha": (lambda: encoded(noise().convert("P"), transparency=3), "RGB 20x12"),
    "one bit": (lambda: encoded(noise().convert("1")), "RGB 20x12"),
    "on its side": (lambda: turned(6), "RGB 12x20"),
    "upside down": (lambda: turned(3), "RGB 20x12"),
    "no orientation": (lambda: turned(99), "RGB 20x12"),
}


@pytest.mark.parametrize("name", SMALL)
def test_hostile_images_are_refused_or_converted_by_rule(name):
    make, expected = SMALL[name]
    assert code_of(make()) == expected


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")


@needs_linux
@pytest.mark.parametrize("name", [name for name in SMALL if "bomb" in name or "scans" in name])
def test_refused_image_costs_no_memory(name):
    data = SMALL[name][0]()
    assert growth_mib(lambda: code_of(data)) < LIMIT_MIB / 4


def big(mode: str, side: int) -> Image.Image:
    return Image.new(mode, (side, side), {"L": 7, "I;16": 700}.get(mode, tuple(range(7, 7 + len(mode)))))


LARGE: dict[str, Callable[[], bytes]] = {
    "RGB PNG": lambda: encoded(big("RGB", 6324), compress_level=1),
    "RGBA PNG": lambda: encoded(big("RGBA", 6324), compress_level=1),
    "16-bit PNG": lambda: encoded(big("I;16", 6324), compress_level=1),
    "CMYK JPEG": lambda: encoded(big("CMYK", 6324), "JPEG"),
    "progressive JPEG": lambda: encoded(big("RGB", 5163), "JPEG", progressive=True, subsampling=0),
    "RGBA WebP": lambda: encoded(big("RGBA", 3535), "WEBP", lossless=True, method=0),
}
"""The largest of each kind that the limit of 40 million pixels allows."""


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_largest_allowed_images_stay_within_memory(name):
    data = LARGE[name]()
    found = []
    grown = growth_mib(lambda: found.append(code_of(data)))
    assert found == ["RGB 2048x2048"]
    assert grown <= LIMIT_MIB


def test_image_one_pixel_above_the_limit_is_refused():
    small = ImageReader(root=None, max_pixels=600)
    small.check(encoded(noise(30, 20)), "images[0]")
    small.check(encoded(noise(18, 10), "WEBP"), "images[0]")  # 600 / 3.2 = 187.5
    for data in (
        encoded(noise(31, 20)),
        encoded(noise(19, 10), "WEBP"),
        encoded(noise(25, 20), "JPEG", progressive=True),
    ):
        with pytest.raises(RowError) as caught:
            small.check(data, "images[0]")
        assert caught.value.code == "E09"


def test_scaling_down_keeps_the_content():
    """A picture of four even quarters is one at any size; 400 x 300 above 3,000 pixels becomes 63 x 47."""
    colors = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [90, 90, 90]]], np.uint8)
    picture = Image.fromarray(colors.repeat(150, 0).repeat(200, 1))
    for kind in ("PNG", "JPEG", "WEBP"):
        small = ImageReader(root=None, resize_above=3000).load(encoded(picture, kind), "images[0]")
        assert small.size == (63, 47)  # 400 sqrt(3000 / 120000) = 63.2, 300 sqrt(...) = 47.4
        corners = [small.getpixel(place) for place in ((10, 10), (50, 10), (10, 40), (50, 40))]
        assert np.abs(np.array(corners) - colors.reshape(4, 3)).max() <= 6, kind
    assert ImageReader(root=None).load(encoded(picture), "images[0]").size == (400, 300)


def test_bands_join_without_a_seam():
    """A gradient of 1,000 rows, more than are converted at a time, comes out as it went in."""
    rows = np.arange(1000, dtype=np.uint16)[:, None] * 64
    image = ImageReader(root=None).load(encoded(Image.fromarray(rows.repeat(10, 1))), "images[0]")
    assert (np.asarray(image)[:, 0, 0] == (rows[:, 0] >> 8)).all()


def test_reading_many_images_leaks_neither_files_nor_memory():
    """The audit drops every image again: a hundred large ones cost no more than a few."""
    if sys.platform != "linux":
        pytest.skip("reads memory from /proc")
    data = encoded(big("RGB", 1000), compress_level=1)  # 4 MB decoded
    for _ in range(5):
        READER.check(data, "images[0]")
    before = memory_mib("VmRSS")
    for _ in range(100):
        READER.check(data, "images[0]")
    assert memory_mib("VmRSS") - before < 20


def test_global_options_of_pillow_are_unchanged():
    from PIL import ImageFile

    limit = Image.MAX_IMAGE_PIXELS
    code_of(io.BytesIO(encoded(noise())).getvalue())
    assert not ImageFile.LOAD_TRUNCATED_IMAGES and limit == Image.MAX_IMAGE_PIXELS
