from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch

from rllava_pl.rewards import AnswerTagReward, BaseReward, RepetitionPenalty, RewardError, judge
from rllava_pl.types import Reward, Score

RIGHT, WRONG = "<answer>4</answer>", "<answer>5</answer>"


class Length(BaseReward):
    def score(self, rollout):
        return Score(float(len(rollout.text)))


class Scripted:
    """A reward that is no BaseReward, and returns what it is told."""

    def __init__(self, *scores, weight=1.0):
        self.scores = list(scores)
        self.weight = weight

    def __call__(self, rollouts):
        return self.scores


class Other(Scripted):
    pass


def same(one, other):
    """Equality of columns in which nan equals nan."""
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k], equal_nan=True) for k in one)


# ---------------------------------------------------------------------------------------------------------- BaseReward


def test_five_lines_make_a_reward(rollout):
    reward = Length(weight=0.5)
    assert isinstance(reward, Reward)
    assert reward([rollout("four"), rollout("")]) == [Score(4.0), Score(0.0)]
    judgement = judge([reward], [rollout("four"), rollout("")])
    assert judgement.rewards == [2.0, 0.0]
    assert judgement.components == {"length": [4.0, 0.0]}  # before the weight
    assert judgement.causes == {}


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("AnswerTagReward", "answer_tag"),
        ("RepetitionPenalty", "repetition_penalty"),
        ("OCRReward", "ocr"),
        ("HTMLFormatReward", "html_format"),
        ("F1Reward", "f1"),
        ("Reward", "reward"),
    ],
)
def test_names_derive_from_the_class(class_name, name):
    assert type(class_name, (Length,), {}).name == name


def test_a_name_can_be_chosen():
    assert type("Anything", (Length,), {"name": "brevity"}).name == "brevity"


def test_components_must_not_be_one_string():
    with pytest.raises(TypeError, match=r'Typo.components is a string; write components = \("accuracy",\)'):
        type("Typo", (Length,), {"components": "accuracy"})


def test_a_reward_without_its_own_constructor_call_has_weight_one():
    class Forgetful(Length):
        def __init__(self):
            pass

    assert Forgetful().weight == 1.0


def test_base_reward_needs_a_score():
    with pytest.raises(TypeError, match="abstract"):
        BaseReward()


# -------------------------------------------------------------------------------------------------------- sum, weights


def test_weighted_sum_over_rewards(rollout):
    rollouts = [rollout(RIGHT, ids=(7, 7, 7, 7, 7)), rollout(WRONG, ids=(1, 2, 3))]
    judgement = judge([AnswerTagReward(weight=2.0), RepetitionPenalty(ngram_tokens=2, weight=0.4)], rollouts)
    # 2 x 1.0 + 0.4 x -0.75 and 2 x 0.1 + 0.4 x 0
    assert judgement.rewards == pytest.approx([1.7, 0.2])
    assert judgement.components == {"accuracy": [1, 0], "format": [1, 1], "repetition_penalty": [-0.75, 0]}


def test_permuting_samples_permutes_the_judgement(rollout):
    rollouts = [rollout(RIGHT), rollout(WRONG), rollout(RIGHT, answer="")]
    forward, backward = judge([AnswerTagReward()], rollouts), judge([AnswerTagReward()], rollouts[::-1])
    assert forward.rewards == backward.rewards[::-1] == [1.0, 0.1, None]
    assert same(forward.components, {name: column[::-1] for name, column in backward.components.items()})
    assert forward.causes == backward.causes == {"no_answer": 1}


def test_no_rollouts_give_empty_columns():
    judgement = judge([AnswerTagReward()], [])
    assert (judgement.rewards, judgement.components, judgement.causes) == ([], {"accuracy": [], "format": []}, {})


def test_any_real_number_serves(rollout):
    values = [True, 1, Fraction(1, 2), np.float32(0.5), np.int64(3)]
    judgement = judge([Scripted(*map(Score, values))], [rollout() for _ in values])
    assert judgement.rewards == [1.0, 1.0, 0.5, 0.5, 3.0]
    assert all(type(reward) is float for reward in judgement.rewards)


def test_a_judgement_is_frozen(rollout):
    with pytest.raises(FrozenInstanceError):
        judge([Length()], [rollout()]).rewards = []


# ---------------------------------------------------------------------------------------------------- names of columns


def test_declared_names_that_clash_are_prefixed_for_both(rollout):
    class Other(Length):
        components = ("accuracy",)

        def score(self, rollout):
            return Score(0.5, {"accuracy": 0.5})

    judgement = judge([AnswerTagReward(), Other()], [rollout(RIGHT)])
    assert judgement.components == {"answer_tag/accuracy": [1.0], "format": [1.0], "other/accuracy": [0.5]}


def test_names_do_not_depend_on_the_data(rollout):
    rewards = [AnswerTagReward(), AnswerTagReward(lenient=True)]
    scored, unscored = judge(rewards, [rollout(RIGHT)]), judge(rewards, [rollout(RIGHT, answer="")])
    assert list(scored.components) == list(unscored.components)
    assert list(scored.components) == [
        "answer_tag/accuracy",
        "answer_tag/format",
        "answer_tag_2/accuracy",
        "answer_tag_2/format",
    ]
    assert all(math.isnan(x) for column in unscored.components.values() for x in column)


def test_an_undeclared_component_is_prefixed_unless_its_reward_is_alone(rollout):
    undeclared = Scripted(Score(1.0, {"accuracy": 0.5}))
    alone = judge([undeclared], [rollout(RIGHT)])
    assert alone.components == {"scripted": [1.0], "accuracy": [0.5]}
    together = judge([undeclared, AnswerTagReward()], [rollout(RIGHT)])
    assert together.components == {"scripted": [1.0], "scripted/accuracy": [0.5], "accuracy": [1.0], "format": [1.0]}


def test_a_component_of_the_rewards_own_name_replaces_its_value(rollout):
    judgement = judge([Scripted(Score(1.0, {"scripted": 120}))], [rollout()])
    assert judgement.components == {"scripted": [120.0]}


def test_a_component_that_only_some_scores_name_is_nan_elsewhere(rollout):
    judgement = judge([Scripted(Score(1.0, {"iou": 0.5}), Score(0.0))], [rollout(), rollout()])
    assert same(judgement.components, {"scripted": [1.0, 0.0], "iou": [0.5, math.nan]})


# -------------------------------------------------------------------------------------------------------------- faults

FAULTS = {
    "unscored on purpose": (Score(None, reason="grader_down"), "grader_down"),
    "unscored, no reason": (Score(None), "no_reason"),
    "no score": (None, "missing"),
    "a bare number": (1.0, "bad_type"),
    "a string": (Score("1.0"), "bad_type"),
    "a tensor": (Score(torch.tensor(1.0)), "bad_type"),
    "nan": (Score(math.nan), "not_finite"),
    "infinity": (Score(-math.inf), "not_finite"),
    "infinite in float32": (Score(1e39), "not_finite"),
    "an integer beyond every float": (Score(10**400), "not_finite"),
    "half-precision infinity": (Score(np.float16(math.inf)), "not_finite"),
    "a component of nan": (Score(1.0, {"iou": math.nan}), "not_finite"),
    "a component of text": (Score(1.0, {"iou": "high"}), "bad_type"),
    "components in a list": (Score(1.0, [1.0]), "bad_type"),
}


@pytest.mark.parametrize(("score", "cause"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_score_is_unscored_and_counted_never_zero(rollout, score, cause):
    judgement = judge([Scripted(Score(1.0), score)], [rollout(), rollout()])
    assert judgement.rewards == [1.0, None]
    assert judgement.causes == {cause: 1}
    assert math.isnan(judgement.components["scripted"][1])


def test_a_declared_component_must_be_there(rollout):
    class Careless(Length):
        components = ("accuracy",)

    judgement = judge([Careless()], [rollout(RIGHT)])
    assert (judgement.rewards, judgement.causes) == ([None], {"missing_component": 1})


def test_a_sample_counts_once_and_keeps_what_other_rewards_say(rollout):
    judgement = judge([Scripted(Score(None, reason="first")), Other(None), Length()], [rollout("four")])
    assert (judgement.rewards, judgement.causes) == ([None], {"first": 1})
    assert same(judgement.components, {"scripted": [math.nan], "other": [math.nan], "length": [4.0]})


def test_a_sum_beyond_float32_is_unscored(rollout):
    judgement = judge([Scripted(Score(3e38)), Scripted(Score(3e38))], [rollout()])
    assert (judgement.rewards, judgement.causes) == ([None], {"not_finite": 1})


@pytest.mark.parametrize(
    ("returned", "cause"),
    [([], "bad_length"), ([Score(1.0)] * 3, "bad_length"), (None, "bad_type"), ({0: Score(1.0)}, "bad_type")],
)
def test_a_call_that_returns_something_else_leaves_all_its_samples_unscored(rollout, returned, cause):
    reward = Scripted()
    reward.scores = returned
    judgement = judge([reward], [rollout(), rollout()])
    assert (judgement.rewards, judgement.causes) == ([None, None], {cause: 2})


def test_an_exception_costs_its_sample_and_is_logged_with_prompt_and_source(rollout, caplog):
    class Broken(BaseReward):
        def score(self, rollout):
            return Score(1 / len(rollout.text))

    rollouts = [rollout("fine"), rollout("", uid="row:2", source="train.jsonl:2"), rollout("", uid="row:3")]
    judgement = judge([Broken()], rollouts)
    assert (judgement.rewards, judgement.causes) == ([0.25, None, None], {"exception": 2})
    (line,) = caplog.messages  # the first of its cause
    assert line.startswith(
        "reward broken, exception at prompt 'row:2' (train.jsonl:2): ZeroDivisionError: division by zero, at "
    )
    assert re.search(r"test_base\.py:\d+ score$", line)


def test_an_exception_in_a_call_for_all_samples_costs_them_all(rollout):
    class Own:
        weight = 1.0

        def __call__(self, rollouts):
            raise KeyError("label")

    judgement = judge([Own()], [rollout(), rollout()])
    assert (judgement.rewards, judgement.causes) == ([None, None], {"exception": 2})


def test_flags_are_counted(rollout):
    judgement = judge(
        [Scripted(Score(0.0, flags=("too_long",)), Score(1.0, flags=("too_long", "odd")))], [rollout()] * 2
    )
    assert judgement.flags == {"too_long": 2, "odd": 1}


def test_zeroed_keeps_the_causes(rollout):
    judgement = judge([Scripted(Score(1.0, {"iou": 0.5}), Score(None, reason="no_box"))], [rollout()] * 2).zeroed()
    assert judgement.rewards == [1.0, 0.0]
    assert judgement.components == {"scripted": [1.0, 0.0], "iou": [0.5, 0.0]}
    assert judgement.causes == {"no_box": 1}


def test_no_reward_says_how_to_give_one():
    with pytest.raises(ValueError) as caught:
        judge([], [])
    assert str(caught.value) == (
        "no reward given: without one there is nothing to learn from. Give at least one, for example in YAML\n"
        "rewards:\n"
        "  - class_path: rllava_pl.rewards.AnswerTagReward\n"
        "    init_args: {weight: 1.0}"
    )


def test_something_else_than_a_reward_is_refused(rollout):
    with pytest.raises(TypeError, match=r"rewards\[1\] is 'AnswerTagReward', which is no reward: it needs a `weight`"):
        judge([Length(), "AnswerTagReward"], [rollout()])


@pytest.mark.parametrize("weight", [math.nan, "1.0", None])
def test_a_weight_must_be_a_finite_number(rollout, weight):
    with pytest.raises(RewardError, match=rf"rewards\[0\], Scripted: weight {weight!r} is no finite number"):
        judge([Scripted(Score(1.0), weight=weight)], [rollout()])
