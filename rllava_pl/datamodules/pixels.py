"""From a decoded image of any kind to upright RGB of a bounded size, without a second full copy in between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from PIL import ExifTags, Image, ImageOps

BAND_ROWS = 256
"""Rows that are converted at a time."""
ORIENTATION = ExifTags.Base.Orientation
PIXEL_COST: Mapping[str, float] = MappingProxyType({"WEBP": 3.2, "progressive": 1.5})
"""Memory to decode a pixel, relative to the others: WebP goes through an animation canvas, progressive JPEGs keep all
their coefficients. With the default limit of 40 million pixels, no image takes more than 256 MB."""


def orientation(image: Image.Image) -> int:
    """1 (upright) to 8, from EXIF; any other value is 1."""
    value = image.getexif().get(ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def fit(width: int, height: int, limit: int) -> tuple[int, int]:
    """The size scaled down to at most ``limit`` pixels, both sides by sqrt(limit / (W H)), floored, at least 1.

    >>> fit(4000, 3000, 3_000_000), fit(400, 300, 3_000_000), fit(400, 300, 0)
    ((2000, 1500), (400, 300), (400, 300))
    """
    if not limit or width * height <= limit:
        return width, height
    scale = math.sqrt(limit / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def to_rgb(image: Image.Image, limit: int = 0) -> Image.Image:
    """Upright RGB: EXIF orientation applied, transparent parts on white, 16-bit grey scaled to 8 bit.

    Args:
        image: Decoded.
        limit: Larger images are scaled down to this many pixels; 0 keeps their size.
    """
    size = fit(*image.size, limit)
    rgb = _in_bands(image, factor=min(image.width // size[0], image.height // size[1]))
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    rgb.getexif()[ORIENTATION] = orientation(image)
    return ImageOps.exif_transpose(rgb)


def _in_bands(image: Image.Image, factor: int) -> Image.Image:
    """RGB of the same orientation, averaged over squares of ``factor`` x ``factor`` pixels."""
    width, height = image.size
    rgb = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, BAND_ROWS * factor):
        band = image.crop((0, top, width, min(top + BAND_ROWS * factor, height)))
        if band.mode.startswith("I"):
            band = Image.fromarray((np.asarray(band) >> 8).clip(0, 255).astype(np.uint8))
        if band.has_transparency_data:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        band = band.convert("RGB")
        rgb.paste(band.reduce(factor) if factor > 1 else band, (0, top // factor))
    return rgb
