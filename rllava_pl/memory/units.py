"""Bytes as people write them."""

from __future__ import annotations

import re

GIB = 2**30
UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
}


def parse_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``64 GB`` or ``1.5e9``.

    Raises:
        ValueError: The text is no size.

    >>> parse_bytes("24GiB"), parse_bytes("64 GB")
    (25769803776, 64000000000)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; write a number and a unit, e.g. 24GiB or 64GB")
    return round(float(found[1]) * UNITS[found[2]])


def gib(size: float) -> float:
    """Bytes as GiB."""
    return size / GIB
