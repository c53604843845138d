"""Demonstrations: the share is right on average, the draw is a function of counters, the responses fit the answer."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from rllava_pl.datamodules import DigitsDataModule, SyntheticVisionDataModule
from rllava_pl.datamodules.demonstrations import check_share, demonstrate
from rllava_pl.types import Prompt

ANSWERS = ("a", "b", "c")
PROMPT = Prompt("p", (), answer="b")


def drawn(share: float, count: int, *counters: str) -> list[Prompt]:
    return [demonstrate(PROMPT, ANSWERS, share, *counters, index) for index in range(count)]


def demonstrated(prompts: list[Prompt]) -> set[int]:
    return {index for index, prompt in enumerate(prompts) if prompt.target}


def test_demonstration_gives_the_answer_and_the_rejected_response_another():
    for prompt in drawn(1.0, 50):
        assert prompt.target == "<answer>b</answer>"
        assert prompt.rejected in ("<answer>a</answer>", "<answer>c</answer>")
        assert (prompt.uid, prompt.messages, prompt.answer) == (PROMPT.uid, PROMPT.messages, PROMPT.answer)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_share_of_demonstrations_is_exact_on_average(share):
    count = 4000
    deviation = math.sqrt(share * (1 - share) / count)  # of a binomial share
    assert len(demonstrated(drawn(share, count))) / count == pytest.approx(share, abs=4 * deviation)


def test_shares_of_0_and_1_give_none_and_all():
    assert demonstrated(drawn(0.0, 500)) == set()
    assert demonstrated(drawn(1.0, 500)) == set(range(500))


def test_larger_share_contains_the_demonstrations_of_a_smaller_one():
    few, many = drawn(0.2, 500), drawn(0.6, 500)
    assert demonstrated(few) < demonstrated(many)
    assert all(few[index] == many[index] for index in demonstrated(few))


def test_rejected_answers_are_uniform_for_every_share():
    for share, count in ((1.0, 2000), (0.25, 8000)):
        wrong = Counter(prompt.rejected for prompt in drawn(share, count) if prompt.target)
        assert len(wrong) == 2
        # 2000 fair coins: standard deviation sqrt(2000) / 2 = 22
        assert max(wrong.values()) - sum(wrong.values()) / 2 < 4 * 23


def test_tasks_and_splits_draw_independently():
    one, two = demonstrated(drawn(0.5, 500, "color", "train")), demonstrated(drawn(0.5, 500, "color", "val"))
    # Independent halves: 125 in common of 500, standard deviation sqrt(500 * 3/16) = 9.7
    assert abs(len(one & two) - 125) < 4 * 10


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan])
def test_number_outside_0_to_1_is_refused_as_share(share):
    with pytest.raises(ValueError, match=r"demonstrations is .*; it is the share of training prompts, from 0 to 1"):
        check_share(share)


@pytest.mark.parametrize("data_module", [SyntheticVisionDataModule, DigitsDataModule])
def test_data_modules_refuse_a_wrong_share_at_construction(data_module):
    with pytest.raises(ValueError, match=r"demonstrations is 2; it is the share"):
        data_module(demonstrations=2)
