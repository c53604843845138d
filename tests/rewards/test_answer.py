from __future__ import annotations

import math

import pytest
from jsonargparse import ArgumentParser

from rllava_pl.rewards import AnswerTagReward, BaseReward
from rllava_pl.rewards.text import MAX_CHARS
from rllava_pl.types import Reward

# text, (format, accuracy), accuracy if lenient; the label is 4
KNOWN = {
    "right": ("<answer>4</answer>", (1, 1), 1),
    "wrong": ("<answer>5</answer>", (1, 0), 0),
    "right, other spelling of the number": ("<answer>4.00</answer>", (1, 1), 1),
    "right, full stop and spaces inside": ("<answer> 4. </answer>", (1, 1), 1),
    "white space around": ("\n <answer>4</answer> \n", (1, 1), 1),
    "end-of-turn string behind": ("<answer>4</answer><|im_end|>\n", (1, 1), 1),
    "spaces inside the tags": ("< answer >4< / answer >", (1, 1), 1),
    "guesses twice, last right": ("<answer>5</answer><answer>4</answer>", (0, 0), 1),
    "guesses twice, last wrong": ("<answer>4</answer><answer>5</answer>", (0, 0), 0),
    "guesses twice in one block": ("<answer>4 5</answer>", (1, 0), 0),
    "nested": ("<answer><answer>4</answer></answer>", (0, 0), 0),
    "nested, no inner tag closed": ("<answer>5<answer>4</answer>", (0, 0), 0),
    "unclosed": ("<answer>4", (0, 0), 0),
    "unclosed behind a closed one": ("<answer>4</answer><answer>5", (0, 0), 1),
    "closing tag only": ("4</answer>", (0, 0), 0),
    "tags swapped": ("</answer>4<answer>", (0, 0), 0),
    "upper case": ("<ANSWER>4</ANSWER>", (0, 0), 0),
    "line break inside the tag": ("<answer\n>4</answer>", (0, 0), 0),
    "tag with an attribute": ("<answer x=1>4</answer>", (0, 0), 0),
    "empty block": ("<answer></answer>", (0, 0), 0),
    "blank block": ("<answer> \n </answer>", (0, 0), 0),
    "text before": ("It is <answer>4</answer>", (0, 0), 1),
    "text behind": ("<answer>4</answer> for sure", (0, 0), 1),
    "no tags": ("4", (0, 0), 0),
    "nothing": ("", (0, 0), 0),
    "sign of the answer lost": ("<answer>-4</answer>", (1, 0), 0),
    "the label inside more digits": ("<answer>44</answer>", (1, 0), 0),
    "too long": ("x" * MAX_CHARS + "<answer>4</answer>", (0, 0), 1),
    "well-formed but too long": ("<answer>4" + " " * MAX_CHARS + "</answer>", (0, 0), 0),
}


@pytest.mark.parametrize(("text", "expected", "lenient"), KNOWN.values(), ids=KNOWN.keys())
def test_known_responses(rollout, text, expected, lenient):
    form, accuracy = expected
    score = AnswerTagReward().score(rollout(text))
    assert score.components == {"accuracy": accuracy, "format": form}
    assert score.value == pytest.approx(0.1 * form + 0.9 * accuracy)
    assert AnswerTagReward(lenient=True).score(rollout(text)).components == {"accuracy": lenient, "format": form}


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("<think>2 + 2</think><answer>4</answer>", 1),
        ("<think>2 + 2</think>\n\n<answer>4</answer>", 1),
        ("<think></think><answer>4</answer>", 1),
        ("<think>is it <b>4</b>?</think><answer>4</answer>", 1),
        ("<think>2 + 2</think> so <answer>4</answer>", 0),
        ("<answer>4</answer><think>2 + 2</think>", 0),
        ("<think>2 + 2<answer>4</answer></think>", 0),
        ("<think>or <answer>5</answer></think><answer>4</answer>", 0),
        ("<think>2</think><think>2</think><answer>4</answer>", 0),
        ("<answer>4</answer>", 0),
    ],
)
def test_blocks_must_stand_in_order(rollout, text, form):
    score = AnswerTagReward(tags=["think", "answer"]).score(rollout(text))
    assert score.components == {"accuracy": form, "format": form}


@pytest.mark.parametrize(
    ("given", "label", "right"),
    [
        ("The red square.", "red square", True),
        ("Red Square", "red square", True),
        ("blue square", "red square", False),
        ("1,234", "1234", True),
        ("1/2", "0.5", True),
        ("1/2 cup", "12 cup", False),
        ("-4 cm", "4 cm", False),
        ("b", "B", True),
        ("A B", "B", False),
        ("", "A", False),
        ("红色。", "红色", True),
        ("4", "<answer> 4 </answer>", True),
    ],
)
def test_answer_is_compared_with_label(rollout, given, label, right):
    score = AnswerTagReward(lenient=True).score(rollout(f"<answer>{given}</answer>", answer=label))
    assert score.components["accuracy"] == right


@pytest.mark.parametrize("answer", ["", " \n", "<answer> </answer>"])
def test_prompt_without_answer_is_unscored(rollout, answer):
    score = AnswerTagReward().score(rollout("<answer>4</answer>", answer=answer))
    assert (score.value, score.reason) == (None, "no_answer")


@pytest.mark.parametrize("answer", [4, 4.0, ["<answer>4</answer>"]])
def test_label_that_is_not_a_string_is_compared_as_text(rollout, answer):
    assert AnswerTagReward().score(rollout("<answer>4</answer>", answer=answer)).value == 1.0


def test_weights_of_format_and_accuracy(rollout):
    reward = AnswerTagReward(format_weight=0.5, accuracy_weight=2.0)
    assert [score.value for score in reward([rollout("<answer>4</answer>"), rollout("<answer>5</answer>")])] == [
        2.5,
        0.5,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": []}, "tags is []; give a list like [think, answer]"),
        ({"tags": "answer"}, "tags is 'answer'; give a list like [think, answer]"),
        ({"tags": ["answer", "think"]}, "tags ['answer', 'think'] end in 'think'; the last must be 'answer'"),
        ({"tags": ["<answer>"]}, "'<answer>' is not a tag name; use lower-case ASCII letters, digits and _"),
        ({"tags": ["Answer"]}, "'Answer' is not a tag name"),
        ({"tags": ["answer", "answer"]}, "tags ['answer', 'answer'] repeat a tag"),
        ({"format_weight": -0.1}, "format_weight is -0.1; it must be finite and not negative"),
        ({"accuracy_weight": math.nan}, "accuracy_weight is nan; it must be finite and not negative"),
        ({"weight": math.inf}, "AnswerTagReward: weight is inf; it must be a finite number"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError) as caught:
        AnswerTagReward(**options)
    assert message in str(caught.value)


def test_reward_by_short_name_on_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[BaseReward | Reward])
    arguments = ["--rewards+=AnswerTagReward", "--rewards.tags=[think, answer]", "--rewards+=RepetitionPenalty"]
    answer, repetition = parser.instantiate(parser.parse_args(arguments)).rewards
    assert (answer.tags, repetition.ngram_tokens) == (("think", "answer"), 8)


def test_help_explains_every_option(capsys):
    parser = ArgumentParser()
    parser.add_argument("--reward", type=BaseReward)
    with pytest.raises(SystemExit):
        parser.parse_args(["--reward.help=AnswerTagReward"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Accept the last answer block wherever it stands" in shown
    assert "Factor of this reward in the sum of rewards" in shown
