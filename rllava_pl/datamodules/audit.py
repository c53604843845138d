"""Checking every row: which are kept, refused and why, or repaired. Every row is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rllava_pl.datamodules.images import ImageReader
from rllava_pl.datamodules.model_checks import ModelChecks
from rllava_pl.datamodules.rejections import Rejection, RowError, shortened
from rllava_pl.datamodules.schema import ParsedRow, RowSchema
from rllava_pl.datamodules.tables import Table
from rllava_pl.distributed.collectives import gather_objects, rank, world_size
from rllava_pl.redaction import escaped
from rllava_pl.types import Prompt

MOST_CHARS = 400
"""Of a message; longer ones are cut, so that a hostile row cannot flood the report."""


@dataclass(frozen=True)
class PromptSource:
    """One table with everything needed to turn its rows into prompts."""

    table: Table
    schema: RowSchema
    images: ImageReader
    model: ModelChecks | None = None
    """Checks by the model's processor, if it is known."""

    def check(self, row: int) -> ParsedRow:
        """Check everything about a row, or raise ``RowError``; its images are decoded and dropped."""
        parsed = self.parse(row)
        for name, ref in self._image_fields(parsed):
            self.images.check(ref, name)
        if self.model is None:
            return parsed
        fields = {name: self.schema.column(name) for name in ("target", "rejected")}
        fields["prompt"] = self.schema.text_column(self.table.rows[row])
        more = self.model.check(parsed.prompt, fields, lambda: self.prompt(row))
        return replace(parsed, repairs=parsed.repairs + more)

    def parse(self, row: int) -> ParsedRow:
        """Text and image references of a row."""
        return self.schema.parse(self.table.rows[row], f"{self.table.name}:{row}", f"{self.table.source} row {row}")

    def prompt(self, row: int) -> Prompt:
        """The prompt with its images decoded."""
        parsed = self.parse(row)
        images = tuple(self.images.load(ref, name) for name, ref in self._image_fields(parsed))
        return replace(parsed.prompt, images=images)

    def rejection(self, row: int, error: RowError) -> Rejection:
        """The report of a refused row, printable whatever the row holds."""
        uid = f"{self.table.name}:{row}"
        with suppress(Exception):  # the error that is reported says why the row is unreadable
            uid = self.schema.id_of(self.table.rows[row], uid)
        line = self.table.rows.line(row)
        name, message, uid = (_printable(text) for text in (error.field, error.message, uid))
        return Rejection(self.table.source, row, name, error.code, message, uid, line)

    def _image_fields(self, parsed: ParsedRow) -> Iterator[tuple[str, object]]:
        column = self.schema.column("images")
        return ((f"{column}[{k}]", ref) for k, ref in enumerate(parsed.images))


@dataclass
class Audit:
    """The result for every row: ``len(kept) + len(rejections) == total``, always."""

    total: int = 0
    """Rows checked."""
    kept: list[tuple[int, int]] = field(default_factory=list)
    """Source and row of every usable row."""
    rejections: list[Rejection] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)
    """Number of usable rows by the code of what was repaired."""
    filled: Counter[str] = field(default_factory=Counter)
    """Number of usable rows that have a ``target``, and that have a ``rejected`` response."""


class UsableRow(NamedTuple):
    """The result for a row that can be used."""

    uid: str
    repairs: tuple[str, ...]
    filled: tuple[str, ...]
    """Which of ``target`` and ``rejected`` it has."""


def audit(
    sources: Sequence[PromptSource],
    decode: bool = False,
    tick: Callable[[], None] = lambda: None,
    all_ranks: bool = False,
) -> Audit:
    """Check every row of some sources.

    Args:
        sources: Ids are unique among all of them.
        decode: Also decode every image in full, as training does; without it JPEGs are only decoded small.
        tick: Called after every row.
        all_ranks: Collective: each rank checks its share of the rows, and all get all results.
    """
    places = [(s, row) for s, source in enumerate(sources) for row in range(len(source.table.rows))]
    first, step = (rank(), world_size()) if all_ranks else (0, 1)
    own = []
    for s, row in places[first::step]:
        own.append(_check_row(sources[s], row, decode))
        tick()
    shares = gather_objects(own) if all_ranks else [own]
    audited, seen = Audit(len(places)), dict[str, tuple[int, int]]()
    for k, place in enumerate(places):
        result = shares[k % step][k // step]
        if isinstance(result, UsableRow) and result.uid in seen:
            result = _duplicate(sources, place, seen[result.uid], result.uid)
        if isinstance(result, Rejection):
            audited.rejections.append(result)
        else:
            seen[result.uid] = place
            audited.kept.append(place)
            audited.repairs.update(result.repairs)
            audited.filled.update(result.filled)
    return audited


def _check_row(source: PromptSource, row: int, decode: bool) -> UsableRow | Rejection:
    try:
        with _errors_as_e00():
            parsed = source.check(row)
            if decode:
                source.prompt(row)
    except RowError as error:
        return source.rejection(row, error)
    filled = tuple(name for name in ("target", "rejected") if getattr(parsed.prompt, name))
    return UsableRow(parsed.prompt.uid, parsed.repairs, filled)


def _duplicate(sources: Sequence[PromptSource], place: tuple[int, int], first: tuple[int, int], uid: str) -> Rejection:
    (s, row), earlier = place, f"{sources[first[0]].table.source} row {first[1]}"
    message = f"{uid!r} is already the id of {earlier}; ids must be unique in a split"
    return sources[s].rejection(row, RowError("E15", sources[s].schema.column("id"), message))


def audit_prompts(prompts: Sequence[Prompt], name: str, tick: Callable[[], None] = lambda: None) -> Audit:
    """Check prompts that come from no file: each can be made, has its images, and a unique uid.

    ``name`` is that of the sequence, for messages; each prompt is dropped before the next one is made.
    """
    result, seen = Audit(len(prompts)), dict[str, int]()
    for row in range(len(prompts)):
        uid = ""
        try:
            with _errors_as_e00():
                prompt = prompts[row]
                uid, images = prompt.uid, len(prompt.images)
                if (slots := sum(message.image_slots for message in prompt.messages)) != images:
                    raise RowError("E05", "images", f"are {images} for {slots} slots; every image needs one slot")
                if uid in seen:
                    raise RowError("E15", "uid", f"{uid!r} is already that of prompt {seen[uid]}; uids are unique")
        except RowError as error:
            result.rejections.append(Rejection(name, row, error.field, error.code, _printable(error.message), uid))
        else:
            seen[uid] = row
            result.kept.append((0, row))
        tick()
    return result


@contextmanager
def _errors_as_e00() -> Iterator[None]:
    """Turn any other exception into E00 of this row, so that the rows after it are still checked."""
    try:
        yield
    except (RowError, MemoryError):
        raise
    except Exception as error:
        raise RowError("E00", "row", f"raised {type(error).__name__}: {error}; correct or remove it") from error


def _printable(text: str) -> str:
    """With control characters escaped, and of bounded length."""
    return escaped(shortened(text, MOST_CHARS))
