"""Whether two answers are the same: known verdicts, and answers that try to deceive the comparison."""

from __future__ import annotations

import pytest

from rllava_pl.rewards import formulas
from rllava_pl.rewards.formulas import math_equal
from rllava_pl.rewards.text import last_boxed

RIGHT = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{3}{4}", "0.75"),
    (r"-\frac12", "-0.5"),
    (r"65^\circ", "65°"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    ("0.3333333", "1/3"),
    ("x=4", "4"),
    ("$4$.", "4"),
    (r"\boxed{4}", "4"),
    ("0.5", "50%"),
    ("50", "50%"),
    ("5 cm", "5"),
    ("5", r"5\text{ cm}"),
    (r"12\text{ cm}^{2}", "12 cm^2"),
    (r"\{3,1\}", r"\{1,3\}"),
    ("(1, 0.5)", r"(1,\frac{1}{2})"),
    ("[0,1)", "[0, 1)"),
    ("Red", "red"),
    (r"\text{red}", "red"),
]
WRONG = [
    (r"50\%", "0.5"),
    ("(1,2)", "(1,2]"),
    ("(3,1)", "(1,3)"),
    ("(1,2)", "(1,2,3)"),
    ("3 or 5", "5"),
    ("3, 5", "5"),
    ("4 and 5", "4"),
    (r"5\text{ or six}", "5"),
    ("5 cm", "5 m"),
    ("-4", "4"),
    ("der", "red"),  # the same product of letters
    ("0.3333", "1/3"),
    ("1/0", "4"),
    ("", "4"),
    ("2 3", "23x"),
]
SYMBOLIC = [
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\frac{\pi}{2}", r"\pi/2", True),
    ("y=2x+1", "y=1+2x", True),
    ("5m", "5", False),
    (r"\sqrt{2}", "1.41", False),
]
REFUSED = [
    "9^{9^{9}}",
    "9^9^9",
    "9^{{9^9}}",
    "2^{1000000}",
    "100000!",
    "3!!",
    r"\sum_{k=1}^{9}k",
    "7" * 101 + "x",
    "(" * 40,
]


@pytest.mark.parametrize(("given", "truth"), RIGHT)
def test_equal_answers_are_right(given: str, truth: str) -> None:
    assert math_equal(given, truth) == (True, "")


@pytest.mark.parametrize(("given", "truth"), WRONG)
def test_different_answers_are_wrong(given: str, truth: str) -> None:
    assert not math_equal(given, truth).right


@pytest.mark.parametrize(("given", "truth", "right"), SYMBOLIC)
def test_formulas_are_compared_by_computer_algebra(given: str, truth: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert math_equal(given, truth) == (right, "")


@pytest.mark.parametrize("given", REFUSED)
def test_formula_known_to_take_long_is_refused(given: str) -> None:
    assert math_equal(given, "1") == (False, "grader_refused")


def test_long_answer_is_wrong() -> None:
    assert math_equal("1+" * 300, "1") == (False, "answer_too_long")


def test_long_label_differs_from_its_beginning() -> None:
    assert not math_equal("12" * 256, "12" * 300).right


def test_without_math_verify_formulas_are_wrong_with_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "find_spec", lambda _: None)
    assert math_equal(r"2\sqrt{3}", r"\sqrt{12}") == (False, "symbolic_unavailable")
    assert math_equal(r"\frac{1}{2}", "0.5").right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{4} then \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"\boxed{4 {", None),
        (r"} \boxed {4}", "4"),
        (r"\\boxed{4}", None),
        ("no box", None),
        ("", None),
    ],
)
def test_last_boxed_returns_content_or_none(text: str, content: str | None) -> None:
    assert last_boxed(text) == content
