r"""Whether two answers to a mathematics question are the same.

Cheap stages come first, and the first that decides wins: equal without notation; equal as numbers; equal as tuples,
intervals and sets of numbers; equal for a computer algebra system. Hostile formulas can occupy the last stage without
end, so ``MathReward`` works in a process that is killed after two seconds.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate, zip_longest
from typing import NamedTuple

from rllava_pl.rewards.text import number

MAX_CHARS = 512
"""A longer answer is wrong."""
MAX_DEPTH = 32
"""A formula with more brackets inside each other is not compared by computer algebra."""

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
    if _NAMED.match(a) and not _NAMED.match(b):
        a = a.partition("=")[2]
    if a == b and a:
        return Verdict(True)
    if b.isalpha() and len(b) > 1:  # algebra would read a word as a product of letters
        return Verdict(a.lower() == b.lower())
    for stage in (_numbers_equal, _collections_equal):
        if (equal := stage(a, b)) is not None:
            return Verdict(equal)
    # 3or5 and 3,5 are two answers
    alternatives = [len(_ALTERNATIVE.findall(text)) + len(_split(text)) for text in (a, b)]
    if alternatives[0] != alternatives[1] or not a:
        return Verdict(False)
    if _HOSTILE.search(a) or max(accumulate((char in "([{") - (char in ")]}") for char in a)) > MAX_DEPTH:
        return Verdict(False, "grader_refused")
    if not has_math_verify():
        return Verdict(False, "symbolic_unavailable")
    return Verdict(_same_formula(given, truth))


# -- notation ----------------------------------------------------------------------------------------------------------

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed|operatorname)\s*+\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=[0-9}])(?:\s*\\(?:text|mathrm|mbox)\{(?![^{}]*\b(?:or|and)\b)[a-zA-Z .]*(?:\^\{?[23]\}?)?\}"  # 5\text{ cm}
    r"|\s*(?:mm|cm|km|in|ft|inches|feet|miles|kg|sec|seconds|min|minutes|hours|days|degrees?|units?|dollars|cents)"
    r"|\s+[mgsh])(?:\^\{?[23]\}?)?\s*\.?$"  # one letter directly behind a number is a variable
)
_NAMED = re.compile(r"[a-zA-Z](?:_?[0-9a-z])?=[^=]")  # x=4
_ALTERNATIVE = re.compile(r"or|and|;")
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
    a, b = (text.replace("\\{", "⟨").replace("\\}", "⟩") for text in (given, truth))
    if not all(len(x) > 2 and x[0] in "([⟨" and x[-1] in ")]⟩" and "," in x for x in (a, b)):
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


def _split(text: str) -> list[str]:
    """Split at the commas outside all brackets, except thousands commas."""
    if number(text) is not None:
        return [text]
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{⟨") - (char in ")]}⟩")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


# -- formulas ----------------------------------------------------------------------------------------------------------

_HOSTILE = re.compile(
    r"[0-9]{101}"  # long numbers
    r"|[0-9]{3}!|!!|\)!|\}!"  # factorials above 100, or of expressions
    r"|\^\{*+[^{}^]*+\^|\^\{[^{}]*+\{?[^{}]*+\^"  # towers of powers
    r"|\^\{*-?[0-9]{4}|\*\*"  # exponents above 999
    r"|\\(?:sum|prod|i?int|lim|binom)"  # operators that are evaluated rather than compared
)


def _same_formula(given: str, truth: str) -> bool:
    """Compare by math-verify without its time limits, which need alarm signals and thus the main thread."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    notation = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    kinds = [LatexExtractionConfig(normalization_config=notation), ExprExtractionConfig()]
    a, b = (parse(f"${text.strip().strip('$')}$", kinds, parsing_timeout=None) for text in (given, truth))
    return bool(a and b and verify(b, a, timeout_seconds=None))


def has_math_verify() -> bool:
    """Whether the computer algebra system is installed."""
    return find_spec("math_verify") is not None
