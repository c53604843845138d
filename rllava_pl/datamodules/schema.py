"""From the columns of a row to the parts of a prompt, with every field checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Literal

from rllava_pl.datamodules.images import ImageRef
from rllava_pl.datamodules.messages import check_text, continue_think, opening_think, parse_messages, parse_response
from rllava_pl.datamodules.rejections import RowError
from rllava_pl.datamodules.tables import Row
from rllava_pl.types import IMAGE, Message

FIELDS = ("id", "prompt", "messages", "images", "answer", "target", "rejected")


@dataclass(frozen=True)
class ParsedRow:
    """A row whose text was checked and whose images were not opened yet."""

    uid: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...]
    answer: str
    target: str
    """Response worth imitating; empty if the row has none."""
    rejected: str
    """The worse response of a pair; empty if the row has none."""
    metadata: Mapping[str, str]
    slots_added: bool
    """The text had no image slot although there are images: slots were put in front (W01)."""


@dataclass(frozen=True)
class RowSchema:
    """How the columns of a data set map to prompts."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field to column, e.g. ``{"prompt": "problem"}``; the other fields (see ``FIELDS``) by their own name."""
    system_prompt: str = ""
    """Put before rows that have a ``prompt`` column; ``messages`` are left as they are."""
    template: str = "{prompt}"
    """Text around the ``prompt`` column."""
    require_answer: bool = True
    """Whether a row without answer is refused."""
    require_target: bool = False
    """Whether a row without target is refused."""
    require_rejected: bool = False
    """Whether a row that is no pair is refused: one without rejected response, or without target."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.columns if name not in FIELDS]
        if unknown:
            raise ValueError(f"columns maps the unknown field {unknown[0]!r}; fields are {', '.join(FIELDS)}")
        if {"prompt", "messages"} <= set(self.columns):
            raise ValueError("columns maps both prompt and messages; a row is one or the other")
        if self.template.count("{prompt}") != 1:
            raise ValueError(f"template {self.template!r} must contain {{prompt}} exactly once")

    def parse(self, row: Row, default_uid: str) -> ParsedRow:
        """Check and convert one row.

        Raises:
            RowError: E01 to E05, E17, E20.
        """
        messages = self._messages(row)
        images = _image_refs(self._get(row, "images"))
        slots = sum(message.image_slots for message in messages)
        if add := slots == 0 and len(images) > 0:
            messages = _prepend_slots(messages, len(images))
        elif slots != len(images):
            counts = f"has {len(images)} images for {slots} <image> slots; every image needs one slot"
            raise RowError("E05", self.column("images"), counts)
        target, rejected = self._responses(row, opening_think(messages))
        return ParsedRow(
            uid=self._uid(row, default_uid),
            messages=messages,
            images=images,
            answer=self._answer(row),
            target=target,
            rejected=rejected,
            metadata=self._metadata(row),
            slots_added=add,
        )

    def column(self, name: str) -> str:
        """The column of a field."""
        return self.columns.get(name, name)

    def _get(self, row: Row, name: str) -> object:
        column = self.column(name)
        if name in self.columns and column not in row:
            raise RowError("E01", column, f"is not a column; the row has {', '.join(map(str, row)) or 'none'}")
        return row.get(column)

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
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return check_text(value, self.column("id"))

    def _answer(self, row: Row) -> str:
        column, value = self.column("answer"), self._get(row, "answer")
        if value is None:
            if self.require_answer:
                raise RowError("E01", column, "is missing; set require_answer: false if no reward reads it")
            return ""
        if value == "" and not self.require_answer:
            return ""
        if isinstance(value, str):
            return check_text(value, column)
        text = _json(value) if isinstance(value, (int, float, list, dict)) and not isinstance(value, bool) else None
        if text is None:
            shown = value if isinstance(value, (bool, float)) else type(value).__name__
            raise RowError("E02", column, f"is {shown}; an answer is text, a finite number, a list or an object")
        return text

    def _responses(self, row: Row, given: str) -> tuple[str, str]:
        """Target and rejected response; ``given`` is the think tag that the prompt opened for both."""
        target, rejected = self._response(row, "target", given), self._response(row, "rejected", given)
        if self.require_target and not target:
            raise RowError("E01", self.column("target"), "is missing; set require_target: false if rows may do without")
        if self.require_rejected and not (target and rejected):
            column = self.column("target" if rejected else "rejected")
            raise RowError("E01", column, "is missing; a pair is a target and a rejected response")
        if target and target.strip() == rejected.strip():
            raise RowError("E20", self.column("rejected"), "equals the target; one response of a pair must be better")
        return target, rejected

    def _response(self, row: Row, name: Literal["target", "rejected"], given: str) -> str:
        column = self.column(name)
        if name not in self.columns and column in self.columns.values():
            return ""  # the column of that name is another field, e.g. columns: {answer: target}
        return continue_think(parse_response(row.get(column), column), given, column)

    def _metadata(self, row: Row) -> dict[str, str]:
        """Columns that are no field, as text; those that hold binary data or nothing are left out."""
        used = {self.column(name) for name in FIELDS}
        rest = {name: value for name, value in row.items() if name not in used and value is not None}
        texts = {name: value if isinstance(value, str) else _json(value) for name, value in rest.items()}
        return {name: text for name, text in texts.items() if text is not None}


def _image_refs(value: object) -> tuple[ImageRef, ...]:
    """A list of references; a single one is wrapped, nothing and empty text are no image."""
    if value is None or value == "":
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _prepend_slots(messages: Sequence[Message], count: int) -> tuple[Message, ...]:
    first = next((k for k, message in enumerate(messages) if message.role == "user"), len(messages) - 1)
    return tuple(
        Message(message.role, (IMAGE,) * count + message.parts) if k == first else message
        for k, message in enumerate(messages)
    )


def _json(value: object) -> str | None:
    """Compact text of literal data; None for bytes, pictures, numbers that are not finite, and nesting too deep."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return None


def _plain(value: object) -> str:
    if isinstance(value, (date, Decimal)):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no literal data")
