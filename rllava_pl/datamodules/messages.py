"""Conversations and responses in the columns of a row, checked part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

from rllava_pl.datamodules.paths import is_url
from rllava_pl.datamodules.rejections import RowError
from rllava_pl.types import IMAGE, ImageSlot, Message, Role

ROLES = get_args(Role)
OPEN_THINK = "<think>"


def check_text(value: object, column: str) -> str:
    """``value`` if it is text that a tokenizer can read.

    Raises:
        RowError: E02 not text, E03 white space only, E04 not encodable or with NUL inside.
    """
    if not isinstance(value, str):
        raise RowError("E02", column, f"is {type(value).__name__}; text is needed")
    check_unicode(value, column)
    if not any(c.isprintable() and not c.isspace() for c in value):  # zero-width characters are not visible either
        raise RowError("E03", column, "is empty; leave the row out, or fill it in")
    return value


def check_unicode(text: str, column: str) -> None:
    """Refuse (E04) text that cannot be encoded or has NUL inside."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"a lone surrogate at character {error.start}, or is not UTF-8; write whole characters"
        raise RowError("E04", column, f"has {surrogate}") from error
    if "\0" in text:
        raise RowError("E04", column, f"has a NUL character at {text.index(chr(0))}; remove it")


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
            raise RowError("E03", where, "has no content; leave the message out")
        return Message(role, parts)
    return Message.parse(role, check_text(content, f"{where}.content"))


def _parse_part(part: object, where: str) -> str | ImageSlot:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text":
        return check_text(part.get("text"), where)
    if kind in ("image", "image_url") and isinstance(part, dict):
        # Images have their own column; one that is named here by a URL would never be read.
        named = [part.get(key) for key in ("image", "url", "image_url")]
        named += [value.get("url") for value in named if isinstance(value, dict)]
        for value in named:
            if isinstance(value, str) and is_url(value):
                hint = "download the image, put its path into the images column and leave a part of type image here"
                raise RowError("E12", where, f"names the URL {value[:60]!r}; {hint}")
    if kind == "image":
        return IMAGE
    raise RowError("E02", where, f"has the type {kind!r}; parts are text or image")


def parse_response(value: object, column: str) -> str:
    """A response worth imitating or avoiding; empty if there is none (nothing, empty text, an empty list).

    Args:
        value: Text, a list whose first item counts, or messages, of which the last one of the assistant counts.
        column: Where it stands, for error messages.

    Raises:
        RowError: E02, E03, E04 if it is not readable text, E17 for messages in which the assistant says nothing.

    >>> parse_response([{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "It is 4."}], "chosen")
    'It is 4.'
    """
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        value, column = value[0], f"{column}[0]"
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, dict):
        return _last_reply([value], column)
    return _last_reply(value, column) if isinstance(value, list) else check_text(value, column)


def _last_reply(messages: Sequence[object], column: str) -> str:
    for k, message in reversed(list(enumerate(messages))):
        if isinstance(message, dict) and message.get("role") == "assistant":
            content, where = message.get("content"), f"{column}[{k}].content"
            break
    else:
        raise RowError("E17", column, "has no message of the assistant; a response is text, or what the assistant says")
    if not isinstance(content, list):
        return "" if content is None or content == "" else check_text(content, where)
    parts = [_parse_part(part, f"{where}[{k}]") for k, part in enumerate(content)]
    if IMAGE in parts:
        raise RowError("E02", f"{where}[{parts.index(IMAGE)}]", "is an image; a response is text")
    return "".join(map(str, parts))


def opening_think(messages: Sequence[Message]) -> str:
    """The ``<think>`` that a prompt's text ends with, and the white space behind it; empty if it ends otherwise."""
    text = messages[-1].parts[-1]
    if isinstance(text, str) and text.rstrip().endswith(OPEN_THINK):
        return text[text.rindex(OPEN_THINK) :]
    return ""


def continue_think(response: str, given: str, column: str) -> str:
    r"""The response without the ``<think>`` it begins with, if the prompt already ends with it.

    Args:
        response: Text, or empty for none.
        given: What :func:`opening_think` found; empty leaves the response as it is.
        column: Where the response stands, for error messages.

    Raises:
        RowError: E03, nothing is left of the response.

    >>> continue_think("<think>\nThree dots.</think>3", "<think>\n", "target")
    'Three dots.</think>3'
    """
    start = response.lstrip()
    if not given or not start.startswith(OPEN_THINK):
        return response
    rest = start.removeprefix(given if start.startswith(given) else OPEN_THINK)
    if not rest.strip():
        raise RowError("E03", column, f"has nothing behind the {OPEN_THINK} that the prompt already ends with")
    return rest
