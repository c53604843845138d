from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllava_pl.rewards import text as parsers

NAMES = ("think", "answer")
PARSERS = {
    "tag_tokens": lambda text: list(parsers.tag_tokens(text, NAMES)),
    "blocks": lambda text: parsers.blocks(text, "answer"),
    "last_block": lambda text: parsers.last_block(text, "answer"),
    "strict": lambda text: parsers.strict(text, NAMES),
    "answer_scope": parsers.answer_scope,
    "normalise": parsers.normalise,
    "number": parsers.number,
    "exact": lambda text: parsers.exact(text, text[::-1]),
    "is_tag_name": parsers.is_tag_name,
    "last_boxed": parsers.last_boxed,
}


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("<a>1</a>", ["1"]),
        ("x<a>1</a>y<a>2</a>z", ["1", "2"]),
        ("< a >1< / a >", ["1"]),
        ("<a>1<a>2</a>", ["1<a>2"]),  # inner tags are plain text
        ("<a>1</a></a>", ["1"]),
        ("</a><a>1</a>", ["1"]),
        ("<a>1</a><a>2", ["1"]),
        ("<a>1", []),
        ("<a></a>", [""]),
        ("<A>1</A>", []),
        ("<aa>1</aa>", []),
        ("<a b>1</a>", []),
        ("<//a>1<a>2</a>", ["2"]),
        ("<<a>>1</a>", [">1"]),
        ("<a<a>1</a>", ["1"]),
        ("1 < 2 and <a>3 > 2</a>", ["3 > 2"]),
        ("", []),
    ],
)
def test_blocks_end_at_next_closing_tag(text, contents):
    assert parsers.blocks(text, "a") == contents
    assert parsers.last_block(text, "a") == (contents[-1] if contents else None)


def test_tag_tokens_have_name_slash_and_span():
    text = "x< / a >y<b>"
    tokens = list(parsers.tag_tokens(text, ("a", "b")))
    assert [(token["name"], token["slash"]) for token in tokens] == [("a", "/"), ("b", "")]
    assert [(token[0], token.span()) for token in tokens] == [("< / a >", (1, 8)), ("<b>", (9, 12))]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("<a>1</a><b>2</b>", True),
        ("  <a>1</a>\n<b>2</b>\n", True),
        ("<a>1</a><b>2</b> <|im_end|> \n</s>", True),
        ("<a></a><b>2</b>", True),
        ("<a>1</a><b> </b>", False),
        ("<a>1</a>,<b>2</b>", False),
        (".<a>1</a><b>2</b>", False),
        ("<a>1</a><b>2</b>.", False),
        ("<|im_end|><a>1</a><b>2</b>", False),
        ("<b>2</b><a>1</a>", False),
        ("<a>1<b>2</b></a>", False),
        ("<a>1</a><b>2</b><b>2</b>", False),
        ("<a>1</a><b>2</b></a>", False),
        ("<a>1</a>", False),
        ("", False),
    ],
)
def test_strict_accepts_only_blocks_in_order(text, valid):
    assert parsers.strict(text, ("a", "b")) is valid


def test_strict_refuses_text_above_max_chars():
    fits = "<a>" + "1" * (parsers.MAX_CHARS - 7) + "</a>"
    assert parsers.strict(fits, ("a",))
    assert not parsers.strict(fits + " ", ("a",))


def test_strict_without_tags_accepts_nothing():
    assert not parsers.strict("", ())


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("<think>4</think> 5", " 5"),
        ("<think>4< /think>5</think>6", "6"),
        ("no thoughts", "no thoughts"),
        ("<think>never closed", "<think>never closed"),
    ],
)
def test_answer_scope_begins_after_last_thought(text, scope):
    assert parsers.answer_scope(text) == scope


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The red  Square.", "red square"),
        ("an apple, a pear & the plum!", "apple pear plum"),
        ("well-known", "wellknown"),
        ("**4**", "4"),
        ("$4$", "4"),
        ("4.", "4"),
        ("A", "a"),
        ("The", "the"),
        ("vitamin A", "vitamin a"),
        ("A B", "a b"),
        ("theatre", "theatre"),
        ("红 色。", "红色"),
        ("「４」", "4"),
        ("-4", "-4"),
        ("−4", "-4"),
        ("- 4", "- 4"),
        ("-$4", "-4"),
        (".5", ".5"),
        ("3.5", "3.5"),
        ("1/2", "1/2"),
        ("x-4", "x-4"),
        ("-x", "-x"),
        ("(1;2)", "1;2"),
        ("x + 1", "x + 1"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normalise_keeps_signs_of_numbers(text, normal):
    assert parsers.normalise(text) == normal


@given(st.text(max_size=60))
@settings(derandomize=True, max_examples=100)
def test_exact_is_reflexive_and_symmetric(text):
    assert parsers.exact(text, text)
    other = text.swapcase()
    assert parsers.exact(text, other) == parsers.exact(other, text)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.50", "1/2", True),
        ("+4", "4", True),
        ("50%", "50", True),
        ("50%", "0.5", False),
        ("4", "-4", False),
        ("0.3333333", "1/3", False),
        ("cat", "the cat", True),
        ("!", "?", False),
        ("", "?", False),
        ("", "", True),
    ],
)
def test_exact_compares_numbers_then_text(one, other, same):
    assert parsers.exact(one, other) is same
    assert parsers.exact(other, one) is same


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", Fraction(4)),
        (" -4.50 ", Fraction(-9, 2)),
        ("+1,234,567.5", Fraction(2469135, 2)),
        ("-1/2", Fraction(-1, 2)),
        ("50%", Fraction(50)),
        ("−4", Fraction(-4)),
        ("1/0", None),
        ("1,23", None),
        ("12,345,67", None),
        ("1.2.3", None),
        ("4.", None),
        (".5", None),
        ("1e3", None),
        ("0x10", None),
        ("1_000", None),
        ("nan", None),
        ("inf", None),
        ("four", None),
        ("٤", None),
        ("²", None),
        ("", None),
        ("9" * 40, Fraction(10**40 - 1)),
        ("9" * 41, None),
        ("9" * 20 + "." + "9" * 21, None),
        ("9" * 100_000, None),
    ],
)
def test_number_is_exact_or_none(text, value):
    assert parsers.number(text) == value


def test_number_takes_forty_digits_with_commas():
    text = "-1" + ",000" * 13 + "%"  # 1 + 39 digits
    assert parsers.number(text) == Fraction(-(10**39))


TAGS = ["<", ">", "<>", "< ", " ", "<answer>", "</answer>", "<answer></answer>", "</s>", "</s> "]
WORDS = ["/", "answer", "think", "-", "- ", "a.", "1,", "9", "the ", "猫", "\ud800"]


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS.keys())
@given(text=st.text() | st.lists(st.sampled_from(TAGS + WORDS), max_size=40).map("".join))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_no_text_makes_a_parser_raise(parser, text):
    parser(text)


HOSTILE = {unit: [unit * (kib * 1024 // len(unit)) for kib in (16, 64)] for unit in TAGS + WORDS} | {
    "tag begun": ["<answer" + " " * (kib * 1024) for kib in (16, 64)],
    "sign without number": ["-" + " " * (kib * 1024) for kib in (16, 64)],
    "only starts, then an end": ["<" * (kib * 1024) + "answer>" for kib in (16, 64)],
}


@pytest.mark.parametrize(("short", "long"), HOSTILE.values(), ids=map(ascii, HOSTILE))
@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS.keys())
def test_time_grows_linearly(parser, short, long):
    # Four times the text takes 4 times as long if linear and 16 times if quadratic. Below half a millisecond there is
    # only noise, and one undisturbed attempt in five suffices.
    assert any(_seconds(parser, long) <= 8 * max(_seconds(parser, short), 5e-4) for _ in range(5))


def _seconds(parser, text: str) -> float:
    start = time.process_time()
    parser(text)
    return time.process_time() - start
