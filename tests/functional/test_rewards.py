"""Rewards in time, and groups that teach something."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from rllava_pl.functional.rewards import informative_groups, overlong_penalty, place_rewards
from tests.functional.cases import cases, generator, grouped_rewards


def test_reward_stands_on_the_last_trainable_token():
    mask = torch.tensor([[True, False, True, False], [True] * 4, [False] * 4, [False, True, False, False]])
    expected = [[0, 0, 1, 0], [0, 0, 0, 2], [0, 0, 0, 0], [0, 4, 0, 0]]
    assert place_rewards(torch.tensor([1.0, 2, 3, 4]), mask).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_place_rewards_equals_a_slow_loop(dtype):
    for _, _, credit, mask in cases(dtype, seed=1):
        rewards = credit[:, 0]
        expected = torch.zeros_like(credit)
        for row, kept in enumerate(mask.tolist()):
            last = [position for position, keep in enumerate(kept) if keep][-1:]
            expected[row, last] = rewards[row]
        actual = place_rewards(rewards, mask)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


def test_padding_columns_and_sample_order_do_not_move_a_reward():
    rng = generator(2)
    rewards, mask = torch.randn(5, generator=rng), torch.rand(5, 6, generator=rng) < 0.5
    placed = place_rewards(rewards, mask)
    wide = place_rewards(rewards, torch.cat([mask, torch.zeros(5, 3, dtype=torch.bool)], 1))
    assert torch.equal(wide, torch.cat([placed, torch.zeros(5, 3)], 1))
    order = torch.randperm(5, generator=rng)
    assert torch.equal(place_rewards(rewards[order], mask[order]), placed[order])


def test_batch_without_rows_or_tokens_has_no_rewards():
    assert place_rewards(torch.zeros(0), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)
    assert place_rewards(torch.zeros(2), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_half_precision_is_raised():
    placed = place_rewards(torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([[True, True]]))
    assert placed.dtype == torch.float32
    assert placed.tolist() == [[0, 0.5]]
    equal = torch.tensor([0.5, 0.5], dtype=torch.float16)
    assert informative_groups(equal, torch.tensor([1, 1])).tolist() == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_informative_groups_equal_a_slow_loop(dtype):
    for rewards, group in grouped_rewards(dtype, seed=3):
        pairs = list(zip(rewards.tolist(), group.tolist(), strict=True))
        expected = [len({reward for reward, other in pairs if other == own}) > 1 for _, own in pairs]
        assert informative_groups(rewards, group).tolist() == expected


def test_group_that_differs_in_the_last_digit_is_informative():
    rewards = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert informative_groups(rewards, torch.tensor([0, 0])).tolist() == [True, True]


def test_wrong_shape_is_refused_by_name():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"^rewards have shape \(3,\), mask \(2, 3\); they must be \(N,\) and \(N, T\)$"
    ):
        place_rewards(torch.zeros(3), mask)
    with pytest.raises(ValueError, match=r"^mask has dtype torch.int64; it must be torch.bool"):
        place_rewards(torch.zeros(2), mask.long())
    with pytest.raises(ValueError, match=r"^group_N has shape \(2,\), the values have \(3,\); both must be \(N,\)"):
        informative_groups(torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def test_known_lengths_have_their_penalties():
    # the buffer runs from 16384 to 20480: its start, its middle, its end, one token beyond
    lengths = torch.tensor([0, 16384, 18432, 20480, 20481, 10**6])
    actual = overlong_penalty(lengths, max_tokens=20480, buffer_tokens=4096)
    assert actual.dtype == torch.float32
    assert actual.tolist() == [0, 0, -0.5, -1, -1, -1]
    assert overlong_penalty(lengths, max_tokens=20480, buffer_tokens=4096, scale=0.5)[2].item() == -0.25


def slow_penalty(length: int, budget: int, buffer: int) -> Fraction:
    if length <= budget - buffer:
        return Fraction(0)
    return Fraction(budget - buffer - length, buffer) if length <= budget else Fraction(-1)


def test_penalties_equal_a_slow_loop():
    rng = generator(4)
    for _ in range(1000):
        budget = int(torch.randint(1, 40, (), generator=rng))
        buffer = int(torch.randint(0, budget + 1, (), generator=rng))
        scale = float(torch.rand((), generator=rng))
        lengths = torch.randint(0, 2 * budget, (9,), generator=rng)
        actual = overlong_penalty(lengths, max_tokens=budget, buffer_tokens=buffer, scale=scale)
        expected = [scale * float(slow_penalty(length, budget, buffer)) for length in lengths.tolist()]
        assert actual.tolist() == pytest.approx(expected, rel=1e-7)


def test_penalties_need_no_buffer_and_no_rows():
    hard = overlong_penalty(torch.tensor([0, 9, 10, 11]), max_tokens=10, buffer_tokens=0, scale=2.0)
    assert hard.tolist() == [0, 0, 0, -2]
    assert overlong_penalty(torch.zeros(0, dtype=torch.int64), max_tokens=10, buffer_tokens=4).shape == (0,)


def test_penalty_is_fp32_for_every_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        penalty = overlong_penalty(torch.tensor([9]), max_tokens=10, buffer_tokens=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(-2 / 3)


def test_penalties_do_not_change_the_lengths():
    lengths = torch.tensor([3, 9])
    overlong_penalty(lengths, max_tokens=10, buffer_tokens=4)
    assert lengths.tolist() == [3, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; the response budget must be at least 1 token$"),
        (
            {"buffer_tokens": 11},
            "buffer_tokens is 11; it is the last part of max_tokens=10 and must lie between 0 and 10$",
        ),
        ({"buffer_tokens": -1}, "buffer_tokens is -1; it is the last part of max_tokens=10"),
        ({"scale": -1.0}, "scale is -1.0; it must be 0 or a positive finite number, the penalty is its negative$"),
        ({"scale": math.nan}, "scale is nan; it must be 0 or a positive finite number"),
    ],
)
def test_wrong_penalty_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        overlong_penalty(torch.tensor([3]), **{"max_tokens": 10, "buffer_tokens": 4} | options)
