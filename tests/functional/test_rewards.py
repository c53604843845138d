"""Rewards in time, and groups that teach something."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.functional.rewards import informative_groups, place_rewards
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


def test_batches_without_rows_or_tokens_have_no_place():
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


def test_a_difference_in_the_last_digit_is_information():
    rewards = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert informative_groups(rewards, torch.tensor([0, 0])).tolist() == [True, True]


def test_wrong_shapes_are_named():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"^rewards have shape \(3,\), mask \(2, 3\); they must be \(N,\) and \(N, T\)$"
    ):
        place_rewards(torch.zeros(3), mask)
    with pytest.raises(ValueError, match=r"^mask has dtype torch.int64; it must be torch.bool"):
        place_rewards(torch.zeros(2), mask.long())
    with pytest.raises(ValueError, match=r"^group_N has shape \(2,\), the values have \(3,\); both must be \(N,\)"):
        informative_groups(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
