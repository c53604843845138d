"""Answers in a box: form, place, and formulas that keep a computer algebra system busy."""

from __future__ import annotations

import dataclasses

import pytest

from rllava_pl.rewards import Judging, MathReward, Panel
from rllava_pl.rewards.text import MAX_CHARS
from rllava_pl.types import Score

THOUGHT = "<think>2 + 2</think>"


@pytest.mark.parametrize(
    ("text", "accuracy", "form"),
    [
        (rf"{THOUGHT} So \boxed{{4}}.", 1, 1),
        (rf"{THOUGHT} So \boxed{{5}}.", 0, 1),
        (r"So \boxed{4}.", 1, 0),
        (rf"Well, {THOUGHT} \boxed{{4}}", 1, 0),
        (rf"{THOUGHT}{THOUGHT} \boxed{{4}}", 1, 0),
        (r"<think>\boxed{4}</think> four", 0, 0),
        (rf"{THOUGHT} \boxed{{5}} or \boxed{{4}}", 1, 1),
        (f"{THOUGHT} 4", 0, 0),
        ("", 0, 0),
    ],
)
def test_form_and_answer(rollout, text, accuracy, form):
    value = 0.1 * form + 0.9 * accuracy
    assert MathReward().score(rollout(text)) == Score(value, {"accuracy": accuracy, "format": form})


def test_a_box_anywhere_on_request(rollout):
    score = MathReward(scope="anywhere").score(rollout(r"<think>\boxed{4}</think> four"))
    assert score.components == {"accuracy": 1.0, "format": 0.0}


def test_what_is_odd_is_flagged(rollout):
    cut = dataclasses.replace(rollout("<think>4"), finish_reason="length")
    assert MathReward().score(cut) == Score(0.0, {"accuracy": 0.0, "format": 0.0}, flags=("truncated",))
    long = MathReward().score(rollout(" " * MAX_CHARS + rf"{THOUGHT} \boxed{{4}}"))
    assert long == Score(0.9, {"accuracy": 1.0, "format": 0.0}, flags=("too_long",))
    refused = MathReward().score(rollout(r"\boxed{9^{9^9}}"))
    assert refused.flags == ("grader_refused",)


def test_a_prompt_without_answer_is_unscored(rollout):
    assert MathReward().score(rollout(r"\boxed{4}", answer=" ")) == Score(None, reason="no_answer")


def test_a_weight_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"MathReward: accuracy_weight is -1.0"):
        MathReward(accuracy_weight=-1.0)


@pytest.mark.slow
def test_a_formula_that_never_ends_is_wrong_after_two_seconds(rollout):
    pytest.importorskip("math_verify")
    panel = Panel([MathReward()], Judging(isolation="process", workers=1))
    endless = rollout(r"\boxed{(x+y+z+1)^{200}}", answer="(x+y+z+2)^{200}")
    known = rollout(rf"{THOUGHT} \boxed{{2\sqrt{{3}}}}", answer=r"\sqrt{12}")
    judgement = panel([known, endless])
    assert judgement.rewards == [1.0, 0.0]
    assert judgement.flags == {"grader_timeout": 1} and not judgement.causes
    panel.close()
