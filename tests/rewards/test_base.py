from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch

from rllava_pl.rewards import AnswerTagReward, BaseReward, RepetitionPenalty, RewardError, compute_rewards
from rllava_pl.types import Reward, Score

RIGHT, WRONG = "<answer>4</answer>", "<answer>5</answer>"


class Length(BaseReward):
    def score(self, rollout):
        return Score(float(len(rollout.text)))


class Scripted:
    """A reward that is no BaseReward and returns the scores it was made with."""

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


def test_base_reward_subclass_with_score_is_a_reward(rollout):
    reward = Length(weight=0.5)
    assert isinstance(reward, Reward)
    assert reward([rollout("four"), rollout("")]) == [Score(4.0), Score(0.0)]
    output = compute_rewards([reward], [rollout("four"), rollout("")])
    assert output.rewards == [2.0, 0.0]
    assert output.components == {"length": [4.0, 0.0]}  # before the weight
    assert output.causes == {}


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
def test_reward_name_derives_from_class_name(class_name, name):
    assert type(class_name, (Length,), {}).name == name


def test_reward_name_set_in_class_is_kept():
    assert type("Anything", (Length,), {"name": "brevity"}).name == "brevity"


def test_components_given_as_string_are_refused():
    with pytest.raises(TypeError, match=r'Typo.components is a string; write components = \("accuracy",\)'):
        type("Typo", (Length,), {"components": "accuracy"})


def test_reward_that_skips_base_constructor_has_weight_one():
    class Forgetful(Length):
        def __init__(self):
            pass

    assert Forgetful().weight == 1.0


def test_base_reward_without_score_method_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        BaseReward()


# -------------------------------------------------------------------------------------------------------- sum, weights


def test_rewards_are_summed_with_weights(rollout):
    rollouts = [rollout(RIGHT, ids=(7, 7, 7, 7, 7)), rollout(WRONG, ids=(1, 2, 3))]
    output = compute_rewards([AnswerTagReward(weight=2.0), RepetitionPenalty(ngram_tokens=2, weight=0.4)], rollouts)
    # 2 x 1.0 + 0.4 x -0.75 and 2 x 0.1 + 0.4 x 0
    assert output.rewards == pytest.approx([1.7, 0.2])
    assert output.components == {"accuracy": [1, 0], "format": [1, 1], "repetition_penalty": [-0.75, 0]}


def test_permuted_samples_give_permuted_output(rollout):
    rollouts = [rollout(RIGHT), rollout(WRONG), rollout(RIGHT, answer="")]
    forward, backward = (
        compute_rewards([AnswerTagReward()], rollouts),
        compute_rewards([AnswerTagReward()], rollouts[::-1]),
    )
    assert forward.rewards == backward.rewards[::-1] == [1.0, 0.1, None]
    assert same(forward.components, {name: column[::-1] for name, column in backward.components.items()})
    assert forward.causes == backward.causes == {"no_answer": 1}


def test_no_rollouts_give_empty_columns():
    output = compute_rewards([AnswerTagReward()], [])
    assert (output.rewards, output.components, output.causes) == ([], {"accuracy": [], "format": []}, {})


def test_any_real_number_is_accepted_as_value(rollout):
    values = [True, 1, Fraction(1, 2), np.float32(0.5), np.int64(3)]
    output = compute_rewards([Scripted(*map(Score, values))], [rollout() for _ in values])
    assert output.rewards == [1.0, 1.0, 0.5, 0.5, 3.0]
    assert all(type(reward) is float for reward in output.rewards)


def test_reward_output_is_frozen(rollout):
    with pytest.raises(FrozenInstanceError):
        compute_rewards([Length()], [rollout()]).rewards = []


# ---------------------------------------------------------------------------------------------------- names of columns


def test_component_declared_by_two_rewards_is_prefixed_for_both(rollout):
    class Other(Length):
        components = ("accuracy",)

        def score(self, rollout):
            return Score(0.5, {"accuracy": 0.5})

    output = compute_rewards([AnswerTagReward(), Other()], [rollout(RIGHT)])
    assert output.components == {"answer_tag_accuracy": [1.0], "format": [1.0], "other_accuracy": [0.5]}


def test_component_names_do_not_depend_on_data(rollout):
    rewards = [AnswerTagReward(), AnswerTagReward(lenient=True)]
    scored, unscored = compute_rewards(rewards, [rollout(RIGHT)]), compute_rewards(rewards, [rollout(RIGHT, answer="")])
    assert list(scored.components) == list(unscored.components)
    assert list(scored.components) == [
        "answer_tag_accuracy",
        "answer_tag_format",
        "answer_tag_2_accuracy",
        "answer_tag_2_format",
    ]
    assert all(math.isnan(x) for column in unscored.components.values() for x in column)


def test_undeclared_component_is_prefixed_unless_its_reward_is_alone(rollout):
    undeclared = Scripted(Score(1.0, {"accuracy": 0.5}))
    alone = compute_rewards([undeclared], [rollout(RIGHT)])
    assert alone.components == {"scripted": [1.0], "accuracy": [0.5]}
    together = compute_rewards([undeclared, AnswerTagReward()], [rollout(RIGHT)])
    assert together.components == {"scripted": [1.0], "scripted_accuracy": [0.5], "accuracy": [1.0], "format": [1.0]}


def test_component_named_as_its_reward_replaces_the_value(rollout):
    output = compute_rewards([Scripted(Score(1.0, {"scripted": 120}))], [rollout()])
    assert output.components == {"scripted": [120.0]}


def test_component_missing_from_some_scores_is_nan_there(rollout):
    output = compute_rewards([Scripted(Score(1.0, {"iou": 0.5}), Score(0.0))], [rollout(), rollout()])
    assert same(output.components, {"scripted": [1.0, 0.0], "iou": [0.5, math.nan]})


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
def test_invalid_score_is_unscored_and_counted(rollout, score, cause):
    output = compute_rewards([Scripted(Score(1.0), score)], [rollout(), rollout()])
    assert output.rewards == [1.0, None]
    assert output.causes == {cause: 1}
    assert math.isnan(output.components["scripted"][1])


def test_missing_declared_component_is_a_fault(rollout):
    class Careless(Length):
        components = ("accuracy",)

    output = compute_rewards([Careless()], [rollout(RIGHT)])
    assert (output.rewards, output.causes) == ([None], {"missing_component": 1})


def test_sample_counts_once_and_keeps_components_of_other_rewards(rollout):
    output = compute_rewards([Scripted(Score(None, reason="first")), Other(None), Length()], [rollout("four")])
    assert (output.rewards, output.causes) == ([None], {"first": 1})
    assert same(output.components, {"scripted": [math.nan], "other": [math.nan], "length": [4.0]})


def test_sum_beyond_float32_is_unscored(rollout):
    output = compute_rewards([Scripted(Score(3e38)), Scripted(Score(3e38))], [rollout()])
    assert (output.rewards, output.causes) == ([None], {"not_finite": 1})


@pytest.mark.parametrize(
    ("returned", "cause"),
    [([], "bad_length"), ([Score(1.0)] * 3, "bad_length"), (None, "bad_type"), ({0: Score(1.0)}, "bad_type")],
)
def test_call_with_invalid_result_leaves_all_samples_unscored(rollout, returned, cause):
    reward = Scripted()
    reward.scores = returned
    output = compute_rewards([reward], [rollout(), rollout()])
    assert (output.rewards, output.causes) == ([None, None], {cause: 2})


def test_exception_costs_its_sample_and_is_logged_with_prompt_and_source(rollout, caplog):
    class Broken(BaseReward):
        def score(self, rollout):
            return Score(1 / len(rollout.text))

    rollouts = [rollout("fine"), rollout("", uid="row:2", source="train.jsonl:2"), rollout("", uid="row:3")]
    output = compute_rewards([Broken()], rollouts)
    assert (output.rewards, output.causes) == ([0.25, None, None], {"exception": 2})
    (message,) = caplog.messages  # the first of its cause
    assert message.startswith(
        "reward broken, exception at prompt 'row:2' (train.jsonl:2): ZeroDivisionError: division by zero, at "
    )
    assert re.search(r"test_base\.py:\d+ score$", message)


def test_exception_in_call_for_all_samples_costs_all(rollout):
    class Own:
        weight = 1.0

        def __call__(self, rollouts):
            raise KeyError("label")

    output = compute_rewards([Own()], [rollout(), rollout()])
    assert (output.rewards, output.causes) == ([None, None], {"exception": 2})


def test_flags_are_counted(rollout):
    output = compute_rewards(
        [Scripted(Score(0.0, flags=("too_long",)), Score(1.0, flags=("too_long", "odd")))], [rollout()] * 2
    )
    assert output.flags == {"too_long": 2, "odd": 1}


def test_zeroed_output_keeps_causes(rollout):
    output = compute_rewards(
        [Scripted(Score(1.0, {"iou": 0.5}), Score(None, reason="no_box"))], [rollout()] * 2
    ).zeroed()
    assert output.rewards == [1.0, 0.0]
    assert output.components == {"scripted": [1.0, 0.0], "iou": [0.5, 0.0]}
    assert output.causes == {"no_box": 1}


def test_empty_rewards_are_refused_with_an_example():
    with pytest.raises(ValueError) as caught:
        compute_rewards([], [])
    assert str(caught.value) == (
        "no reward given: without one there is nothing to learn from. Give at least one, for example in YAML\n"
        "rewards:\n"
        "  - class_path: rllava_pl.rewards.AnswerTagReward\n"
        "    init_args: {weight: 1.0}"
    )


def test_object_without_weight_is_refused(rollout):
    with pytest.raises(TypeError, match=r"rewards\[1\] is 'AnswerTagReward', which is no reward: it needs a `weight`"):
        compute_rewards([Length(), "AnswerTagReward"], [rollout()])


@pytest.mark.parametrize("weight", [math.nan, "1.0", None])
def test_weight_that_is_not_finite_is_refused(rollout, weight):
    with pytest.raises(RewardError, match=rf"rewards\[0\], Scripted: weight {weight!r} is not a finite number"):
        compute_rewards([Scripted(Score(1.0), weight=weight)], [rollout()])


# -------------------------------------------------------------------------------------------- rewards that do not apply


class Digits(BaseReward):
    """1 for a response of digits; applies only to prompts whose answer is a number."""

    components = ("accuracy",)

    def score(self, rollout):
        if not isinstance(rollout.prompt.answer, int):
            return Score.not_applicable()
        return Score(1 / len(rollout.text), {"accuracy": float(rollout.text.isdigit())})


def test_sum_skips_rewards_that_do_not_apply(rollout):
    rollouts = [rollout("12", answer=12), rollout("ab", answer="x")]
    output = compute_rewards([Digits(weight=2.0), Length()], rollouts)
    assert output.rewards == [3.0, 2.0] and not output.causes  # 2 x 1/2 + 2 and 2
    assert same(output.components, {"accuracy": [1.0, math.nan], "length": [2.0, 2.0]})
    assert output.applies == {"accuracy": [True, False], "length": [True, True]}


def test_row_to_which_no_reward_applies_is_unscored_and_logged(rollout, caplog):
    output = compute_rewards([Digits()], [rollout("12", answer=12), rollout("12", answer=None)])
    assert (output.rewards, output.causes) == ([0.5, None], {"not_applicable": 1})
    assert caplog.messages == ["reward sum, not_applicable at prompt 'row:0': no reward applies to this row"]


def test_reward_that_fails_is_the_cause_beside_one_that_does_not_apply(rollout):
    output = compute_rewards([Digits(), Scripted(Score(None, reason="no_box"))], [rollout("", answer="x")])
    assert (output.rewards, output.causes) == ([None], {"no_box": 1})


def test_zeroed_output_leaves_components_that_do_not_apply(rollout):
    rollouts = [rollout("", answer=12), rollout("", answer="x")]  # the first divides by 0
    output = compute_rewards([Digits(), Scripted(Score(1.0), Score(None))], rollouts).zeroed()
    assert output.rewards == [0.0, 0.0]
    assert same(output.components, {"accuracy": [0.0, math.nan], "scripted": [1.0, 0.0]})
    assert output.causes == {"exception": 1, "no_reason": 1}


def test_value_of_a_score_that_does_not_apply_is_a_fault(rollout):
    output = compute_rewards([Scripted(Score(1.0, applicable=False))], [rollout()])
    assert (output.rewards, output.causes) == ([None], {"bad_type": 1})


def test_column_names_are_unique_and_hold_no_slash(rollout):
    class Box(Length):
        components = ("scripted_iou",)

        def score(self, rollout):
            return Score(0.0, {"scripted_iou": 0.25})

    output = compute_rewards([Scripted(Score(1.0, {"iou": 0.5, "iou/50": 1.0})), Box()], [rollout()])
    expected = {"scripted": [1.0], "scripted_iou": [0.25], "scripted_iou_2": [0.5], "scripted_iou_50": [1.0]}
    assert output.components == expected
