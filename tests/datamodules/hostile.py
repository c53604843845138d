"""Rows of known worth: right ones of every kind, and wrong ones, each with the code it has to be refused by.

What is right and wrong is decided here, by how a row is made, and by none of the package's own checks.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

Row = dict[str, object]
TEXTS = (
    "Which digit is it?",
    "Welche Farbe hat das Rechteck? Grüße",
    "这个图形是什么颜色？",
    "ما هو اللون؟",
    "🙂👩‍👩‍👧 emoji, e\u0301 combining, \u200bzero width",
    "Tabs\tand\nlines\n\n```python\nprint('<|im_end|>')\n```",
    "Tokens as text: <|im_end|> <|image_pad|> <|endoftext|> </s> <fake_token_around_image>",
    "Solve $\\frac{a}{b} = 3$ & mind < and > and {braces} and {{ 7 * 7 }} and %s",
    "'; DROP TABLE prompts; -- __import__('os').system('true')",
    "x" * 3000,
)
SIDES = {"bad": 12, "good": 20}
MAX_MIB = 0.25
"""Of an image file in these tests."""


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 20, height: int = 12, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel: 8-byte signature, IHDR chunk, beginning of an IDAT chunk."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


@cache
def png_bomb(side: int) -> bytes:
    """A whole and valid PNG of ``side`` x ``side`` black pixels: a thousandth of its size when decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = bytes(side + 1)
    pixels = b"".join([*(packer.compress(line) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_images(root: Path) -> None:
    """Files below ``root``, and one beside it that no row may reach."""
    (root / "deep" / "er").mkdir(parents=True)
    (root.parent / "secret.png").write_bytes(encoded(noise()))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.full((12, 20), 0x8040, dtype=np.uint16))
    files = {
        "rgb.png": encoded(noise()),
        "photo.jpg": encoded(noise(60, 40), "JPEG"),
        "turned.jpg": encoded(noise(), "JPEG", exif=exif),
        "cmyk.jpg": encoded(noise().convert("CMYK"), "JPEG"),
        "grey16.png": encoded(deep),
        "palette.png": encoded(noise().convert("P")),
        "alpha.png": encoded(noise().convert("RGBA")),
        "a b é.webp": encoded(noise(), "WEBP"),
        "deep/er/no_suffix": encoded(noise()),
        "frame:12.png": encoded(noise()),
        "polyglot.png": encoded(noise()) + b"PK\x03\x04 and a script: <?php system('id'); ?>",
        "bad.gif": encoded(noise(), "GIF"),
        "bad.bmp": encoded(noise(), "BMP"),
        "bad.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "bad.txt": b"no image at all",
        "bad.pdf.png": b"%PDF-1.7\n" + bytes(100),
        "moving.webp": encoded(noise(), "WEBP", save_all=True, append_images=[noise().rotate(90)]),
        "moving.png": encoded(noise(), "PNG", save_all=True, append_images=[noise(seed=1)]),
        "bomb.png": png_bomb(7000),
        "header_bomb.png": png_header(60_000, 60_000),
        "heavy.png": encoded(noise(320, 320)),
        "cut.jpg": encoded(noise(60, 40), "JPEG")[:900],
        "cut.png": encoded(noise(60, 40))[:-200],
        "cut.webp": encoded(noise(60, 40), "WEBP")[:-100],
        "cut_header.png": encoded(noise())[:20],
        "empty.png": b"",
        "dot.png": encoded(noise(1, 1)),
        "line.png": encoded(noise(1, 1000)),
        "strip.png": encoded(noise(802, 4)),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    (root / "link.png").symlink_to("deep/er/no_suffix")
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "up").symlink_to(root.parent)
    (root / "self.png").symlink_to("self.png")
    os.mkfifo(root / "pipe.png")


GOOD_IMAGES = (
    *("rgb.png", "photo.jpg", "turned.jpg", "cmyk.jpg", "grey16.png", "palette.png", "alpha.png", "a b é.webp"),
    *("deep/er/no_suffix", "frame:12.png", "polyglot.png", "link.png", "./rgb.png", "deep/../rgb.png"),
)
BAD_IMAGES: dict[str, tuple[str, ...]] = {
    "E06": ("nowhere.png", "deep/nowhere.png", "rgb.png/x", "n" * 300, "self.png"),
    "E07": (
        *("../secret.png", "deep/../../secret.png", "up/secret.png", "out.png", "pipe.png", "deep", ".", ".."),
        *("/etc/passwd", "/proc/self/environ", "/dev/zero", "rgb.png\0.jpg", "up/../up/secret.png"),
    ),
    "E08": ("bad.gif", "bad.bmp", "bad.svg", "bad.txt", "bad.pdf.png", "moving.webp", "moving.png"),
    "E09": ("bomb.png", "header_bomb.png", "heavy.png"),
    "E10": ("cut.jpg", "cut.png", "cut.webp", "cut_header.png", "empty.png"),
    "E11": ("dot.png", "line.png", "strip.png"),
    "E12": (
        *("http://a.org/b.png", "HTTPS://a.org/b.png", "file:///etc/passwd", "file:etc/passwd", "//a.org/b.png"),
        *("data:image/png;base64,AAAA", " http://a", "http:\\\\a", "s3://a/b.png", "http://0x7f000001/", "\\\\a\\b"),
    ),
}
NESTED = {"a": [1, {"b": [None, True, 1e-9, "é"]}], "": {}}


@dataclass
class Case:
    """One line of a data file."""

    line: bytes
    code: str = ""
    """By which it must be refused; empty for a valid row."""
    repairs: set[str] = field(default_factory=set)


class Maker:
    """Draws cases; equal seeds give equal cases."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ids: list[str] = []
        self.made = 0

    def draw(self) -> Case:
        """A valid row, seven times of ten, or a broken one."""
        self.made += 1
        if self.random.random() < 0.7:
            return self.right()
        return self.random.choice(WRONG)(self)

    def right(self) -> Case:
        row, repairs = self.row()
        return Case(json.dumps(row, ensure_ascii=self.random.random() < 0.5).encode(), "", repairs)

    def row(self) -> tuple[Row, set[str]]:
        """A valid row, and the codes of what is repaired in it."""
        rng, repairs = self.random, set[str]()
        text, images = rng.choice(TEXTS), [rng.choice(GOOD_IMAGES) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
        if rng.random() < 0.1:
            text, _ = f"\x07{text}\r\n\x9b", repairs.add("W03")
        slots = len(images)
        if images and rng.random() < 0.2:
            slots, _ = 0, repairs.add("W01")
        row: Row = {"images": images if len(images) != 1 or rng.random() < 0.5 else images[0]}
        if not images and rng.random() < 0.5:
            row = rng.choice(({}, {"images": None}, {"images": ""}))
        if rng.random() < 0.5:
            row["prompt"] = "<image>" * slots + text
        else:
            row["messages"] = self.messages(text, slots)
        row["answer"] = rng.choice(("4", "Rot", 4, -0.5, [1, 2], {"x": None}, " 4 ", "<answer>4</answer>", 10**30))
        if rng.random() < 0.3:
            row["id"] = rng.choice((f"row-{self.made}", self.made, f"行{self.made}"))
            self.ids.append(str(row["id"]))
        if rng.random() < 0.3:
            row |= {"level": rng.choice((1, "hard", None, True)), "nested": NESTED, "🙂": "key"}
        if rng.random() < 0.1:
            row |= {"notes": "n" * 70_000}
            repairs.add("W04")
        if rng.random() < 0.2:
            row |= {"target": "<answer>4</answer>", "rejected": rng.choice(("<answer>5</answer>", None, ""))}
        return row, repairs

    def messages(self, text: str, slots: int) -> list[Row]:
        rng = self.random
        parts = [{"type": "image"}] * slots + [{"type": "text", "text": text}]
        if rng.random() < 0.5:  # images may be between texts
            parts.insert(0, {"type": "text", "text": "Look: "})
        content: object = parts if rng.random() < 0.5 else "<image>" * slots + text
        turns: list[Row] = [{"role": "user", "content": content}]
        if rng.random() < 0.3:
            turns.insert(0, {"role": "system", "content": "Be brief."})
        if rng.random() < 0.3:
            turns += [{"role": "assistant", "content": "Hm."}, {"role": rng.choice(("user", "tool")), "content": "?"}]
        return turns

    def spoiled(self, code: str, **columns: object) -> Case:
        """A valid text row with some columns replaced; the value ``...`` removes the column."""
        row: Row = {"prompt": self.random.choice(TEXTS), "answer": "4"} | columns
        row = {name: value for name, value in row.items() if value is not ...}
        return Case(json.dumps(row).encode(), code)


def _one_of(code: str, column: str, *values: object) -> Callable[[Maker], Case]:
    return lambda maker: maker.spoiled(code, **{column: maker.random.choice(values)})


def _raw(code: str, *lines: bytes) -> Callable[[Maker], Case]:
    return lambda maker: Case(maker.random.choice(lines), code)


def _bad_image(code: str) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        good, bad = maker.random.choice(GOOD_IMAGES), maker.random.choice(BAD_IMAGES[code])
        refs: list[object] = [bad] if maker.random.random() < 0.5 else [good, {"path": bad}]
        return maker.spoiled(code, images=refs, prompt="<image>" * len(refs) + "Which?")

    return make


def _duplicate(maker: Maker) -> Case:
    if not maker.ids:
        return maker.right()
    return maker.spoiled("E15", id=maker.random.choice(maker.ids))


USER = {"role": "user", "content": "Which?"}
SURROGATES = ("a\ud800", "\udfff", "half \ud83d of an emoji", "NUL \0 inside")
WRONG: tuple[Callable[[Maker], Case], ...] = (
    _one_of("E01", "prompt", ..., None),
    _one_of("E01", "answer", ..., None),
    _one_of("E02", "prompt", 4, 1.5, True, [], ["Which?"], {"text": "Which?"}, float("nan")),
    _one_of("E02", "answer", True, False, float("nan"), float("inf"), [float("-inf")], {"x": float("nan")}),
    _one_of("E02", "id", 1.5, True, ["a"], {}),
    _one_of("E02", "messages", "Which?", {"role": "user"}, ["Which?"], [[USER]], [{"role": "user", "content": 4}]),
    _one_of("E02", "messages", [{"role": "user", "content": [{"type": "video"}]}], [{"role": "user", "content": None}]),
    _one_of("E02", "images", [7], [None], [["rgb.png"]], [{}], {"bytes": 3}),
    _one_of("E02", "target", 4, [4], float("nan")),
    _one_of("E02", "videos", ["a.mp4"], "a.mp4", [{"path": "a.mp4"}]),
    _one_of("E03", "prompt", "", " ", "\n\t ", "\x07", "\u3000"),
    _one_of("E03", "answer", "", "  ", [], {}, "\x1b"),
    _one_of("E03", "id", "", " "),
    _one_of("E03", "messages", [{"role": "user", "content": ""}], [{"role": "user", "content": []}]),
    _one_of("E04", "prompt", *SURROGATES),
    _one_of("E04", "answer", *SURROGATES, ["\ud800"]),
    _one_of("E04", "id", *SURROGATES),
    _one_of("E04", "level", *SURROGATES, {"\ud800": 1}),
    _one_of("E04", "target", *SURROGATES),
    _one_of("E04", "messages", *([{"role": "user", "content": text}] for text in SURROGATES)),
    _one_of("E05", "prompt", "<image>Which?", "<image><image><image>Which?"),
    lambda maker: maker.spoiled("E05", prompt="<image>Which?", images=["rgb.png", "photo.jpg"]),
    lambda maker: maker.spoiled("E05", prompt="<image>" * 5 + "Which?", images=["rgb.png"] * 4),
    *map(_bad_image, BAD_IMAGES),
    *map(_bad_image, BAD_IMAGES),
    _one_of(
        "E12", "messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]
    ),
    _duplicate,
    _one_of("E16", "answer", "x" * 65_537, ["y" * 65_536]),
    _one_of("E17", "messages", [], [{"role": "human", "content": "a"}], [USER, {"role": "assistant", "content": "a"}]),
    _one_of("E17", "messages", [{"role": "tool", "content": "a"}, USER], [USER, {"role": "tool", "content": "a"}]),
    _one_of("E17", "target", [{"role": "user", "content": "a"}]),
    lambda maker: maker.spoiled("E20", target="same", rejected=" same\n"),
    _raw(
        "E02",
        b"{",
        b"[",
        b'{"prompt": "a" "answer"}',
        b"nope",
        b"null",
        b"4",
        b'["prompt"]',
        b'"text"',
        b"\xef\xbb\xbf{",
    ),
    _raw(
        "E02", b"[" * 50_000, b'{"prompt": ' * 50_000, b'{"prompt": "a", "answer": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    ),
    _raw("E02", b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "answer": 1e999}'),
    _raw("E02", b'{"prompt": "a", "answer": "4"', b'{"prompt": "a\x01", "answer": "4"}', b"\0\0\0"),
    _raw("E04", b'{"prompt": "\xff", "answer": "4"}', b'{"prompt": "\xed\xa0\x80", "answer": "4"}', b"\x80"),
)
"""One maker a kind of mistake."""
