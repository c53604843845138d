"""Images: what is read, what is refused by which code, and how pixels are converted."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile

from rllava_pl.datamodules.images import ImageReader
from rllava_pl.datamodules.rejections import RowError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel: 8-byte signature, IHDR chunk, beginning of an IDAT chunk."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


def code_of(reader: ImageReader, ref: object) -> set[str]:
    """The code that both ``check`` and ``load`` give."""
    codes = set()
    for read in (reader.check, reader.load):
        with pytest.raises(RowError) as caught:
            read(ref, "images[0]")
        codes.add(caught.value.code)
    return codes


@pytest.fixture
def reader(tmp_path) -> ImageReader:
    (tmp_path / "root").mkdir()
    return ImageReader(tmp_path / "root")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_every_kind_of_reference_gives_the_same_image(reader, kind):
    data = encoded(noise(), kind)
    (reader.root / "a b.img").write_bytes(data)  # the content decides, not the suffix
    refs = [data, "a b.img", {"path": "a b.img"}, {"bytes": data, "path": None}, {"bytes": None, "path": "a b.img"}]
    for ref in refs:
        reader.check(ref, "images[0]")
    pictures = [reader.load(ref, "images[0]") for ref in refs]
    assert {(p.size, p.mode) for p in pictures} == {((20, 12), "RGB")}
    assert len({p.tobytes() for p in pictures}) == 1


def test_pillow_image_stays_open_and_unchanged(reader):
    image = noise().convert("L")
    reader.check(image, "images[0]")
    assert reader.load(image, "images[0]").mode == "RGB"
    assert image.mode == "L"
    image.load()


def test_exif_orientation_is_applied(reader):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side, to be turned by 90 degrees
    data = encoded(noise(20, 12), "JPEG", exif=exif)
    assert reader.load(data, "images[0]").size == (12, 20)


def test_transparency_becomes_white(reader):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert reader.load(encoded(clear), "images[0]").getpixel((0, 0)) == (255, 255, 255)


def test_palette_and_cmyk_become_rgb(reader):
    for data in (encoded(noise().convert("P")), encoded(noise().convert("CMYK"), "JPEG")):
        assert reader.load(data, "images[0]").mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped(reader):
    deep = Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16))
    assert reader.load(encoded(deep), "images[0]").getpixel((0, 0)) == (0x80,) * 3


def test_photo_with_an_embedded_preview_is_read(reader):
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise(10, 6)])
    assert reader.load(data, "images[0]").size == (20, 12)


@pytest.mark.parametrize("ref", [7, None, ["a.png"], {"path": 3}, {}])
def test_e02_value_that_is_no_image_reference_is_refused(reader, ref):
    assert code_of(reader, ref) == {"E02"}


@pytest.mark.parametrize("ref", ["none.png", "a" * 5000, "a\ud800", "none/../none.png"])
def test_e06_missing_image_is_refused(reader, ref):
    assert code_of(reader, ref) == {"E06"}


def test_e07_path_that_leaves_the_folder_is_refused(reader):
    outside = reader.root.parent / "outside.png"
    outside.write_bytes(encoded(noise()))
    (reader.root / "link.png").symlink_to(outside)
    (reader.root / "proc").symlink_to("/proc/self")
    (reader.root / "folder").mkdir()
    os.mkfifo(reader.root / "pipe.png")
    for ref in ("../outside.png", str(outside), "link.png", "proc/environ", "/proc/self/mem", "a\0b", "folder", "."):
        assert code_of(reader, ref) == {"E07"}, ref
    assert code_of(reader, "pipe.png") == {"E07"}  # without waiting for a writer


def test_links_inside_the_folder_are_followed(reader):
    (reader.root / "deep").mkdir()
    (reader.root / "deep" / "inside.png").write_bytes(encoded(noise()))
    (reader.root / "inner.png").symlink_to("deep/inside.png")
    (reader.root / "shallow").symlink_to("deep")
    for ref in ("inner.png", "shallow/inside.png", "deep/../deep/inside.png"):
        reader.check(ref, "images[0]")


def test_link_that_replaces_a_file_after_the_check_is_not_followed(reader, monkeypatch):
    """Whoever can write into the folder exchanges a picture, or a folder, between the check and the opening."""
    secret = reader.root.parent / "secret"
    secret.mkdir()
    (secret / "a.png").write_bytes(encoded(noise()))
    for trap, ref in ((reader.root / "a.png", "a.png"), (reader.root / "sub", "sub/a.png")):
        with monkeypatch.context() as patch:
            patch.setattr(type(trap), "resolve", lambda path: path.absolute())  # what it was a moment ago
            trap.symlink_to(secret / "a.png" if trap.suffix else secret)
            assert code_of(reader, ref) <= {"E06", "E07"}


def test_e07_path_without_a_folder_is_refused():
    assert code_of(ImageReader(None), "a.png") == {"E07"}


def test_e08_other_formats_and_animations_are_refused(reader):
    moving = encoded(noise(), "WEBP", save_all=True, append_images=[noise().rotate(90)])
    for data in (encoded(noise(), "BMP"), encoded(noise(), "GIF"), b"no image", b"<svg/>", b"%PDF-1.7", moving):
        assert code_of(reader, data) == {"E08"}


def test_options_allow_other_formats_and_first_frames(reader):
    moving = encoded(noise(), "GIF", save_all=True, append_images=[noise().rotate(90)])
    lenient = replace(reader, formats=("BMP", "GIF"), animations="first_frame")
    for data in (encoded(noise(), "BMP"), moving):
        lenient.check(data, "images[0]")
        assert lenient.load(data, "images[0]").size == (20, 12)
    assert code_of(replace(lenient, animations="reject"), moving) == {"E08"}
    assert code_of(lenient, encoded(noise(), "PNG")) == {"E08"}


def test_e10_empty_file_is_refused(reader):
    (reader.root / "empty.png").touch()
    assert code_of(reader, b"") == code_of(reader, "empty.png") == {"E10"}


@pytest.mark.parametrize("side", [7000, 12_000, 40_000])
def test_e09_too_many_pixels_are_refused_by_the_header(reader, side):
    assert code_of(reader, png_header(side, side)) == {"E09"}


def test_e09_too_large_file_is_refused(tmp_path):
    data = encoded(noise())
    (tmp_path / "a.png").write_bytes(data)
    small = ImageReader(tmp_path, max_bytes=len(data) - 1)
    assert code_of(small, data) == code_of(small, "a.png") == {"E09"}
    ImageReader(tmp_path, max_bytes=len(data)).check(data, "images[0]")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_e10_truncated_image_is_refused(reader, kind):
    data = encoded(noise(60, 60), kind)
    assert code_of(reader, data[: len(data) // 2]) == {"E10"}
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (401, 2)])
def test_e11_degenerate_image_is_refused(reader, size):
    assert code_of(reader, encoded(Image.new("RGB", size))) == {"E11"}
    reader.check(encoded(Image.new("RGB", (400, 2))), "images[0]")


URLS = """https://a.org/b.png|file:///b.png|data:image/png;base64,AAAA|HTTP://a/b|http:/a|http:a| https://a|//a.org/b
http:\\\\a|\\\\a\\b|s3://a/b|hf://a|zip::a.zip|ftp://a|http://2130706433/|http://[::ffff:7f00:1]/|file:b.png|gopher://a"""


@pytest.mark.parametrize("ref", URLS.replace("\n", "|").split("|"))
def test_e12_url_is_refused(reader, ref):
    assert code_of(reader, ref) == code_of(reader, {"path": ref}) == {"E12"}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damaged_file_gives_a_code_or_an_image(reader, kind):
    rng, data = np.random.default_rng(1), encoded(noise(), kind)
    for _ in range(100):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(256)
        codes = []
        for read in (reader.check, reader.load):
            try:
                read(bytes(damaged), "images[0]")
                codes.append("fine")
            except RowError as error:
                codes.append(error.code)
        assert codes[0] == codes[1], "what the audit accepts can be loaded"
