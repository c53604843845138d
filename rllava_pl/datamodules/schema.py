"""From the columns of a row to the parts of a prompt, with every field checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, time
from decimal import Decimal

from rllava_pl.datamodules.answers import KINDS, AnswerKind, check_answer, check_target
from rllava_pl.datamodules.images import ImageRef
from rllava_pl.datamodules.messages import (
    check_text,
    check_unicode,
    continue_think,
    opening_think,
    parse_messages,
    parse_response,
)
from rllava_pl.datamodules.rejections import RowError
from rllava_pl.datamodules.tables import Row
from rllava_pl.types import IMAGE, Json, Markup, Message, Prompt

FIELDS = ("id", "prompt", "messages", "images", "answer", "target", "rejected")
VIDEO = "<video>"
CONTROLS = re.compile(r"[\x01-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters other than tab, line feed and NUL; NUL is refused."""
DEEPEST = 8
"""Levels of nesting that are searched for control characters; texts of messages stand at the fourth."""
MOST_METADATA_BYTES = 64 * 1024
"""Of all of a row."""


@dataclass(frozen=True)
class ParsedRow:
    """A row whose text was checked and whose images were not opened yet."""

    prompt: Prompt
    """Without its images."""
    images: tuple[ImageRef, ...]
    repairs: tuple[str, ...] = ()
    """Codes of what was repaired."""


@dataclass(frozen=True)
class RowSchema:
    """How the columns of a data set map to prompts."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field to column, e.g. ``{"prompt": "problem"}``; the other fields (see ``FIELDS``) by their own name."""
    system_prompt: str = ""
    """Put before rows that have a ``prompt`` column; ``messages`` stay as they are."""
    template: str = "{prompt}"
    """Text around the ``prompt`` column."""
    require_answer: bool = True
    """Whether a row without answer is refused."""
    require_target: bool = False
    """Whether a row without target is refused."""
    require_rejected: bool = False
    """Whether a row that is no pair is refused: one without rejected response, or without target."""
    answer_kind: AnswerKind = "text"
    """What the reward reads the answer as."""
    match_targets: bool = False
    """Whether a row is refused if its target gives another answer than the row."""
    markup: bool = False
    """Whether the model's special tokens are meant where texts of messages spell them."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.columns if name not in FIELDS]:
            raise ValueError(f"columns maps the unknown field {unknown[0]!r}; fields are {', '.join(FIELDS)}")
        if {"prompt", "messages"} <= set(self.columns):
            raise ValueError("columns maps both prompt and messages; a row is one or the other")
        if self.answer_kind not in KINDS:
            raise ValueError(f"answer_kind is {self.answer_kind!r}; it is one of {', '.join(KINDS)}")
        if self.template.count("{prompt}") != 1:
            raise ValueError(f"template {self.template!r} must contain {{prompt}} exactly once")

    def parse(self, row: Row, default_uid: str, source: str = "") -> ParsedRow:
        """Check and convert one row; ``source`` says where it stands.

        Raises:
            RowError: E01 to E05, E12, E16, E17, E19, E20.
        """
        column = self.column("images")
        clean = {name: value if name == column else _strip(value) for name, value in row.items()}  # paths stay
        messages, images = self._messages(clean), self._images(clean)
        slots = sum(message.image_slots for message in messages)
        if any(isinstance(part, str) and VIDEO in part for message in messages for part in message.parts):
            hint = f"has a {VIDEO} slot; only images are read, so give its frames"
            raise RowError("E05", self.text_column(row), hint)
        if add := slots == 0 and len(images) > 0:
            at = next((k for k, message in enumerate(messages) if message.role == "user"), len(messages) - 1)
            shown = replace(messages[at], parts=(IMAGE,) * len(images) + messages[at].parts)
            messages = (*messages[:at], shown, *messages[at + 1 :])
        elif slots != len(images):
            counts = f"has {len(images)} images for {slots} <image> slots; every image needs one slot"
            raise RowError("E05", column, counts)
        answer, answer_text = self._answer(clean)
        target, rejected = self._responses(clean, opening_think(messages))
        if self.match_targets:
            check_target(target, answer_text, self.column("target"))
        metadata, left_out = self._metadata(clean)
        if self.markup:
            texts = (tuple(Markup(x) if isinstance(x, str) else x for x in message.parts) for message in messages)
            messages = tuple(replace(message, parts=parts) for message, parts in zip(messages, texts, strict=True))
        uid = self._uid(clean, default_uid)
        prompt = Prompt(uid, messages, (), answer, target, rejected, metadata, source)
        repairs = {"W01": add, "W03": clean != row, "W04": left_out}
        return ParsedRow(prompt, images, tuple(code for code, done in repairs.items() if done))

    def text_column(self, row: Row) -> str:
        """Where the prompt of a row stands."""
        in_messages = "prompt" not in self.columns and row.get(self.column("messages")) is not None
        return self.column("messages" if in_messages else "prompt")

    def id_of(self, row: Row, default: str) -> str:
        """The row's id as far as it has a readable one; for reports."""
        value = row.get(self.column("id"))
        return default if value is None else _text(value) or default

    def column(self, name: str) -> str:
        """The column of a field."""
        return self.columns.get(name, name)

    def _get(self, row: Row, name: str) -> object:
        column = self.column(name)
        if name in self.columns and column not in row:
            found = ", ".join(map(str, row)) or "none"
            raise RowError("E01", column, f"is not a column; the row has {found}; correct columns")
        return row.get(column)

    def _images(self, row: Row) -> tuple[ImageRef, ...]:
        if row.get("videos") and self.column("images") != "videos":
            raise RowError("E02", "videos", "holds a video; only images are read, so give its frames as images")
        value = self._get(row, "images")
        if value is None or value == "":
            return ()
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)

    def _messages(self, row: Row) -> tuple[Message, ...]:
        if "prompt" not in self.columns and (messages := self._get(row, "messages")) is not None:
            return parse_messages(messages, self.column("messages"))
        column, value = self.column("prompt"), self._get(row, "prompt")
        if value is None:
            raise RowError("E01", column, "is missing, and so is messages; set columns to name the right one")
        user = Message.parse("user", self.template.replace("{prompt}", check_text(value, column)))
        return (Message("system", (self.system_prompt,)), user) if self.system_prompt else (user,)

    def _uid(self, row: Row, default: str) -> str:
        value = self._get(row, "id")
        if value is None:
            return default
        number = isinstance(value, int) and not isinstance(value, bool)
        return check_text((_text(value) or "") if number else value, self.column("id"))

    def _answer(self, row: Row) -> tuple[Json, str]:
        """The answer as a value and as text; None and "" if the row has none and needs none."""
        column, value = self.column("answer"), self._get(row, "answer")
        if value is None and self.require_answer:
            raise RowError("E01", column, "is missing; set require_answer: false if no reward reads it")
        if value is None or (value in ("", [], {}) and not self.require_answer):
            return None, ""
        if value in ([], {}):
            raise RowError("E03", column, "is empty; set require_answer: false if no reward reads it")
        text = None if isinstance(value, bool) else _text(value)
        if text is None:
            shown = value if isinstance(value, (bool, float)) else type(value).__name__
            raise RowError("E02", column, f"is {shown}; an answer is text, a finite number, a list or an object")
        for part in _texts(value):
            check_unicode(part, column)
        check_answer(check_text(text, column), self.answer_kind, column)
        return _value(value, text), text

    def _responses(self, row: Row, given: str) -> tuple[str, str]:
        """Target and rejected response; ``given`` is the think tag that the prompt opened for both."""

        def response(name: str) -> str:
            column = self.column(name)
            if name not in self.columns and column in self.columns.values():
                return ""  # the column of that name is another field, e.g. columns: {answer: target}
            return continue_think(parse_response(row.get(column), column), given, column)

        target, rejected = response("target"), response("rejected")
        if self.require_target and not target:
            raise RowError("E01", self.column("target"), "is missing; set require_target: false if rows may do without")
        if self.require_rejected and not (target and rejected):
            column = self.column("target" if rejected else "rejected")
            raise RowError("E01", column, "is missing; a pair is a target and a rejected response")
        if target and target.strip() == rejected.strip():
            raise RowError("E20", self.column("rejected"), "equals the target; one response of a pair must be better")
        return target, rejected

    def _metadata(self, row: Row) -> tuple[dict[str, Json], bool]:
        """Columns that are no field, and whether some were left out: binary, nested too deep, too long."""
        used = {self.column(name) for name in FIELDS}
        rest = {name: value for name, value in row.items() if name not in used and value is not None}
        kept, left_bytes = dict[str, Json](), MOST_METADATA_BYTES
        for name, value in rest.items():
            text = _text(value)
            if text is None or len(text) > left_bytes:  # a character has a byte at least
                continue
            check_unicode(name, repr(name))
            for part in (text, *_texts(value)):
                check_unicode(part, name)
            if (size := len(text.encode())) <= left_bytes:
                kept[name] = _value(value, text)
                left_bytes -= size
        return kept, len(kept) < len(rest)


def _texts(value: object, depth: int = 0) -> Iterator[str]:
    """All texts in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)) and depth < DEEPEST:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, depth + 1)


def _strip(value: object, depth: int = 0) -> object:
    """The same without control characters in its texts."""
    if isinstance(value, str):
        return CONTROLS.sub("", value)
    if depth == DEEPEST:
        return value
    if isinstance(value, dict):
        return {name: _strip(item, depth + 1) for name, item in value.items()}
    return [_strip(item, depth + 1) for item in value] if isinstance(value, list) else value


def _text(value: object) -> str | None:
    """A text itself, a date or decimal number as text, other data in JSON.

    None for bytes, images, numbers that are not finite, and data nested too deep.
    """
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, (date, time, Decimal)):
            return _plain(value)
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return None


def _plain(value: object) -> str:
    if isinstance(value, (date, time)) or (isinstance(value, Decimal) and value.is_finite()):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _value(value: object, text: str) -> Json:
    """The JSON value whose ``_text`` is ``text``: dates and decimal numbers are text in it, tuples are lists."""
    if isinstance(value, (list, dict, tuple)):
        nested: Json = json.loads(text)
        return nested
    return value if isinstance(value, (bool, int, float)) else text
