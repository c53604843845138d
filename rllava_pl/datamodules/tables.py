"""Rows of JSON lines, JSON, CSV, Parquet, Arrow, saved or hub data sets, all as sequences of dicts."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from rllava_pl.datamodules.rejections import RowError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, object]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")


class LazyRows(Sequence[Row]):
    """A sequence whose rows are made one at a time; subclasses define ``__len__`` and ``row``."""

    def row(self, index: int) -> Row:
        """Row ``index``, from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.row(index)


class JsonLines(LazyRows):
    """Lines kept as bytes and parsed when asked for, so that a broken line is a broken row, not a broken file."""

    def __init__(self, path: Path) -> None:
        self.lines = [line for line in path.read_bytes().splitlines() if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Row:
        """Parse line ``index`` (blank lines not counted)."""
        try:
            row = json.loads(self.lines[index])
        except UnicodeDecodeError as error:
            raise RowError("E04", "line", f"is not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RowError("E02", "line", f"is not JSON: {error}") from error
        return as_row(row)


class ArrowRows(LazyRows):
    """A Hugging Face data set without decoding: images stay bytes or paths until their header was checked."""

    def __init__(self, dataset: Dataset) -> None:
        from datasets import ClassLabel

        self.table = dataset.with_format("arrow")
        self.labels = {name: f.names for name, f in dataset.features.items() if isinstance(f, ClassLabel)}

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> Row:
        """Row ``index``; class labels by their name instead of their number."""
        row = self.table[index].to_pylist()[0]
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
    """Short form that default ids begin with: ``train`` for ``data/train.jsonl``."""
    folder: Path | None
    """Where relative image paths start unless ``image_root`` says otherwise."""
    rows: Sequence[Row]


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
        return Table(source, path.stem, path.parent, _read_file(path))
    if path.suffix in SUFFIXES:
        raise FileNotFoundError(f"data file {source!r} does not exist (looked in {path.absolute().parent})")
    base, _, split = source.partition("@")
    folder = Path(base).expanduser()
    if folder.is_dir():
        return Table(source, folder.name + ("@" + split if split else ""), folder, _read_folder(folder, split))
    if base.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data folder {base!r} does not exist")
    return Table(source, base, None, _read_hub(base, split or "train"))


def is_remote(source: str) -> bool:
    """Whether ``open_table`` would ask the Hugging Face hub."""
    path, folder = Path(source).expanduser(), Path(source.partition("@")[0]).expanduser()
    return not (path.exists() or folder.exists() or path.suffix in SUFFIXES)


def as_row(row: object) -> Row:
    """``row`` itself if it is an object with named fields."""
    if not isinstance(row, dict):
        raise RowError("E02", "row", f"is {type(row).__name__}; a row is an object with named fields")
    return row


def _read_file(path: Path) -> Sequence[Row]:
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    from datasets import Dataset

    if path.suffix == ".parquet":
        return ArrowRows(Dataset.from_parquet(str(path)))
    if path.suffix == ".arrow":
        return ArrowRows(Dataset.from_file(str(path)))
    raise ValueError(f"{path}: unknown kind of data file {path.suffix!r}; known are {', '.join(SUFFIXES)}")


def _read_json(path: Path) -> Sequence[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {type(rows).__name__}; a .json data file is one list of objects")
    return rows


def _read_csv(path: Path) -> Sequence[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} line {reader.line_num} is not CSV in UTF-8: {error}") from error
    for number, row in enumerate(rows):
        if None in row:
            raise ValueError(f"{path} row {number} has more cells than the header; quote cells that contain commas")
    return rows


def _read_folder(folder: Path, split: str) -> Sequence[Row]:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if not isinstance(dataset, DatasetDict):
        return ArrowRows(dataset)
    if split not in dataset:
        raise ValueError(f"{folder} holds the splits {', '.join(dataset)}; name one: {folder}@{next(iter(dataset))}")
    return ArrowRows(dataset[split])


def _read_hub(base: str, split: str) -> Sequence[Row]:
    from datasets import load_dataset

    name, _, config = base.partition(":")
    return ArrowRows(load_dataset(name, config or None, split=split))
