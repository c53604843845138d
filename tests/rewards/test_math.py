"""Boxed answers: their format and place, and formulas that a computer algebra system never finishes."""

from __future__ import annotations

import dataclasses

import pytest

from rllava_pl.rewards import MathReward, RewardRunner, Scoring
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
def test_format_and_accuracy_of_known_responses(rollout, text, accuracy, form):
    value = 0.1 * form + 0.9 * accuracy
    assert MathReward().score(rollout(text)) == Score(value, {"accuracy": accuracy, "format": form})


def test_box_inside_thoughts_counts_with_scope_anywhere(rollout):
    score = MathReward(scope="anywhere").score(rollout(r"<think>\boxed{4}</think> four"))
    assert score.components == {"accuracy": 1.0, "format": 0.0}


def test_truncated_long_and_hostile_responses_are_flagged(rollout):
    cut = dataclasses.replace(rollout("<think>4"), finish_reason="length")
    assert MathReward().score(cut) == Score(0.0, {"accuracy": 0.0, "format": 0.0}, flags=("truncated",))
    long = MathReward().score(rollout(" " * MAX_CHARS + rf"{THOUGHT} \boxed{{4}}"))
    assert long == Score(0.9, {"accuracy": 1.0, "format": 0.0}, flags=("too_long",))
    refused = MathReward().score(rollout(r"\boxed{9^{9^9}}"))
    assert refused.flags == ("grader_refused",)


def test_prompt_without_answer_is_unscored(rollout):
    assert MathReward().score(rollout(r"\boxed{4}", answer=" ")) == Score(None, reason="no_answer")


def test_answer_that_is_a_number_in_the_data_is_compared_as_text(rollout):
    assert MathReward().score(rollout(r"\boxed{4}", answer=4)).components["accuracy"] == 1.0


def test_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"MathReward: accuracy_weight is -1.0"):
        MathReward(accuracy_weight=-1.0)


@pytest.mark.slow
def test_formula_that_never_finishes_is_wrong_after_two_seconds(rollout):
    pytest.importorskip("math_verify")
    runner = RewardRunner([MathReward()], Scoring(isolation="process", workers=1))
    runner.start()
    endless = rollout(r"\boxed{(x+y+z+1)^{200}}", answer="(x+y+z+2)^{200}")
    known = rollout(rf"{THOUGHT} \boxed{{2\sqrt{{3}}}}", answer=r"\sqrt{12}")
    output = runner([known, endless])
    runner.close()
    assert output.rewards == [1.0, 0.0]
    assert output.flags == {"grader_timeout": 1} and not output.causes
