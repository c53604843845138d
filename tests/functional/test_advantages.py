"""Advantages from rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import nan, sqrt
from statistics import mean, stdev, variance
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rllava_pl.functional import advantages
from tests.functional.cases import assert_near, cases, generator, grouped_rewards, masks

DTYPES = [torch.float32, torch.float64]


def lengths_of(rewards: Tensor) -> Tensor:
    """Lengths 0..8 that follow their sample through every shuffle."""
    return (1000 * rewards.double()).round().long().abs() % 9


# Advantages of every sample, as functions of rewards and groups alone.
ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": advantages.grpo,
    "grpo without std": lambda rewards, group: advantages.grpo(rewards, group, scale_by_std=False),
    "rloo": advantages.rloo,
    "opo": lambda rewards, group: advantages.opo(rewards, group, lengths_of(rewards)),
    "gpg": advantages.gpg,
    "pass_at_k": advantages.pass_at_k,
    "pass_at_k without std": lambda rewards, group: advantages.pass_at_k(rewards, group, scale_by_std=False),
}


def slow_sample(reward: float, length: int, others: list[tuple[float, int]], name: str) -> float:
    """One sample's advantage from the paper's words; ``others`` are (reward, length) of the rest of its group."""
    rewards = [other for other, _ in others]
    members, lengths = [*rewards, reward], [*(tokens for _, tokens in others), length]
    if len(set(members)) == 1:
        return 0.0
    scale = 1.0 if "without std" in name else stdev(members) + 1e-6
    match name.split()[0]:
        case "rloo":
            return reward - mean(rewards)
        case "opo":
            weights = lengths if sum(lengths) else [1] * len(members)
            return reward - sum(w * r for w, r in zip(weights, members, strict=True)) / sum(weights)
        case "pass_at_k":
            return (max(members) - max(rewards)) / scale
        case "gpg":
            return reward - mean(members)
        case _:
            return (reward - mean(members)) / scale


def slow(rewards: Tensor, group: Tensor, name: str) -> Tensor:
    samples = list(zip(rewards.double().tolist(), lengths_of(rewards).tolist(), group.tolist(), strict=True))
    result, informative = [], 0
    for i, (reward, length, own) in enumerate(samples):
        others = [(r, tokens) for j, (r, tokens, other) in enumerate(samples) if other == own and j != i]
        informative += any(r != reward for r, _ in others)
        result.append(slow_sample(reward, length, others, name))
    if name == "gpg" and informative:
        result = [value * len(samples) / informative for value in result]
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


def test_opo_of_a_known_group():
    # baseline (5 * 1 + 3 * 0) / 8 = 0.625
    rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([2, 2])
    torch.testing.assert_close(advantages.opo(rewards, group, torch.tensor([5, 3])), torch.tensor([0.375, -0.625]))
    # without a single token the plain mean 0.5; a sample without tokens is no part of the baseline
    torch.testing.assert_close(advantages.opo(rewards, group, torch.tensor([0, 0])), torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(advantages.opo(rewards, group, torch.tensor([0, 1])), torch.tensor([1.0, 0.0]))


def test_gpg_of_known_groups():
    # two of four samples are informative: alpha = 4 / 2, so 2 * (1 - .5)
    rewards, group = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(advantages.gpg(rewards, group), torch.tensor([1.0, -1, 0, 0]))
    torch.testing.assert_close(advantages.gpg(rewards, group, f_norm=4.0), torch.tensor([0.25, -0.25, 0, 0]))
    # a bonus of 0.1 for everyone makes every reward non-zero and changes nothing
    torch.testing.assert_close(advantages.gpg(rewards + 0.1, group), torch.tensor([1.0, -1, 0, 0]))


def test_pass_at_k_of_known_groups():
    # lead 1 - .5; mean 17/30, squared deviations (121 + 169 + 4) / 900, std sqrt(294 / 1800) = 0.404145
    rewards, group = torch.tensor([0.2, 1.0, 0.5]), torch.tensor([1, 1, 1])
    plain = advantages.pass_at_k(rewards, group, scale_by_std=False)
    torch.testing.assert_close(plain, torch.tensor([0, 0.5, 0]))
    torch.testing.assert_close(advantages.pass_at_k(rewards, group), torch.tensor([0, 1.237176, 0]), atol=1e-6, rtol=0)
    assert (advantages.pass_at_k(torch.tensor([1.0, 0, 1]), group) == 0).all()  # a tie
    lead = advantages.pass_at_k(torch.tensor([0.0, -1, 0.5]), torch.tensor([1, 1, 2]), scale_by_std=False)
    assert lead.tolist() == [1, 0, 0]  # the best of another group is no rival


def test_remax_subtracts_the_greedy_reward():
    actual = advantages.remax(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(actual, torch.tensor([0.75, -0.25]))
    # bf16 has 8 bits: it would round 1 - 2^-10 to 1
    half = advantages.remax(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-10], dtype=torch.bfloat16))
    assert_near(half, torch.tensor([1 - 2.0**-10], dtype=torch.float64), dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_remax_equals_a_slow_loop(dtype):
    for rewards, _ in grouped_rewards(dtype, seed=6):
        greedy = rewards.flip(0)
        pairs = zip(rewards.tolist(), greedy.tolist(), strict=True)
        expected = torch.tensor([reward - other for reward, other in pairs], dtype=torch.float64)
        assert_near(advantages.remax(rewards, greedy), expected, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_equal_a_slow_loop(name, dtype):
    for rewards, group in grouped_rewards(dtype, seed=1):
        assert_near(ESTIMATORS[name](rewards, group), slow(rewards, group, name), dtype=dtype)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_rewards_and_groups_of_one_give_exactly_zero(name):
    rewards, group = torch.tensor([0.7, 0.7, 0.7, 1.0]), torch.tensor([3, 3, 3, 9])
    assert (ESTIMATORS[name](rewards, group) == 0).all()
    # fp32 statistics would give 0.19 for 15 rewards, fp64 ones something of 1e-10
    for size in range(2, 20):
        for equal in (torch.full((size,), 0.98), torch.full((size,), 0.98, dtype=torch.float64)):
            assert (ESTIMATORS[name](equal, torch.zeros(size, dtype=torch.int64)) == 0).all()
    assert (ESTIMATORS[name](torch.tensor([5.0]), torch.tensor([0])) == 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_order_of_samples_and_group_ids_have_no_influence(name):
    for rewards, group in list(grouped_rewards(torch.float64, seed=2))[::10]:
        expected = ESTIMATORS[name](rewards, group)
        order = torch.randperm(len(rewards), generator=generator(0))
        assert_near(ESTIMATORS[name](rewards[order], group[order]), expected[order], dtype=torch.float64)
        assert_near(ESTIMATORS[name](rewards, -3 * group + 1), expected, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"gpg"}))  # gpg counts the groups that teach something
def test_other_groups_have_no_influence(name):
    rewards, group = torch.tensor([1.0, 0.0, 0.3, 50.0, -20.0]), torch.tensor([1, 1, 1, 2, 2])
    torch.testing.assert_close(
        ESTIMATORS[name](rewards, group)[:3], ESTIMATORS[name](rewards[:3], group[:3]), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"opo"}))  # lengths would change with the rewards
def test_constant_added_to_a_group_has_no_influence(name):
    rewards, group = torch.randn(9, generator=generator(3), dtype=torch.float64), torch.arange(9) % 3
    shifted = rewards + group * 10.0
    assert_near(ESTIMATORS[name](shifted, group), ESTIMATORS[name](rewards, group), dtype=torch.float64)


def test_opo_ignores_a_constant_and_sums_to_zero_by_length():
    rng = generator(7)
    group, lengths = torch.arange(12) % 3, torch.randint(0, 50, (12,), generator=rng)
    rewards = torch.randn(12, generator=rng, dtype=torch.float64)
    result = advantages.opo(rewards, group, lengths)
    assert_near(advantages.opo(rewards + 10.0 * group, group, lengths), result, dtype=torch.float64)
    assert all(abs((lengths * result)[group == g].sum()) < 1e-9 for g in group.unique())


@pytest.mark.parametrize("name", ["grpo", "grpo without std", "rloo", "gpg"])
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
def test_half_precision_is_raised_and_inputs_are_unchanged(name):
    rewards, group = torch.tensor([1.0, 0.0, 0.25], dtype=torch.bfloat16), torch.tensor([2, 2, 2])
    before = rewards.clone(), group.clone()
    result = ESTIMATORS[name](rewards, group)
    assert_near(result, slow(rewards, group, name), dtype=torch.float32)
    assert torch.equal(rewards, before[0]) and torch.equal(group, before[1])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_empty_batch_gives_an_empty_result(name):
    assert ESTIMATORS[name](torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_wrong_shape_is_refused_by_name(name):
    both = r"both must be \(N,\), one entry a sample$"
    with pytest.raises(ValueError, match=rf"^group_N has shape \(2,\), the values have \(3,\); {both}"):
        ESTIMATORS[name](torch.zeros(3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=rf"^group_N has shape \(2, 2\), the values have \(2, 2\); {both}"):
        ESTIMATORS[name](torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))


def test_wrong_length_norm_or_greedy_reward_is_refused_by_name():
    rewards, group = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(
        ValueError,
        match=r"^lengths_N has shape \(2,\), the rewards have \(3,\); both must be \(N,\), one entry a sample$",
    ):
        advantages.opo(rewards, group, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"^lengths_N holds -1; a length counts trainable tokens and is 0 or more$"):
        advantages.opo(rewards, group, torch.tensor([1, -1, 2]))
    for f_norm in (0.0, -1.0, nan):
        with pytest.raises(ValueError, match=rf"^f_norm is {f_norm}; rewards are divided by it, it must be positive$"):
            advantages.gpg(rewards, group, f_norm=f_norm)
    for greedy in (torch.zeros(2), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"^rewards_N has shape \(3,\), greedy_rewards_N .*; both must be \(N,\)"):
            advantages.remax(rewards, greedy)


class Tokens(NamedTuple):
    """What the estimators of every token take: rewards and values of tokens, a mask, rewards and groups of samples."""

    token_rewards: Tensor
    values: Tensor
    mask: Tensor
    rewards: Tensor
    group: Tensor


# Advantages of every token, and returns where there are any.
TOKEN_ESTIMATORS: dict[str, Callable[[Tokens], tuple[Tensor, ...]]] = {
    "reinforce_pp": lambda x: advantages.reinforce_pp(x.token_rewards, x.mask, gamma=0.9),
    "reinforce_pp_baseline": lambda x: (advantages.reinforce_pp_baseline(x.rewards, x.group, x.mask),),
    "gae": lambda x: advantages.gae(x.token_rewards, x.values, x.mask, gamma=0.9, lam=0.8),
    "gae, raw": lambda x: advantages.gae(x.token_rewards, x.values, x.mask, gamma=0.9, lam=0.8, whiten=False),
}


def batches(dtype: torch.dtype, seed: int) -> Iterator[Tokens]:
    """1,000 batches: masks with holes and empty rows, arbitrary values where masked, ties, groups of one."""
    rng = generator(seed)
    for _, values, credit, mask in cases(dtype, seed):
        rewards = (2 * credit[:, 0]).round()
        yield Tokens(credit, values, mask, rewards, torch.randint(-2, 2, rewards.shape, generator=rng))


def slow_returns(rewards: list[float], discount: float) -> list[float]:
    """Every return as the explicit sum over what follows, without a recursion."""
    return [sum(discount**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def slow_rows(batch: Tokens, row_of: Callable[[int, list[float], list[float]], list[float]]) -> Tensor:
    """``row_of(row, rewards, values)`` of the trainable tokens of each row, at their places; 0 elsewhere."""
    result = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for row, kept in enumerate(batch.mask):
        rewards, values = batch.token_rewards[row, kept].tolist(), batch.values[row, kept].tolist()
        result[row, kept] = torch.tensor(row_of(row, rewards, values), dtype=torch.float64)
    return result


def slow_whiten(x: Tensor, mask: Tensor) -> Tensor:
    kept = x[mask].tolist()
    middle, spread = (mean(kept), variance(kept)) if len(kept) > 1 else (sum(kept), 0.0)
    whitened = [(value - middle) / sqrt(spread + 1e-8) for value in kept]
    return torch.zeros_like(x).masked_scatter(mask, torch.tensor(whitened, dtype=torch.float64))


def test_reinforce_pp_of_known_rewards():
    # row 1: 1, .9 * 1, .9 * .9; row 2: 0, 0. Mean of the five 2.71 / 5 = .542; squared deviations
    # .071824 + .128164 + .209764 + 2 * .293764 = .99728, variance .24932, std .499320
    rewards = torch.tensor([[0.0, 0, 1], [0, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    credit, returns = advantages.reinforce_pp(rewards, mask, gamma=0.9)
    torch.testing.assert_close(returns, torch.tensor([[0.81, 0.9, 1], [0, 0, 0]]))
    expected = torch.tensor([[0.536730, 0.716976, 0.917248], [-1.085477, -1.085477, 0]])
    torch.testing.assert_close(credit, expected, atol=1e-6, rtol=0)


def test_tool_token_is_skipped_by_returns():
    # 1, .5 * 1 one trainable token earlier, .5 * .5 another one; the 5 is at a token that was not sampled
    rewards, mask = torch.tensor([[0.0, 5, 0, 1]]), torch.tensor([[True, False, True, True]])
    assert advantages.reinforce_pp(rewards, mask, gamma=0.5)[1].tolist() == [[0.25, 0, 0.5, 1]]


def test_reinforce_pp_baseline_of_known_groups():
    # centred .5, .5 | -.5 | 0 (a group of one); mean .125; squared deviations 2 * .375^2 + .625^2 + .125^2 = .6875,
    # variance .229167, std .478714
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    actual = advantages.reinforce_pp_baseline(torch.tensor([1.0, 0, 2]), torch.tensor([0, 0, 1]), mask)
    expected = torch.tensor([[0.783349, 0.783349], [-1.305582, 0], [-0.261116, 0]])
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_gae_of_a_known_row():
    # trainable rewards 0, 0, 1 and values .1, .2, .3: delta = .9 * .2 - .1, .9 * .3 - .2, 1 - .3 = .08, .07, .7;
    # with .9 * .8 = .72: A = .7, .07 + .72 * .7 = .574, .08 + .72 * .574 = .49328; returns are A + V
    rewards, values = torch.tensor([[0.0, 0, 0, 1]]), torch.tensor([[0.1, 0.9, 0.2, 0.3]])
    mask = torch.tensor([[True, False, True, True]])
    raw, returns = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.8, whiten=False)
    torch.testing.assert_close(raw, torch.tensor([[0.49328, 0, 0.574, 0.7]]))
    torch.testing.assert_close(returns, torch.tensor([[0.59328, 0, 0.774, 1.0]]))
    # mean .589093, deviations -.095813, -.015093, .110907, variance .0217084 / 2, std .104183
    whitened, same_returns = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    expected = torch.tensor([[-0.919661, 0, -0.144873, 1.064534]])
    torch.testing.assert_close(whitened, expected, atol=1e-6, rtol=0)
    assert torch.equal(same_returns, returns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reinforce_pp_equals_a_slow_loop(dtype):
    rng = generator(8)
    for batch in batches(dtype, seed=8):
        gamma = min(1.0, 1.2 * torch.rand((), generator=rng).item())
        expected = slow_rows(batch, lambda _, rewards, __, gamma=gamma: slow_returns(rewards, gamma))
        credit, returns = advantages.reinforce_pp(batch.token_rewards, batch.mask, gamma=gamma)
        assert_near(returns, expected, dtype=dtype)
        assert_near(credit, slow_whiten(expected, batch.mask), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reinforce_pp_baseline_equals_a_slow_loop(dtype):
    for batch in batches(dtype, seed=9):
        centered = slow(batch.rewards, batch.group, "grpo without std")
        expected = slow_whiten(centered.unsqueeze(1).expand(batch.mask.shape), batch.mask)
        actual = advantages.reinforce_pp_baseline(batch.rewards, batch.group, batch.mask)
        assert_near(actual, expected, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gae_equals_a_slow_loop(dtype):
    rng = generator(10)
    for batch in batches(dtype, seed=10):
        gamma = min(1.0, 1.2 * torch.rand((), generator=rng).item())
        lams = (1.4 * torch.rand(len(batch.mask), generator=rng, dtype=torch.float64) - 0.2).clamp(0, 1)

        def slow_row(row, rewards, values, gamma=gamma, lams=lams):
            following = [*values[1:], 0.0]
            delta = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=False)]
            return slow_returns(delta, gamma * lams[row].item())

        expected = slow_rows(batch, slow_row)
        arguments = batch.token_rewards, batch.values, batch.mask
        raw, returns = advantages.gae(*arguments, gamma=gamma, lam=lams, whiten=False)
        assert_near(raw, expected, dtype=dtype)
        assert_near(returns, (expected + batch.values).masked_fill(~batch.mask, 0.0), dtype=dtype)
        whitened, _ = advantages.gae(*arguments, gamma=gamma, lam=lams)
        assert_near(whitened, slow_whiten(expected, batch.mask), dtype=dtype)


def test_lambda_per_sample_equals_separate_calls():
    batch = list(batches(torch.float64, seed=11))[-1]
    arguments = batch.token_rewards, batch.values, batch.mask
    lams = torch.linspace(0, 1, len(batch.mask))
    together, _ = advantages.gae(*arguments, lam=lams, whiten=False)
    for row, lam in enumerate(lams.tolist()):
        assert_near(advantages.gae(*arguments, lam=lam, whiten=False)[0][row], together[row], dtype=torch.float64)


def test_gae_reduces_to_returns_and_to_one_step_errors():
    for batch in list(batches(torch.float64, seed=12))[::10]:
        _, expected = advantages.reinforce_pp(batch.token_rewards, batch.mask, gamma=0.7)
        arguments = batch.token_rewards, batch.values, batch.mask
        # lam 1: A + V telescopes to the discounted rewards, for all values
        assert_near(advantages.gae(*arguments, gamma=0.7)[1], expected, dtype=torch.float64)
        # lam 0 and gamma 0: what the reward of the token itself exceeds the value by
        one_step, _ = advantages.gae(*arguments, gamma=0.0, lam=0.0, whiten=False)
        surprise = (batch.token_rewards - batch.values).masked_fill(~batch.mask, 0.0)
        assert_near(one_step, surprise, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_returns_of_long_responses_equal_the_recursion(gamma):
    rng = generator(13)
    rewards = torch.randn(2, 1000, generator=rng, dtype=torch.float64)
    mask = masks(rewards.shape, rng) | torch.tensor([[True], [False]])
    running, expected = [0.0, 0.0], torch.zeros_like(rewards)
    for t in reversed(range(1000)):
        for row in range(2):
            if mask[row, t]:
                running[row] = rewards[row, t].item() + gamma * running[row]
                expected[row, t] = running[row]
    assert_near(advantages.reinforce_pp(rewards, mask, gamma=gamma)[1], expected, dtype=torch.float64)


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_order_of_rows_and_padding_have_no_influence(name):
    estimate = TOKEN_ESTIMATORS[name]
    for batch in list(batches(torch.float64, seed=14))[::10]:
        expected = estimate(batch)
        order = torch.randperm(len(batch.mask), generator=generator(0))
        shuffled = estimate(Tokens(*(x[order] for x in batch)))
        renamed = estimate(batch._replace(group=5 - 3 * batch.group))
        wide = torch.ones(len(batch.mask), 3, dtype=torch.float64)
        padded = estimate(
            batch._replace(
                token_rewards=torch.cat([batch.token_rewards, wide], 1),
                values=torch.cat([batch.values, wide], 1),
                mask=torch.cat([batch.mask, wide < 0], 1),
            )
        )
        for part, result in enumerate(expected):
            assert_near(shuffled[part], result[order], dtype=torch.float64)
            assert_near(renamed[part], result, dtype=torch.float64)
            assert_near(padded[part], torch.cat([result, 0 * wide], 1), dtype=torch.float64)


@pytest.mark.parametrize("garbage", [1e30, nan, -torch.inf])
@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_garbage_at_masked_tokens_has_no_influence(name, garbage):
    for batch in list(batches(torch.float32, seed=15))[::10]:
        spoilt = batch._replace(
            token_rewards=batch.token_rewards.masked_fill(~batch.mask, garbage),
            values=batch.values.masked_fill(~batch.mask, garbage),
        )
        for clean, dirty in zip(TOKEN_ESTIMATORS[name](batch), TOKEN_ESTIMATORS[name](spoilt), strict=True):
            assert torch.equal(clean, dirty)
            assert (clean[~batch.mask] == 0).all()


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_whitened_advantages_have_mean_0_and_variance_1_over_the_batch(name):
    batch = list(batches(torch.float64, seed=16))[-1]
    result = TOKEN_ESTIMATORS[name](batch)[0][batch.mask]
    if name != "gae, raw":
        assert abs(result.mean()) < 1e-9
        assert abs(result.var() - 1) < 1e-6


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_token_estimators_raise_half_precision_and_keep_inputs(name):
    batch = list(batches(torch.bfloat16, seed=17))[-1]
    before = [x.clone() for x in batch]
    exact = Tokens(*(x.double() if x.is_floating_point() else x for x in batch))
    for actual, expected in zip(TOKEN_ESTIMATORS[name](batch), TOKEN_ESTIMATORS[name](exact), strict=True):
        assert_near(actual, expected, dtype=torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3), (1, 1)])
@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_batches_with_at_most_one_trainable_token_are_finite(name, shape):
    ones = torch.ones(shape)
    for mask in (ones < 0, ones > 0 if shape == (1, 1) else ones < 0):
        batch = Tokens(ones, 3 * ones, mask, torch.arange(shape[0]) * 1.0, torch.zeros(shape[0], dtype=torch.int64))
        for part, result in enumerate(TOKEN_ESTIMATORS[name](batch)):
            assert result.shape == shape
            assert result.isfinite().all()
            assert part == 1 or name == "gae, raw" or (result == 0).all()


def test_equal_rewards_give_no_credit_to_any_token():
    rewards, mask = torch.full((4,), 0.98), torch.ones(4, 3, dtype=torch.bool)
    assert (advantages.reinforce_pp_baseline(rewards, torch.zeros(4, dtype=torch.int64), mask) == 0).all()
    assert (advantages.reinforce_pp_baseline(rewards, torch.arange(4), mask) == 0).all()


def test_targets_of_the_critic_have_no_gradient():
    rewards, values = torch.zeros(1, 2), torch.ones(1, 2, requires_grad=True)
    credit, returns = advantages.gae(rewards, values, torch.ones(1, 2, dtype=torch.bool))
    assert not credit.requires_grad and not returns.requires_grad


def test_wrong_mask_shape_or_discount_is_refused_by_name():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for call in (advantages.reinforce_pp, lambda r, m, **k: advantages.gae(r, x, m, **k)):
        with pytest.raises(
            ValueError, match=r"^token_rewards_NT has shape \(2, 4\), mask_NT \(2, 3\); both must be \(N, T\)$"
        ):
            call(torch.zeros(2, 4), mask)
        with pytest.raises(
            ValueError, match=r"^token_rewards_NT has shape \(3,\), mask_NT \(3,\); both must be \(N, T\)$"
        ):
            call(x[0], mask[0])
        with pytest.raises(ValueError, match=r"^mask has dtype torch.int64; it must be torch.bool"):
            call(x, mask.long())
        for gamma in (1.5, -0.1, nan):
            with pytest.raises(ValueError, match=rf"^gamma holds {gamma}; it must lie between 0 and 1$"):
                call(x, mask, gamma=gamma)
    with pytest.raises(ValueError, match=r"^values_NT has shape \(2,\), mask_NT \(2, 3\); both must be \(N, T\)$"):
        advantages.gae(x, x[:, 0], mask)
    with pytest.raises(ValueError, match=r"^lam has shape \(3,\); it must be a number or \(2,\), one a sample$"):
        advantages.gae(x, x, mask, lam=torch.ones(3))
    with pytest.raises(ValueError, match=r"^lam holds 2.0; it must lie between 0 and 1$"):
        advantages.gae(x, x, mask, lam=torch.tensor([0.5, 2.0]))
    rewards, group = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    for wrong in (mask[:1], mask[:, 0]):
        with pytest.raises(
            ValueError, match=r"^rewards_N has shape \(2,\), mask_NT .*; they must be \(N,\) and \(N, T\)$"
        ):
            advantages.reinforce_pp_baseline(rewards, group, wrong)
    with pytest.raises(ValueError, match=r"^mask has dtype torch.int64; it must be torch.bool"):
        advantages.reinforce_pp_baseline(rewards, group, mask.long())
    with pytest.raises(ValueError, match=r"^group_N has shape \(3,\), the values have \(2,\)"):
        advantages.reinforce_pp_baseline(rewards, torch.zeros(3, dtype=torch.int64), mask)
