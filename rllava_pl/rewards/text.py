"""Parsers of what a policy wrote: tags, answers, numbers.

A response is hostile input: a policy finds every text that makes a parser slow, wrong or raise. So each function here
takes time linear in the text (no pattern has two open-ended repetitions in a row, unless they are possessive) and
raises on no string. ``benchmarks/parsers.py`` measures it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from itertools import islice

MAX_CHARS = 64 * 1024
"""A longer response has no valid format, and its answer is searched in its last ``MAX_CHARS`` characters."""

MAX_DIGITS = 40
"""A longer number is not accepted: arithmetic on it can take long."""

MAX_ANSWER_CHARS = 4096
"""A longer answer is right only if it equals the label exactly; normalising it could take long."""

END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")
"""Ends of a turn in common chat formats, ignored at the end of a response."""

_TAIL = re.compile(rf"(?:\s|{'|'.join(map(re.escape, END_OF_TURN))})*+")


def is_tag_name(name: str) -> bool:
    """Whether ``name`` can be a tag: lower-case ASCII letters, digits and ``_``, a letter first."""
    return name.isascii() and name.isidentifier() and name == name.lower() and not name.startswith("_")


def tag_tokens(text: str, names: Collection[str]) -> Iterator[re.Match[str]]:
    """Every tag token of these names, from left to right; names are lower case and taken literally.

    A match has the groups ``slash``, empty in an opening tag, and ``name``; spaces are allowed: ``< / answer >``. A
    token holds no second ``<``, so each ``>`` can only end the token of the last ``<`` before it.
    """
    any_name = "|".join(map(re.escape, names)) if names else "(?!)"
    return re.finditer(rf"< *+(?P<slash>/?) *+(?P<name>{any_name}) *+>", text)


def blocks(text: str, tag: str) -> list[str]:
    """Contents of all blocks: each from an opening tag to the *next* closing one; tags in between are plain text."""
    contents, start = [], -1
    for token in tag_tokens(text, (tag,)):
        if token["slash"] and start >= 0:
            contents.append(text[start : token.start()])
            start = -1
        elif not token["slash"] and start < 0:
            start = token.end()
    return contents


def last_block(text: str, tag: str) -> str | None:
    """Content of the last closed block, or None."""
    return (blocks(text, tag) or [None])[-1]


def strict(text: str, names: Sequence[str]) -> bool:
    """Whether the text is exactly one block of every name, in order, apart from white space around the blocks.

    Every tag token occurs once, the last block is not blank, and the text has at most ``MAX_CHARS`` characters.
    End-of-turn strings at the end are ignored.
    """
    wanted = [(slash, name) for name in names for slash in ("", "/")]
    tokens = list(islice(tag_tokens(text, names), len(wanted) + 1))  # one more makes the text invalid
    if len(text) > MAX_CHARS or not wanted or [token.group("slash", "name") for token in tokens] != wanted:
        return False
    stops = [0, *(token.end() for token in tokens[1::2])]
    outside = "".join(text[stop : token.start()] for stop, token in zip(stops, tokens[::2], strict=False))
    last = text[tokens[-2].end() : tokens[-1].start()]
    return not outside.strip() and last.strip() != "" and _TAIL.fullmatch(text, stops[-1]) is not None


_BRACES = re.compile(r"\\boxed\s*+\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the ``\boxed{...}`` that is closed last, with its inner braces balanced, or None.

    ``\{`` and ``\}`` do not count as braces. A box inside another one is closed first, so the outer one counts.
    """
    opened: list[int] = []  # where the content of a box begins; -1 for other braces
    found: tuple[int, int] | None = None
    for match in _BRACES.finditer(text) if r"\boxed" in text else ():
        token = match[0]
        if token == "{":
            opened.append(-1)
        elif token == "}":
            if opened and (start := opened.pop()) >= 0:
                found = start, match.start()
        elif len(token) > 2:
            opened.append(match.end())
    return None if found is None else text[slice(*found)]


def answer_scope(text: str) -> str:
    """The text after the last ``</think>``, or all of it."""
    stop = max((token.end() for token in tag_tokens(text, ("think",)) if token["slash"]), default=0)
    return text[stop:]


# Full-width forms become ASCII characters, and dashes of all kinds the minus that models mean by them.
_TO_ASCII = {0xFEE0 + code: code for code in range(0x21, 0x7F)}
_TO_ASCII |= dict.fromkeys([*range(0x2010, 0x2016), 0x2212], ord("-"))

# Without signs that are never punctuation of a sentence: + < = > ^
_PUNCTUATION = re.compile(
    r"[!-*,-/:;?@\[-\]_`{-~"  # ASCII
    r"\u00a1\u00ab\u00b7\u00bb\u00bf\u2016-\u2027"  # inverted marks, quotes, dots
    r"\u3001-\u3003\u3008-\u3011\u3014-\u301f\u30fb\uff5f-\uff65]+"  # CJK
)
_ARTICLE = re.compile(r"(?<!\S)(?:a (?=\S\S)|an |the )")
_NUMBER_AHEAD = re.compile(r"\s*[0-9]")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def normalise(text: str) -> str:
    """Text without what is irrelevant in a short answer: case, punctuation, English articles, spacing.

    ``"The red  Square."`` becomes ``"red square"``. Punctuation that belongs to a number stays (-4 is not 4, 1/2 is not
    12), and so does an ``a`` that may be an option letter or a variable: it is an article only before a longer word.
    Chinese, Japanese and Korean text loses its spaces.
    """
    text = _PUNCTUATION.sub(_kept_of_punctuation, text.translate(_TO_ASCII).lower())
    text = _ARTICLE.sub("", " ".join(text.split()))
    return text.replace(" ", "") if _CJK.search(text) else text


def _kept_of_punctuation(run: re.Match[str]) -> str:
    """All punctuation inside ``1/2`` or ``x-4``, the sign and point of ``$-.5`` and ``-x``, nothing elsewhere."""
    text, (start, stop) = run.string, run.span()
    before, after = text[start - 1 : start], text[stop : stop + 1]
    if before.isalnum() and after.isalnum() and (before.isdigit() or after.isdigit()):
        return run[0]
    negates = _NUMBER_AHEAD.match(text, stop) or (after.isalnum() and not before.isalnum())
    sign = "-" if "-" in run[0] and negates else ""
    point = "." if run[0].endswith(".") and after.isdigit() else ""
    return sign + point


def exact(predicted: str, truth: str) -> bool:
    """Whether two short answers are the same: as numbers if both are, else as normalised text.

    Answers of only punctuation, or of more than ``MAX_ANSWER_CHARS`` characters, are compared as they are.
    """
    if max(len(predicted), len(truth)) > MAX_ANSWER_CHARS:
        return predicted.strip() == truth.strip()
    a, b = number(predicted), number(truth)
    if a is not None and b is not None:
        return a == b
    a_text, b_text = normalise(predicted), normalise(truth)
    return a_text == b_text if a_text or b_text else predicted.strip() == truth.strip()


_NUMBER = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(\.[0-9]+|/0*[1-9][0-9]*)?%?")


def number(text: str) -> Fraction | None:
    """The text as an exact number, or None if it is not one.

    An optional sign; digits, with or without commas in groups of three; optionally a decimal part or ``/`` and a
    denominator; optionally ``%``, which is a unit here: 50% is 50. At most 40 digits.
    """
    text = text.strip()
    if len(text) > 2 * MAX_DIGITS:  # digits, commas and signs: a longer text has too many digits
        return None
    match = _NUMBER.fullmatch(text.translate(_TO_ASCII))
    if match is None or sum(char.isdigit() for char in match[0]) > MAX_DIGITS:
        return None
    return Fraction(match[1] + match[2].replace(",", "") + (match[3] or ""))
