"""Advantages from rewards."""

from __future__ import annotations

from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from rllava_pl.functional import advantages
from tests.functional.cases import assert_near, generator, grouped_rewards

DTYPES = [torch.float32, torch.float64]
ESTIMATORS = {
    "grpo": advantages.grpo,
    "grpo without std": lambda rewards, group: advantages.grpo(rewards, group, scale_by_std=False),
    "rloo": advantages.rloo,
}


def slow(rewards: Tensor, group: Tensor, name: str) -> Tensor:
    values, ids = rewards.double().tolist(), group.tolist()
    result = []
    for i, reward in enumerate(values):
        others = [values[j] for j in range(len(values)) if ids[j] == ids[i] and j != i]
        members = [*others, reward]
        if min(members) == max(members):
            result.append(0.0)
        elif name == "rloo":
            result.append(reward - mean(others))
        else:
            result.append((reward - mean(members)) / (stdev(members) + 1e-6 if name == "grpo" else 1.0))
    return torch.tensor(result, dtype=torch.float64)


def test_grpo_of_known_groups():
    # std of (1, 0) is sqrt(1/2): 0.5 / (0.707107 + 1e-6)
    pair = advantages.grpo(torch.tensor([1.0, 0.0]), torch.tensor([4, 4]))
    torch.testing.assert_close(pair, torch.tensor([0.707106, -0.707106]), atol=1e-6, rtol=0)
    # mean 1/4, std 1/2
    rewards, group = torch.tensor([0.0, 0, 0, 1]), torch.zeros(4, dtype=torch.int64)
    expected = torch.tensor([-0.499999, -0.499999, -0.499999, 1.499997])
    torch.testing.assert_close(advantages.grpo(rewards, group), expected, atol=1e-6, rtol=0)
    plain = advantages.grpo(rewards, group, scale_by_std=False)
    torch.testing.assert_close(plain, torch.tensor([-0.25, -0.25, -0.25, 0.75]))


def test_rloo_of_known_groups():
    # 1 - (0 + .5) / 2, 0 - (1 + .5) / 2, .5 - (1 + 0) / 2; the second group is equal
    actual = advantages.rloo(torch.tensor([1.0, 0, 0.5, 1, 1]), torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(actual, torch.tensor([0.75, -0.75, 0, 0, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_equal_a_slow_loop(name, dtype):
    for rewards, group in grouped_rewards(dtype, seed=1):
        assert_near(ESTIMATORS[name](rewards, group), slow(rewards, group, name), dtype=dtype)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_rewards_and_groups_of_one_get_exactly_zero(name):
    rewards, group = torch.tensor([0.7, 0.7, 0.7, 1.0]), torch.tensor([3, 3, 3, 9])
    assert (ESTIMATORS[name](rewards, group) == 0).all()
    # fp32 statistics would give 0.19 for 15 rewards, fp64 ones something of 1e-10
    for size in range(2, 20):
        for equal in (torch.full((size,), 0.98), torch.full((size,), 0.98, dtype=torch.float64)):
            assert (ESTIMATORS[name](equal, torch.zeros(size, dtype=torch.int64)) == 0).all()
    assert (ESTIMATORS[name](torch.tensor([5.0]), torch.tensor([0])) == 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_order_of_samples_and_names_of_groups_do_not_matter(name):
    for rewards, group in list(grouped_rewards(torch.float64, seed=2))[::10]:
        expected = ESTIMATORS[name](rewards, group)
        order = torch.randperm(len(rewards), generator=generator(0))
        assert_near(ESTIMATORS[name](rewards[order], group[order]), expected[order], dtype=torch.float64)
        assert_near(ESTIMATORS[name](rewards, -3 * group + 1), expected, dtype=torch.float64)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_other_groups_do_not_matter(name):
    rewards, group = torch.tensor([1.0, 0.0, 0.3, 50.0, -20.0]), torch.tensor([1, 1, 1, 2, 2])
    torch.testing.assert_close(
        ESTIMATORS[name](rewards, group)[:3], ESTIMATORS[name](rewards[:3], group[:3]), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_constant_added_to_a_group_does_not_matter(name):
    rewards, group = torch.randn(9, generator=generator(3), dtype=torch.float64), torch.arange(9) % 3
    shifted = rewards + group * 10.0
    assert_near(ESTIMATORS[name](shifted, group), ESTIMATORS[name](rewards, group), dtype=torch.float64)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_of_a_group_sum_to_zero(name):
    for rewards, group in list(grouped_rewards(torch.float64, seed=4))[::10]:
        result = ESTIMATORS[name](rewards, group)
        assert all(abs(result[group == g].sum()) < 1e-9 for g in group.unique())


def test_scale_of_rewards_cancels_with_std_only():
    rewards, group = torch.randn(8, generator=generator(5), dtype=torch.float64), torch.arange(8) % 2
    scaled = advantages.grpo(100 * rewards, group, eps=0.0)
    assert_near(scaled, advantages.grpo(rewards, group, eps=0.0), dtype=torch.float64)
    plain = advantages.grpo(100 * rewards, group, scale_by_std=False)
    assert_near(plain, 100 * advantages.grpo(rewards, group, scale_by_std=False), dtype=torch.float64)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_half_precision_is_raised_and_inputs_stay(name):
    rewards, group = torch.tensor([1.0, 0.0, 0.25], dtype=torch.bfloat16), torch.tensor([2, 2, 2])
    before = rewards.clone(), group.clone()
    result = ESTIMATORS[name](rewards, group)
    assert_near(result, slow(rewards, group, name), dtype=torch.float32)
    assert torch.equal(rewards, before[0]) and torch.equal(group, before[1])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_empty_batch_gives_an_empty_result(name):
    assert ESTIMATORS[name](torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_wrong_shapes_are_named(name):
    both = r"both must be \(N,\), one entry a sample$"
    with pytest.raises(ValueError, match=rf"^group_N has shape \(2,\), the values have \(3,\); {both}"):
        ESTIMATORS[name](torch.zeros(3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=rf"^group_N has shape \(2, 2\), the values have \(2, 2\); {both}"):
        ESTIMATORS[name](torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))
