"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

GIB = 2**30


def parse_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``64 GB`` or ``1.5e9``.

    Raises:
        ValueError: The text is not a size.

    >>> parse_bytes("24GiB"), parse_bytes("64 GB")
    (25769803776, 64000000000)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt])(i?)b|b?)\s*", text.lower())
    if found is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, e.g. 24GiB or 64GB")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def gib(size: float) -> float:
    """Bytes as GiB."""
    return size / GIB
