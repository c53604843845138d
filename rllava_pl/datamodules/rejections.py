"""Codes and reports of rows of a data set that were refused or repaired."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from rllava_pl.checkpoint.atomic import write_text

CODES: Mapping[str, str] = MappingProxyType(
    {
        "E00": "unreadable row",
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
        "E13": "special tokens in the text",
        "E14": "prompt too long",
        "E15": "duplicate id",
        "E16": "bad answer",
        "E17": "bad messages",
        "E18": "target too long",
        "E19": "target contradicts the answer",
        "E20": "pair of equal responses",
        "W01": "image slots added in front of the prompt",
        "W02": "special tokens in the text, read as plain text",
        "W03": "control characters removed",
        "W04": "binary or too long columns left out of the metadata",
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
    id: str = ""
    """Id of the row, as far as it could be read."""
    line: int = 0
    """Line of the file, from 1, where the row begins; 0 in files that have no lines."""

    def __str__(self) -> str:
        line = f" (line {self.line})" if self.line else ""
        return f"{self.source} row {self.row}{line}, {self.field}: {self.message} ({self.code} {CODES[self.code]})"


class DataError(ValueError):
    """Rows that cannot be used.

    Args:
        rejections: All of them; the message lists the first ten and counts the rest by code.
        total: Number of rows looked at.
        report: File with all of them, if one was written.
    """

    def __init__(self, rejections: Sequence[Rejection], total: int, report: str = "") -> None:
        self.rejections = tuple(rejections)
        self.total = total
        lines = [f"{len(self.rejections)} of {total} rows cannot be used ({count_codes(self.rejections)}):"]
        lines += [f"  {rejection}" for rejection in self.rejections[:SHOWN]]
        if (rest := len(self.rejections) - SHOWN) > 0:
            lines.append(f"  ... and {rest} more")
        if report:
            lines.append(f"  all of them: {report}")
        super().__init__("\n".join(lines))


class RowError(ValueError):
    """A problem of one row; ``PromptSource.rejection`` adds where the row stands."""

    def __init__(self, code: str, field: str, message: str) -> None:
        super().__init__(message)
        self.code, self.field, self.message = code, field, message


def count_codes(rejections: Sequence[Rejection]) -> str:
    """``"E03 empty text: 2, E06 image missing: 1"``."""
    counts = Counter(rejection.code for rejection in rejections)
    return ", ".join(f"{code} {CODES[code]}: {n}" for code, n in sorted(counts.items()))


def shortened(text: str, chars: int = 60) -> str:
    """At most that many characters of a text, for messages."""
    return text if len(text) <= chars else text[:chars] + "..."


def write_report(path: Path, rejections: Sequence[Rejection]) -> None:
    """One JSON object a refused row, as JSON lines, written atomically."""
    write_text(path, "".join(json.dumps(asdict(rejection)) + "\n" for rejection in rejections))
