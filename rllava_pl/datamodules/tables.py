"""Rows of JSON lines, JSON, CSV, Parquet, Arrow, saved or hub data sets, all as sequences of dicts.

A row that cannot be read is a bad row, not a bad file: it raises ``RowError`` on access.
"""

from __future__ import annotations

import csv
import json
import math
from abc import abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar, overload

from rllava_pl.datamodules.rejections import RowError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, object]
Item = TypeVar("Item", covariant=True)
LONGEST_INT_DIGITS = 1000


class LazySequence(Sequence[Item]):
    """A sequence whose items are made on access; subclasses define ``__len__`` and ``item``."""

    @abstractmethod
    def item(self, index: int) -> Item:
        """Item ``index``, from 0."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        places = range(len(self))[index]
        return [self.item(i) for i in places] if isinstance(places, range) else self.item(places)


class Rows(LazySequence[Row]):
    """Rows of a data set; one that cannot be read raises ``RowError`` on access."""

    def line(self, index: int) -> int:
        """The line of the file, from 1, where row ``index`` begins; 0 where a file has no lines."""
        return 0


class JsonLines(Rows):
    """Lines that stay in the file; only the position of each, 16 bytes, is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._lines = array("Q"), array("Q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, index: int) -> int:
        """Blank lines count as lines and not as rows."""
        return self._lines[index]

    def item(self, index: int) -> Row:
        """Read and parse one line."""
        with self.path.open("rb") as file:  # opened each time: workers would share the position of an open file
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            value = _parse_json(line.decode("utf-8-sig" if index == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise RowError("E04", "line", f"is not UTF-8: {error}") from error
        except RecursionError as error:
            raise RowError("E02", "line", "is nested too deep") from error
        except json.JSONDecodeError as error:
            raise RowError("E02", "line", f"is not JSON: {error.msg} at column {error.colno}") from error
        except ValueError as error:
            raise RowError("E02", "line", str(error)) from error
        return _as_row(value)


class ListedRows(Rows):
    """Rows in memory, with the line of each where they have lines; what is wrong with one stands in its place."""

    def __init__(self, rows: Sequence[object], lines: Sequence[int] = ()) -> None:
        self.rows, self.lines = rows, lines

    def __len__(self) -> int:
        return len(self.rows)

    def line(self, index: int) -> int:
        """Quoted cells may have several lines; this is the first."""
        return self.lines[index] if self.lines else 0

    def item(self, index: int) -> Row:
        """An item of the list."""
        if isinstance(row := self.rows[index], RowError):
            raise RowError(row.code, row.field, row.message)
        return _as_row(row)


class ArrowRows(Rows):
    """A Hugging Face data set without decoding: images stay bytes or paths until their headers are checked."""

    def __init__(self, dataset: Dataset) -> None:
        from datasets import ClassLabel

        self.table = dataset.with_format("arrow")
        self.labels = {name: f.names for name, f in dataset.features.items() if isinstance(f, ClassLabel)}

    def __len__(self) -> int:
        return len(self.table)

    def item(self, index: int) -> Row:
        """Row ``index``; class labels by their name instead of their number."""
        try:
            row = self.table[index].to_pylist()[0]
        except (ValueError, OverflowError) as error:  # e.g. bytes that are not UTF-8, a date beyond Python's
            raise RowError("E00", "row", f"cannot be converted: {error}") from error
        for name, names in self.labels.items():
            if row[name] is not None and row[name] >= 0:
                row[name] = names[row[name]]
        return row


@dataclass(frozen=True)
class Table:
    """The rows of one source."""

    source: str
    """As configured, for messages."""
    name: str
    """Short form, the beginning of default ids: ``train`` for ``data/train.jsonl``."""
    folder: Path | None
    """Where relative image paths start unless ``image_root`` says otherwise."""
    rows: Rows


def open_table(source: str) -> Table:
    """Open a source.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.arrow`` file; a folder written by
            ``Dataset.save_to_disk``, with ``@split`` behind it if it holds several; or a hub id with an optional
            configuration and split, ``owner/name:config@split`` (split ``train`` by default).

    Raises:
        FileNotFoundError: It looks like a file or a folder but is not there.
        ValueError: The file as a whole cannot be read, or the split is missing.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path}: unknown kind of data file {path.suffix!r}; known are {', '.join(READERS)}")
        return Table(source, path.stem, path.parent, READERS[path.suffix](path))
    if path.suffix in READERS:
        raise FileNotFoundError(f"data file {source!r} does not exist (looked in {path.absolute().parent})")
    base, _, split = source.partition("@")
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if base.startswith((".", "/", "~")):
            raise FileNotFoundError(f"data folder {base!r} does not exist")
        from datasets import load_dataset

        name, _, config = base.partition(":")
        return Table(source, base, None, ArrowRows(load_dataset(name, config or None, split=split or "train")))
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            splits = f"{', '.join(dataset)}; name one: {folder}@{next(iter(dataset))}"
            raise ValueError(f"{folder} holds the splits {splits}")
        dataset = dataset[split]
    return Table(source, folder.name + ("@" + split if split else ""), folder, ArrowRows(dataset))


def is_remote(source: str) -> bool:
    """Whether ``open_table`` would read from the Hugging Face hub."""
    path, folder = Path(source).expanduser(), Path(source.partition("@")[0]).expanduser()
    return not (path.exists() or folder.exists() or path.suffix in READERS)


def _as_row(row: object) -> Row:
    if not isinstance(row, dict):
        raise RowError("E02", "row", f"is {type(row).__name__}; a row is an object with named fields")
    return row


def _parse_json(text: str) -> object:
    """JSON; integers of more than ``LONGEST_INT_DIGITS`` become infinite, which no field accepts."""

    def integer(digits: str) -> float:
        return int(digits) if len(digits) <= LONGEST_INT_DIGITS else math.inf

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = next(name for name in fields if sum(other == name for other, _ in pairs) > 1)
            raise ValueError(f"names {twice!r} twice")
        return fields

    return json.loads(text, parse_int=integer, object_pairs_hook=unique)


def _read_json(path: Path) -> Rows:
    try:
        rows = _parse_json(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "in a .jsonl file, one row a line, broken rows are refused one by one"
        raise ValueError(f"{path} is not JSON in UTF-8: {error}; {hint}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {type(rows).__name__}; a .json data file is one list of objects")
    return ListedRows(rows)


def _read_csv(path: Path) -> Rows:
    """Bytes that are not UTF-8 become lone surrogates, which are refused cell by cell; blank lines are no rows."""
    csv.field_size_limit(2**31 - 1)  # a shorter one would make it resume inside a cell
    rows, lines = list[object](), array("Q")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)  # strict: else an unclosed quote takes in all later rows
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: the header names a column twice: {', '.join(header)}")
        while True:
            line = reader.line_num + 1
            try:
                if not (cells := next(reader)):
                    continue
                rows.append(_csv_row(header, cells))
            except StopIteration:
                return ListedRows(rows, lines)
            except csv.Error as error:
                unclosed = str(error) == "unexpected end of data"
                hint = "; a quote is not closed, and the rest of the file is inside it" * unclosed
                rows.append(RowError("E02", "line", f"is not CSV: {error}{hint}"))
            lines.append(line)


def _csv_row(header: list[str], cells: list[str]) -> dict[str, str] | RowError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    hint = "quote cells that contain commas" if len(cells) > len(header) else "write empty cells as well"
    return RowError("E02", "line", f"has {len(cells)} cells, the header has {len(header)}; {hint}")


def _read_arrow(path: Path) -> Rows:
    from datasets import Dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        parquet = path.suffix == ".parquet"
        return ArrowRows(Dataset.from_parquet(str(path)) if parquet else Dataset.from_file(str(path)))
    except (ArrowException, DatasetsError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} cannot be read as {path.suffix.removeprefix('.')}: {cause}") from error


READERS: Mapping[str, Callable[[Path], Rows]] = MappingProxyType(
    {".jsonl": JsonLines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_arrow, ".arrow": _read_arrow}
)
"""How a file is opened, by its suffix."""
