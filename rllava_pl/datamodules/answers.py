"""The form that a reward needs an answer to have, checked when the data is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from rllava_pl.datamodules.rejections import RowError, shortened
from rllava_pl.rewards.text import exact, last_block, number

AnswerKind = Literal["text", "number", "integer", "box", "json"]
MOST_BYTES = 64 * 1024


def check_answer(answer: str, kind: AnswerKind, column: str) -> None:
    """Refuse (E16) an answer that is too long, or that a reward for this kind of answer could not read."""
    if (size := len(answer.encode())) > MOST_BYTES:
        raise RowError("E16", column, f"has {size} bytes; an answer has at most {MOST_BYTES}")
    label = last_block(answer, "answer")  # rewards accept a tagged label
    expected, fits = KINDS[kind]
    if not fits((answer if label is None else label).strip()):
        raise RowError("E16", column, f"is {shortened(answer)!r}; answer_kind {kind} needs {expected}")


def check_target(target: str, answer: str, column: str) -> None:
    """Refuse (E19) a target whose last ``<answer>`` block contradicts the row's answer."""
    said, label = last_block(target, "answer"), last_block(answer, "answer")
    truth = answer if label is None else label
    if said is not None and truth.strip() and not exact(said, truth):
        answers = f"answers {shortened(said)!r}, but the row's answer is {shortened(truth)!r}"
        raise RowError("E19", column, f"{answers}; correct one")


def _is_integer(text: str) -> bool:
    value = number(text)
    return value is not None and value.denominator == 1


def _is_box(text: str) -> bool:
    box = _parsed(text)
    if not (isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)):
        return False
    left, top, right, bottom = box
    return all(map(math.isfinite, box)) and right > left and bottom > top


def _parsed(text: str) -> object:
    """The JSON value; None if it is not JSON, or holds numbers that are not finite."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


KINDS: Mapping[AnswerKind, tuple[str, Callable[[str], bool]]] = MappingProxyType(
    {
        "text": ("text", bool),
        "number": ("a number such as 4, -0.5, 1/2, 1,000 or 50%", lambda text: number(text) is not None),
        "integer": ("a whole number", _is_integer),
        "box": ("[x1, y1, x2, y2] with finite numbers, x2 > x1 and y2 > y1", _is_box),
        "json": ("valid JSON", lambda text: text == "null" or _parsed(text) is not None),
    }
)
"""Per kind: what is needed, for messages, and whether a text has it."""
