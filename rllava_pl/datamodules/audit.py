"""Checking every row: what is kept, what is refused and why, what was mended. Nothing is skipped uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from rllava_pl.datamodules.images import ImageReader
from rllava_pl.datamodules.model_checks import ModelChecks
from rllava_pl.datamodules.rejections import Rejection, RowError
from rllava_pl.datamodules.schema import ParsedRow, RowSchema
from rllava_pl.datamodules.tables import Table
from rllava_pl.distributed.collectives import gather_objects, rank, world_size
from rllava_pl.redaction import escaped
from rllava_pl.types import Prompt

MOST_CHARS = 400
"""Of a message; a hostile row must not flood the report."""


@dataclass(frozen=True)
class PromptSource:
    """One table with everything needed to turn its rows into prompts."""

    table: Table
    schema: RowSchema
    images: ImageReader
    model: ModelChecks | None = None
    """Checks by the model's processor, if it is known."""

    def check(self, row: int) -> ParsedRow:
        """Check everything about a row; its images are decoded, and dropped again.

        Raises:
            RowError: What is wrong with it.
        """
        parsed = self.parse(row)
        for name, ref in self._image_fields(parsed):
            self.images.check(ref, name)
        if self.model is None:
            return parsed
        fields = {name: self.schema.column(name) for name in ("target", "rejected")}
        fields["prompt"] = self.schema.text_column(self.table.rows[row])
        more = self.model.check(self._prompt(parsed, row), fields, lambda: self.prompt(row))
        return replace(parsed, repairs=parsed.repairs + more)

    def parse(self, row: int) -> ParsedRow:
        """Text and image references of a row."""
        return self.schema.parse(self.table.rows[row], self.default_id(row))

    def prompt(self, row: int) -> Prompt:
        """The prompt with its images decoded."""
        parsed = self.parse(row)
        images = tuple(self.images.load(ref, name) for name, ref in self._image_fields(parsed))
        return replace(self._prompt(parsed, row), images=images)

    def default_id(self, row: int) -> str:
        """Id of a row that brings none."""
        return f"{self.table.name}:{row}"

    def rejection(self, row: int, error: RowError) -> Rejection:
        """The verdict on a row, fit to be printed whatever the row holds."""
        uid = self.default_id(row)
        with suppress(Exception):  # whatever made the row unreadable has been said
            uid = self.schema.id_of(self.table.rows[row], uid)
        line = self.table.rows.line(row)
        name, message, uid = (_printable(text) for text in (error.field, error.message, uid))
        return Rejection(self.table.source, row, name, error.code, message, uid, line)

    def _prompt(self, parsed: ParsedRow, row: int) -> Prompt:
        return Prompt(
            uid=parsed.uid,
            messages=parsed.messages,
            answer=parsed.answer,
            target=parsed.target,
            rejected=parsed.rejected,
            metadata=parsed.metadata,
            source=f"{self.table.source} row {row}",
        )

    def _image_fields(self, parsed: ParsedRow) -> Iterator[tuple[str, object]]:
        column = self.schema.column("images")
        return ((f"{column}[{k}]", ref) for k, ref in enumerate(parsed.images))


@dataclass
class Audit:
    """What became of every row: ``len(kept) + len(rejections) == total``, always."""

    total: int = 0
    """Rows looked at."""
    kept: list[tuple[int, int]] = field(default_factory=list)
    """Source and row of every usable row."""
    rejections: list[Rejection] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)
    """Number of usable rows by the code of what was mended."""
    filled: Counter[str] = field(default_factory=Counter)
    """Number of usable rows that have a ``target``, and that have a ``rejected`` response."""


@dataclass(frozen=True)
class Usable:
    """The verdict on a right row."""

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
        all_ranks: Every rank is here: each checks its share of the rows, and all get all verdicts. Collective.
    """
    places = [(s, row) for s, source in enumerate(sources) for row in range(len(source.table.rows))]
    first, step = (rank(), world_size()) if all_ranks else (0, 1)
    own = []
    for s, row in places[first::step]:
        own.append(_verdict(sources[s], row, decode))
        tick()
    shares = gather_objects(own) if all_ranks else [own]
    result, seen = Audit(len(places)), dict[str, tuple[int, int]]()
    for k, place in enumerate(places):
        verdict = shares[k % step][k // step]
        if isinstance(verdict, Usable) and verdict.uid in seen:
            verdict = _duplicate(sources, place, seen[verdict.uid], verdict.uid)
        if isinstance(verdict, Rejection):
            result.rejections.append(verdict)
        else:
            seen[verdict.uid] = place
            result.kept.append(place)
            result.repairs.update(verdict.repairs)
            result.filled.update(verdict.filled)
    return result


def _verdict(source: PromptSource, row: int, decode: bool) -> Usable | Rejection:
    try:
        with _foreseen():
            parsed = source.check(row)
            if decode:
                source.prompt(row)
    except RowError as error:
        return source.rejection(row, error)
    filled = tuple(name for name in ("target", "rejected") if getattr(parsed, name))
    return Usable(parsed.uid, parsed.repairs, filled)


def _duplicate(sources: Sequence[PromptSource], place: tuple[int, int], first: tuple[int, int], uid: str) -> Rejection:
    (s, row), earlier = place, f"{sources[first[0]].table.source} row {first[1]}"
    message = f"{uid!r} is already the id of {earlier}; ids must be unique in a split"
    return sources[s].rejection(row, RowError("E15", sources[s].schema.column("id"), message))


def audit_prompts(prompts: Sequence[Prompt], name: str, tick: Callable[[], None] = lambda: None) -> Audit:
    """Check prompts that no file holds: every one can be made, has its images and text, and a uid of its own.

    Args:
        prompts: Any sequence; a prompt is dropped again before the next one is made.
        name: What the sequence is called in messages.
        tick: Called after every prompt.
    """
    result, seen = Audit(), dict[str, int]()
    for row in range(len(prompts)):
        uid = ""
        try:
            with _foreseen():
                prompt = prompts[row]
                uid = prompt.uid
                _check_prompt(prompt, seen)
        except RowError as error:
            result.rejections.append(Rejection(name, row, error.field, error.code, _printable(error.message), uid))
        else:
            seen[uid] = row
            result.kept.append((0, row))
        result.total += 1
        tick()
    return result


def _check_prompt(prompt: Prompt, seen: Mapping[str, int]) -> None:
    slots = sum(message.image_slots for message in prompt.messages)
    if slots != len(prompt.images):
        raise RowError("E05", "images", f"are {len(prompt.images)} for {slots} slots; every image needs one slot")
    if prompt.uid in seen:
        raise RowError("E15", "uid", f"{prompt.uid!r} is already that of prompt {seen[prompt.uid]}; uids are unique")


@contextmanager
def _foreseen() -> Iterator[None]:
    """Whatever a row makes the libraries raise is a verdict on it, E00, and none on the rows behind it."""
    try:
        yield
    except (RowError, MemoryError):
        raise
    except Exception as error:
        raise RowError("E00", "row", f"raised {type(error).__name__}: {error}; see what is unusual about it") from error


def _printable(text: str) -> str:
    """Without characters that a terminal or a file would stumble over, and of bounded length."""
    text = text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + "..."
    return escaped(text)
