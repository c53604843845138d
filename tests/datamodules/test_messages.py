"""Responses out of text, lists and messages."""

from __future__ import annotations

import pytest

from rllava_pl.datamodules.messages import parse_response
from rllava_pl.datamodules.rejections import RowError

USER = {"role": "user", "content": "Which?"}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("It is 4.", "It is 4."),
        (" It is 4.\n", " It is 4.\n"),
        (["first", "second"], "first"),
        (assistant("4"), "4"),
        ([assistant("4")], "4"),
        ([USER, assistant("4")], "4"),
        ([USER, assistant("4"), USER, assistant("5")], "5"),
        ([USER, assistant("4"), USER], "4"),
        ([[USER, assistant("4")], [USER, assistant("5")]], "4"),
        ([assistant([{"type": "text", "text": "It is"}, {"type": "text", "text": " 4."}])], "It is 4."),
    ],
)
def test_every_form_of_a_response_gives_its_text(value, text):
    assert parse_response(value, "target") == text


@pytest.mark.parametrize(
    "value", [None, "", [], [None], [""], [[]], [assistant(None)], [assistant("")], [USER, assistant([])]]
)
def test_absent_response_is_empty_text(value):
    assert parse_response(value, "target") == ""


@pytest.mark.parametrize(
    ("value", "expected", "message"),
    [
        (7, "E02 chosen", "is int; text is needed"),
        (["  "], "E03 chosen[0]", "is empty"),
        ([["a"]], "E17 chosen[0]", "has no message of the assistant"),
        (USER, "E17 chosen", "has no message of the assistant; a response is text, or what the assistant says"),
        ([{"from": "gpt", "value": "4"}], "E17 chosen", "has no message of the assistant"),
        ([USER, assistant("a\ud800")], "E04 chosen[1].content", "has a lone surrogate at character 1"),
        ([assistant([{"type": "text", "text": "a"}, {"type": "image"}])], "E02 chosen[0].content[1]", "is an image"),
        ([assistant([{"type": "audio"}])], "E02 chosen[0].content[0]", "has the type 'audio'"),
    ],
)
def test_bad_response_is_refused_with_its_place(value, expected, message):
    with pytest.raises(RowError, match=message) as caught:
        parse_response(value, "chosen")
    assert f"{caught.value.code} {caught.value.field}" == expected


def test_hostile_nesting_is_a_bad_row():
    value: object = "a"
    for _ in range(5000):
        value = [value]
    with pytest.raises(RowError, match="has no message of the assistant"):
        parse_response(value, "target")
