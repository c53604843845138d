r"""Whether two answers to a mathematics question are the same.

Cheap stages come first, and the first that decides wins: equal without notation; equal as numbers; equal as tuples,
intervals and sets of numbers; equal for a computer algebra system. Hostile formulas can occupy the last stage without
end, so ``MathReward`` works in a process that is killed after two seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from itertools import zip_longest
from typing import NamedTuple

from rllava_pl.rewards.text import number

MAX_CHARS = 512
"""A longer answer is wrong."""

RELATIVE_TOLERANCE = Fraction(1, 1_000_000)
"""Largest relative difference of numbers of which one is written with a decimal point."""


class Verdict(NamedTuple):
    """Whether an answer is right, and a flag to count."""

    right: bool
    flag: str = ""


def math_equal(given: str, truth: str) -> Verdict:
    r"""Whether two answers in LaTeX or plain text are the same.

    ``\frac{1}{2}`` is 0.5, ``1,234`` is 1234, ``65^\circ`` is 65°, ``x=4`` is 4, ``2\sqrt{3}`` is ``\sqrt{12}``.
    ``50\%`` is 50 and not 0.5, ``(1,2)`` is not ``(1,2]``, and ``3 or 5`` is not 5.
    """
    if len(given) > MAX_CHARS:
        return Verdict(False, "answer_too_long")
    if len(truth) > MAX_CHARS:  # the stages below read only its beginning
        return Verdict(False)
    unit, true_unit = _unit(given), _unit(truth)
    if unit and true_unit and unit != true_unit:
        return Verdict(False)
    a, b = strip_notation(given), strip_notation(truth)
    if not _has_name(b) and _has_name(a):
        a = a.partition("=")[2]
    if a == b and a:
        return Verdict(True)
    if b.isalpha() and len(b) > 1:  # algebra would read a word as a product of letters
        return Verdict(a.lower() == b.lower())
    if (equal := _numbers_equal(a, b)) is not None:
        return Verdict(equal)
    if (equal := _collections_equal(a, b)) is not None:
        return Verdict(equal)
    if _alternatives(a) != _alternatives(b):
        return Verdict(False)
    if _HOSTILE.search(a) or _depth(a) > 32 or not a:
        return Verdict(False, "grader_refused" if a else "")
    return _symbolic(given, truth)


# -- notation ----------------------------------------------------------------------------------------------------------

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed|operatorname)\s*+\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=[0-9}])(?:\s*\\(?:text|mathrm|mbox)\{(?![^{}]*\b(?:or|and)\b)[a-zA-Z .]*(?:\^\{?[23]\}?)?\}"  # 5\text{ cm}
    r"|\s*(?:mm|cm|km|in|ft|inches|feet|miles|kg|sec|seconds|min|minutes|hours|days|degrees?|units?|dollars|cents)"
    r"|\s+[mgsh])(?:\^\{?[23]\}?)?\s*\.?$"  # one letter directly behind a number is a variable
)
_NOTATION = [
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[!;:]|\\ |[$\s]"), ""),
    (re.compile(r"\{,\}|\\,"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"(?:°|\^\{?\\circ\}?)$"), ""),
    (re.compile(r"\\frac([0-9])([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"^(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}$"), r"\1\2/\3"),
]


@lru_cache(maxsize=1024)
def strip_notation(text: str) -> str:
    """The answer without what is only notation: spaces, ``$``, text boxes, units after a number, a full stop."""
    text = re.sub(r"\s+", "", _UNIT.sub("", text[:MAX_CHARS].strip())).rstrip(".")
    for _ in range(3):  # boxes may be nested
        text = _WRAPPED.sub(r"\1", text)
    for pattern, plain in _NOTATION:
        text = pattern.sub(plain, text)
    return text.rstrip(".")


def _unit(text: str) -> str:
    """The letters of the unit behind a number; empty if there is none."""
    match = _UNIT.search(text[:MAX_CHARS].strip())
    return re.sub(r"\\(?:text|mathrm|mbox)|[^a-zA-Z0-9]", "", match[0]) if match else ""


def _has_name(text: str) -> bool:
    """``x=4``: a name and its value."""
    return re.match(r"[a-zA-Z](?:_?[0-9a-z])?=[^=]", text) is not None


def _alternatives(text: str) -> int:
    """How many answers there are: ``3or5`` and ``3,5`` are two."""
    return len(re.findall(r"or|and|;", text)) + len(_split(text))


# -- numbers and collections -------------------------------------------------------------------------------------------


def _numbers_equal(given: str, truth: str) -> bool | None:
    """None if one of them is not a number."""
    a, b = number(given), number(truth)
    if a is None or b is None:
        return None
    if truth.endswith("%") and not given.endswith("%") and a == b / 100:
        return True
    return abs(a - b) <= RELATIVE_TOLERANCE * abs(b) if "." in given + truth else a == b


def _collections_equal(given: str, truth: str) -> bool | None:
    r"""Tuples and intervals element by element, ``\{...\}`` in any order; None if one of them is not a collection."""
    a, b = given.replace("\\{", "⟨").replace("\\}", "⟩"), truth.replace("\\{", "⟨").replace("\\}", "⟩")
    if not (_is_collection(a) and _is_collection(b)):
        return None
    if (a[0], a[-1]) != (b[0], b[-1]):
        return False
    ours, theirs = _split(a[1:-1]), _split(b[1:-1])
    if a[0] == "⟨":
        ours, theirs = sorted(ours), sorted(theirs)
    if ours == theirs:
        return True
    equal = [x == y or _numbers_equal(x, y) for x, y in zip_longest(ours, theirs, fillvalue="")]
    return None if None in equal and len(ours) == len(theirs) else all(equal)


def _is_collection(text: str) -> bool:
    return len(text) > 2 and text[0] in "([⟨" and text[-1] in ")]⟩" and "," in text


def _split(text: str) -> list[str]:
    """Split at the commas outside all brackets, except thousands commas."""
    parts, depth = [""], 0
    for char in text if number(text) is None else ():
        depth += (char in "([{⟨") - (char in ")]}⟩")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts if number(text) is None else [text]


# -- formulas ----------------------------------------------------------------------------------------------------------

_HOSTILE = re.compile(
    r"[0-9]{101}"  # long numbers
    r"|[0-9]{3}!|!!|\)!|\}!"  # factorials above 100, or of expressions
    r"|\^\{*+[^{}^]*+\^|\^\{[^{}]*+\{?[^{}]*+\^"  # towers of powers
    r"|\^\{*-?[0-9]{4}|\*\*"  # exponents above 999
    r"|\\(?:sum|prod|i?int|lim|binom)"  # operators that are evaluated rather than compared
)


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _symbolic(given: str, truth: str) -> Verdict:
    """Compare by math-verify without its time limit, which needs alarm signals and thus the main thread."""
    if not has_math_verify():
        return Verdict(False, "symbolic_unavailable")
    from math_verify import verify

    a, b = _parsed(given), _parsed(truth)
    return Verdict(bool(a and b and verify(b, a, timeout_seconds=None)))


def _parsed(text: str) -> Sequence[object]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    notation = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    kinds = [LatexExtractionConfig(normalization_config=notation), ExprExtractionConfig()]
    return parse(f"${text.strip().strip('$')}$", kinds, parsing_timeout=None)


def has_math_verify() -> bool:
    """Whether the computer algebra system is installed."""
    return find_spec("math_verify") is not None


def warm_up() -> None:
    """Import what the last stage needs; its parser is slow for the first formulas."""
    if has_math_verify():
        _symbolic(r"\frac{2\sqrt{3}}{x^2+1}", r"\frac{\sqrt{12}}{x^2+1}")
