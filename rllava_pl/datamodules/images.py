"""Images of a row: found, checked by their header, then decoded to RGB.

The header is read before any pixel is decoded, so a small file that unpacks to gigabytes costs nothing. A truncated
image is refused; Pillow's process-wide switch that accepts those stays off, it would fill the missing part with grey.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rllava_pl.datamodules.rejections import RowError

FORMATS = ("JPEG", "PNG", "WEBP")
SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP", re.DOTALL)
MIB = 1024 * 1024
URL = re.compile(r"(?:[a-z][a-z0-9+.-]+://|data:)", re.IGNORECASE)
SHORTEST_SIDE_PIXELS, LARGEST_ASPECT = 2, 200
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""What Pillow raises for broken image data."""

ImageRef = object
"""A path, bytes, ``{"bytes": ...}``, ``{"path": ...}`` or a Pillow image; anything else is refused."""


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of one source within limits."""

    root: Path | None
    """Folder that paths are relative to and never leave; None refuses paths."""
    max_pixels: int = 40_000_000
    """Largest width x height."""
    max_bytes: int = 64 * MIB
    """Largest file or buffer."""

    def check(self, ref: ImageRef, field: str) -> None:
        """Refuse what ``load`` could not read, at less cost.

        JPEGs are read through to their end but only scaled-down pixels are computed.

        Raises:
            RowError: E02, E06 to E12.
        """
        with self._open(ref, field) as image:
            image.draft("L", (1, 1))
            _decode(image, field)

    def load(self, ref: ImageRef, field: str) -> Image.Image:
        """The image in RGB, upright (EXIF orientation applied), transparency on white.

        Raises:
            RowError: E02, E06 to E12.
        """
        with self._open(ref, field) as image:
            _decode(image, field)
            return to_rgb(image)

    @contextmanager
    def _open(self, ref: ImageRef, field: str) -> Iterator[Image.Image]:
        """The image with its header read and checked, closed again at the end."""
        if isinstance(ref, Image.Image):  # decoded by its owner, who keeps it
            self._check_header(ref, field)
            yield ref.copy()
            return
        with _open_header(self._find(ref, field), field) as image:
            self._check_header(image, field)
            if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with its own preview
                raise RowError("E08", field, "is an animation; give single frames")
            yield image

    def _find(self, ref: ImageRef, field: str) -> io.BytesIO | Path:
        """Where the encoded image is."""
        if isinstance(ref, Mapping):
            ref = ref.get("bytes") if ref.get("bytes") is not None else ref.get("path")
        if isinstance(ref, bytes):
            self._check_bytes(len(ref), field)
            return io.BytesIO(ref)
        if not isinstance(ref, str):
            expected = 'a path, bytes, {"bytes": ...} or {"path": ...}'
            raise RowError("E02", field, f"is {type(ref).__name__}; an image is {expected}")
        path = self._inside_root(ref, field)
        self._check_bytes(path.stat().st_size, field)
        return path

    def _inside_root(self, ref: str, field: str) -> Path:
        if URL.match(ref):
            raise RowError("E12", field, f"{ref[:60]!r} is a URL; download the image and give its path")
        if self.root is None:
            raise RowError("E07", field, f"{ref!r} is a path, but this source has no folder; set image_root")
        if Path(ref).is_absolute():
            raise RowError("E07", field, f"{ref!r} is absolute; give it relative to image_root ({self.root})")
        try:
            root, path = self.root.resolve(), (self.root / ref).resolve()
            found = path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # name too long, NUL inside, loop of links
            raise RowError("E06", field, f"{ref[:60]!r} is no path: {error}") from error
        if not path.is_relative_to(root):
            raise RowError("E07", field, f"{ref!r} leads outside image_root ({root})")
        if not found:
            raise RowError("E06", field, f"{ref!r} is not in image_root ({root})")
        if not path.is_file():
            raise RowError("E07", field, f"{ref!r} is not a regular file")
        return path

    def _check_bytes(self, size: int, field: str) -> None:
        if size > self.max_bytes:
            raise RowError("E09", field, f"has {size / MIB:.1f} MiB; max_image_mib is {self.max_bytes / MIB:g}")

    def _check_header(self, image: Image.Image, field: str) -> None:
        width, height = image.size
        if width * height > self.max_pixels:
            raise RowError("E09", field, f"is {width} x {height} = {width * height} pixels; limit {self.max_pixels}")
        short, long = min(image.size), max(image.size)
        if short < SHORTEST_SIDE_PIXELS or long > LARGEST_ASPECT * short:
            limits = f"sides from {SHORTEST_SIDE_PIXELS} pixels, ratio up to {LARGEST_ASPECT}"
            raise RowError("E11", field, f"is {width} x {height}; {limits}")


def _open_header(source: io.BytesIO | Path, field: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # our own limit is checked next, and is stricter than the warning's by default
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        if SIGNATURE.match(_first_bytes(source)):
            raise RowError("E10", field, "begins like an image, but its header is cut or broken") from error
        raise RowError("E08", field, f"is no {', '.join(FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise RowError("E09", field, str(error)) from error
    except DECODE_ERRORS as error:
        raise RowError("E10", field, f"has a broken header: {error}") from error


def _first_bytes(source: io.BytesIO | Path) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:12]
    with source.open("rb") as file:
        return file.read(12)


def _decode(image: Image.Image, field: str) -> None:
    try:
        image.load()
    except DECODE_ERRORS as error:
        raise RowError("E10", field, f"is truncated or broken: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF orientation applied, transparent parts on white, 16-bit grey scaled to 8 bit."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
