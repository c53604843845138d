"""Why a row of a data set was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

CODES: Mapping[str, str] = MappingProxyType(
    {
        "E01": "missing field",
        "E02": "wrong type",
        "E03": "empty text",
        "E04": "bad unicode",
        "E05": "image slots and images differ in number",
        "E06": "image missing",
        "E07": "image path leaves the image folder",
        "E08": "image format",
        "E09": "image too large",
        "E10": "image cannot be decoded",
        "E11": "image degenerate",
        "E12": "URL instead of a file",
        "E14": "prompt too long",
        "E15": "duplicate id",
        "E17": "bad messages",
        "E20": "pair of equal responses",
        "W01": "image slots put in front of the prompt",
    }
)
"""Meaning of every code; W codes are repaired and counted, E codes refuse the row."""

SHOWN = 10


@dataclass(frozen=True)
class Rejection:
    """One refused row."""

    source: str
    """File, folder or data set."""
    row: int
    """Position in the source, from 0."""
    field: str
    """Column or part of it, e.g. ``images[1]``."""
    code: str
    """Key of ``CODES``."""
    message: str
    """What is wrong and what would be right."""

    def __str__(self) -> str:
        return f"{self.source} row {self.row}, {self.field}: {self.message} ({self.code} {CODES[self.code]})"


class DataError(ValueError):
    """Rows that cannot be used.

    Args:
        rejections: All of them; the message lists the first ten and counts the rest by code.
        total: Number of rows looked at.
    """

    def __init__(self, rejections: Sequence[Rejection], total: int) -> None:
        self.rejections = tuple(rejections)
        self.total = total
        lines = [f"{len(self.rejections)} of {total} rows cannot be used ({count_codes(self.rejections)}):"]
        lines += [f"  {rejection}" for rejection in self.rejections[:SHOWN]]
        if (rest := len(self.rejections) - SHOWN) > 0:
            lines.append(f"  ... and {rest} more")
        super().__init__("\n".join(lines))


class RowError(ValueError):
    """A problem of the row at hand; whoever knows its place turns it into a ``Rejection``."""

    def __init__(self, code: str, field: str, message: str) -> None:
        super().__init__(message)
        self.code, self.field, self.message = code, field, message

    def at(self, source: str, row: int) -> Rejection:
        """The rejection of row ``row`` of ``source``."""
        return Rejection(source, row, self.field, self.code, self.message)


def count_codes(rejections: Sequence[Rejection]) -> str:
    """``"E03 empty text: 2, E06 image missing: 1"``."""
    counts = Counter(rejection.code for rejection in rejections)
    return ", ".join(f"{code} {CODES[code]}: {n}" for code, n in sorted(counts.items()))
