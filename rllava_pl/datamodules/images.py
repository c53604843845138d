"""Images of a row: found, checked by their header, then decoded to RGB.

The header is read before any pixel is decoded, so a small file that unpacks to gigabytes costs nothing. A truncated
image is refused; Pillow's process-wide option that accepts those stays off: it fills the missing part with grey.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, get_args

from PIL import Image, UnidentifiedImageError

from rllava_pl.datamodules.encoded import check_length, count_scans, in_several_scans
from rllava_pl.datamodules.paths import open_inside
from rllava_pl.datamodules.pixels import PIXEL_COST, fit, orientation, to_rgb
from rllava_pl.datamodules.rejections import RowError

ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
Animations = Literal["reject", "first_frame"]
FORMATS: tuple[ImageFormat, ...] = ("JPEG", "PNG", "WEBP")
SIGNATURES: Mapping[str, re.Pattern[bytes]] = MappingProxyType(
    {"JPEG": re.compile(rb"\xff\xd8\xff"), "PNG": re.compile(rb"\x89PNG"), "WEBP": re.compile(rb"(?s)RIFF....WEBP")}
)
MIB = 1024 * 1024
SHORTEST_SIDE_PIXELS, LARGEST_ASPECT = 2, 200
MOST_SCANS = 100
"""Passes over a JPEG; encoders make up to ten, and each costs time whatever its size in the file."""
DECODE_ERRORS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
DECODE_ERRORS += (AttributeError, OverflowError, struct.error, zlib.error)
"""What Pillow raises for broken image data."""

ImageRef = object
"""A path, bytes, ``{"bytes": ...}``, ``{"path": ...}`` or a Pillow image; anything else is refused."""


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of one source within limits."""

    root: Path | None
    """Folder that paths are relative to and never leave; None refuses paths."""
    max_pixels: int = 40_000_000
    """Largest width x height that is decoded; less by ``PIXEL_COST`` for kinds that take more memory."""
    max_bytes: int = 64 * MIB
    """Largest file or buffer."""
    formats: Sequence[ImageFormat] = FORMATS
    """Formats by Pillow's names."""
    animations: Animations = "reject"
    """Whether an animation is refused or read as its first frame."""
    resize_above: int = 0
    """Larger images are scaled down to this many pixels; 0 keeps their size."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.formats if name not in get_args(ImageFormat)]:
            raise ValueError(f"image_formats is {unknown[0]!r}; it is one of {', '.join(get_args(ImageFormat))}")
        if self.animations not in get_args(Animations):
            raise ValueError(f"animations is {self.animations!r}; it is one of {', '.join(get_args(Animations))}")

    def check(self, ref: ImageRef, field: str) -> None:
        """Refuse an image that ``load`` could not read, at less cost.

        JPEGs are read to their end, but only scaled-down pixels are computed.

        Raises:
            RowError: E02, E06 to E12.
        """
        with self._open(ref, field) as image, _decoding(field):
            if image.format == "PNG" and (file := getattr(image, "fp", None)):
                check_length(file, field)
            image.draft("L", (1, 1))
            image.load()
            orientation(image)
            if image.has_transparency_data or image.mode == "P":
                to_rgb(image, self.resize_above)  # a palette can be broken, too

    def load(self, ref: ImageRef, field: str) -> Image.Image:
        """The image in RGB, upright (EXIF orientation applied), transparency on white, scaled down if it is too large.

        Raises:
            RowError: E02, E06 to E12.
        """
        with self._open(ref, field) as image, _decoding(field):
            if (size := fit(*image.size, self.resize_above)) != image.size:
                image.draft(None, size)  # JPEGs decode at 1/2, 1/4 or 1/8, never below this size
            image.load()
            return to_rgb(image, self.resize_above)

    @contextmanager
    def _open(self, ref: ImageRef, field: str) -> Iterator[Image.Image]:
        """The image with its header read and checked, closed again at the end."""
        if isinstance(ref, Mapping):
            ref = ref.get("bytes") if isinstance(ref.get("bytes"), bytes) else ref.get("path")
        if isinstance(ref, Image.Image):  # already decoded
            self._check_header(ref, field)
            yield ref.copy()
            return
        if not isinstance(ref, bytes | str):
            expected = 'a path, bytes, {"bytes": ...} or {"path": ...}'
            raise RowError("E02", field, f"is {type(ref).__name__}; an image is {expected}")
        with io.BytesIO(ref) if isinstance(ref, bytes) else open_inside(self.root, ref, field) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            self._check_bytes(size, field)
            with self._open_header(file, field) as image:
                self._check_header(image, field)
                yield image

    def _check_bytes(self, size: int, field: str) -> None:
        if size == 0:
            raise RowError("E10", field, "is empty; an image file has at least a header")
        if size > self.max_bytes:
            raise RowError("E09", field, f"has {size / MIB:.1f} MiB; max_image_mib is {self.max_bytes / MIB:g}")

    def _open_header(self, file: BinaryIO, field: str) -> Image.Image:
        with _decoding(field, "has a broken header"):  # our own limit is checked next, and is stricter than Pillow's
            try:
                return Image.open(file, formats=list(self.formats))
            except UnidentifiedImageError as error:
                file.seek(0)
                start, allowed = file.read(12), ", ".join(self.formats)
                if any(name in self.formats and signature.match(start) for name, signature in SIGNATURES.items()):
                    reason = "begins like an image, but its header is truncated or broken"
                    raise RowError("E10", field, reason) from error
                raise RowError("E08", field, f"is not a {allowed} image; convert it, or allow its format") from error

    def _check_header(self, image: Image.Image, field: str) -> None:
        width, height = image.size
        kind = "progressive" if image.format in ("JPEG", "MPO") and in_several_scans(image) else image.format
        limit = int(self.max_pixels / PIXEL_COST.get(kind or "", 1.0))
        if width * height > limit:
            of_kind = f" of a {kind} image" if limit < self.max_pixels else ""
            pixels = f"is {width} x {height} = {width * height} pixels"
            raise RowError("E09", field, f"{pixels}; the limit{of_kind} is {limit}")
        size = fit(width, height, self.resize_above)
        short, long = min(size), max(size)
        if short < SHORTEST_SIDE_PIXELS or long > LARGEST_ASPECT * short:
            limits = f"sides from {SHORTEST_SIDE_PIXELS} pixels, ratio up to {LARGEST_ASPECT}"
            scaled = f", scaled down to {size[0]} x {size[1]}" if size != image.size else ""
            raise RowError("E11", field, f"is {width} x {height}{scaled}; {limits}")
        moving = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo and its preview
        if moving and self.animations == "reject":
            raise RowError("E08", field, "is an animation; give single frames, or set animations: first_frame")
        if image.format in ("JPEG", "MPO") and (scans := count_scans(image)) > MOST_SCANS:
            raise RowError("E09", field, f"is a JPEG of {scans} scans; the limit is {MOST_SCANS}")


@contextmanager
def _decoding(field: str, problem: str = "is truncated or broken") -> Iterator[None]:
    """Turn what Pillow raises for broken data into a ``RowError``; warnings about metadata are of no use."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("E09", field, str(error)) from error
    except DECODE_ERRORS as error:
        raise RowError("E10", field, f"{problem}: {error}") from error
