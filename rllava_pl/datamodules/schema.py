"""From the columns of a row to the parts of a prompt, with every field checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import cast, get_args

from rllava_pl.datamodules.images import ImageRef
from rllava_pl.datamodules.rejections import RowError
from rllava_pl.datamodules.tables import Row
from rllava_pl.types import IMAGE, ImageSlot, Message, Role

FIELDS = ("id", "prompt", "messages", "images", "answer")
ROLES = get_args(Role)


@dataclass(frozen=True)
class ParsedRow:
    """A row whose text was checked and whose images were not opened yet."""

    uid: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...]
    answer: str
    metadata: Mapping[str, str]
    slots_added: bool
    """The text had no image slot although there are images: slots were put in front (W01)."""


@dataclass(frozen=True)
class RowSchema:
    """How the columns of a data set map to prompts."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field (``id``, ``prompt``, ``messages``, ``images``, ``answer``) to column; the others by their own name."""
    system_prompt: str = ""
    """Put before rows that have a ``prompt`` column; ``messages`` are left as they are."""
    template: str = "{prompt}"
    """Text around the ``prompt`` column."""
    require_answer: bool = True
    """Whether a row without answer is refused."""

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
            RowError: E01 to E05, E17.
        """
        messages = self._messages(row)
        images = _image_refs(self._get(row, "images"))
        slots = sum(message.image_slots for message in messages)
        if add := slots == 0 and len(images) > 0:
            messages = _prepend_slots(messages, len(images))
        elif slots != len(images):
            counts = f"has {len(images)} images for {slots} <image> slots; every image needs one slot"
            raise RowError("E05", self.column("images"), counts)
        return ParsedRow(
            uid=self._uid(row, default_uid),
            messages=messages,
            images=images,
            answer=self._answer(row),
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

    def _metadata(self, row: Row) -> dict[str, str]:
        """Columns that are no field, as text; those that hold binary data or nothing are left out."""
        used = {self.column(name) for name in FIELDS}
        rest = {name: value for name, value in row.items() if name not in used and value is not None}
        texts = {name: value if isinstance(value, str) else _json(value) for name, value in rest.items()}
        return {name: text for name, text in texts.items() if text is not None}


def check_text(value: object, column: str) -> str:
    """``value`` if it is text that a tokenizer can read.

    Raises:
        RowError: E02 no text, E03 nothing but white space, E04 not encodable or with NUL inside.
    """
    if not isinstance(value, str):
        raise RowError("E02", column, f"is {type(value).__name__}; text is needed")
    if not value.strip():
        raise RowError("E03", column, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("E04", column, f"has a lone surrogate at character {error.start}") from error
    if "\0" in value:
        raise RowError("E04", column, f"has a NUL character at {value.index(chr(0))}")
    return value


def parse_messages(value: object, column: str) -> tuple[Message, ...]:
    """A conversation from ``[{"role": ..., "content": ...}, ...]``; content is text or a list of typed parts.

    Raises:
        RowError: E02, E03, E04, or E17 for an order of roles that does not end in a turn of the policy.
    """
    if not isinstance(value, list):
        raise RowError("E02", column, f"is {type(value).__name__}; messages are a list of role and content")
    messages = tuple(_parse_message(item, f"{column}[{k}]") for k, item in enumerate(value))
    if not messages:
        raise RowError("E17", column, "is empty; a prompt needs at least one message")
    for k, message in enumerate(messages):
        if message.role == "tool" and (k == 0 or messages[k - 1].role not in ("assistant", "tool")):
            raise RowError("E17", f"{column}[{k}]", "is a tool message that answers no assistant message")
    if messages[-1].role == "assistant":
        raise RowError("E17", column, "ends with the assistant; the last message is what the policy answers")
    return messages


def _parse_message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowError("E02", where, f"is {type(item).__name__}; a message has role and content")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise RowError("E17", where, f"has the role {role!r}; roles are {', '.join(ROLES)}")
    role = cast("Role", role)
    if isinstance(content, list):
        parts = tuple(_parse_part(part, f"{where}.content[{k}]") for k, part in enumerate(content))
        if not parts:
            raise RowError("E03", where, "has no content")
        return Message(role, parts)
    return Message.parse(role, check_text(content, f"{where}.content"))


def _parse_part(part: object, where: str) -> str | ImageSlot:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text":
        return check_text(part.get("text"), where)
    if kind == "image":
        return IMAGE
    raise RowError("E02", where, f"has the type {kind!r}; parts are text or image")


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
    """Compact text of literal data; None if it holds bytes, pictures or numbers that are not finite."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError):
        return None


def _plain(value: object) -> str:
    if isinstance(value, (date, Decimal)):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no literal data")
