"""Penalties reach the advantages, each in its way, and nothing that is logged as reward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rllava_pl.functional.advantages import grpo
from rllava_pl.functional.kl import AdaptiveKLController
from rllava_pl.functional.reduce import masked_whiten
from rllava_pl.functional.rewards import overlong_penalty
from rllava_pl.loop.batch import truncated_rows
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.options import KL, DynamicSampling, LengthPenalty, Masking
from rllava_pl.loop.penalties import adapt_kl, length_penalties, mask_rows, penalize
from rllava_pl.loop.state import RunState
from rllava_pl.modules import DAPO, GRPO, RLOO, ReinforcePP, RLModule
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import PromptBatch, ScoredBatch, TrainingBatch
from tests.modules.cases import scored
from tests.modules.passes import fitted, one_pass, prompts, recording_updater, scored_pass


@pytest.fixture
def batch() -> ScoredBatch:
    """Three samples of 1, 2 and 3 tokens; old - ref is 0.1 on the first token, 0.2 on the second, 0.3 on the third."""
    made = scored([[1.0, 0.0, 0.5]], tokens=[1, 2, 3], finish=["stop", "stop", "length"])
    gap_NT = torch.tensor([0.1, 0.2, 0.3]).expand(3, 3)
    return made.with_computed(old_logp_NT=-1 + gap_NT, ref_logp_NT=torch.full((3, 3), -1.0))


def given(batch: ScoredBatch, given_NT: torch.Tensor) -> ScoredBatch:
    return batch.replace(sampled_mask_NT=batch.sampled_mask_NT & ~given_NT)


def test_kl_is_subtracted_from_the_reward_and_from_its_tokens(batch: ScoredBatch) -> None:
    """β = 2: sums 0.1, 0.1 + 0.2, 0.1 + 0.2 + 0.3, so rewards lose 0.2, 0.6 and 1.2."""
    rewarded = penalize(batch, None, kl_coef=2.0)
    torch.testing.assert_close(rewarded.rewards_N, torch.tensor([0.8, -0.6, -0.7]))
    expected_NT = torch.tensor([[1 - 0.2, 0.0, 0.0], [-0.2, -0.4, 0.0], [-0.2, -0.4, 0.5 - 0.6]])
    torch.testing.assert_close(rewarded.token_rewards_NT, expected_NT)
    torch.testing.assert_close(rewarded.token_rewards_NT.sum(1), rewarded.rewards_N)
    assert torch.equal(rewarded.scores_N, batch.scores_N)


def test_given_tokens_pay_no_kl(batch: ScoredBatch) -> None:
    given_NT = torch.tensor([[False] * 3, [False] * 3, [True, True, False]])
    rewarded = penalize(given(batch, given_NT), None, kl_coef=2.0)
    torch.testing.assert_close(rewarded.rewards_N, torch.tensor([0.8, -0.6, 0.5 - 0.6]))


def test_without_a_coefficient_the_reward_stands_on_the_last_token(batch: ScoredBatch) -> None:
    rewarded = penalize(batch, None, kl_coef=0.0)
    assert rewarded.rewards_N is batch.scores_N
    assert rewarded.token_rewards_NT.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0.5]]


def instance(algorithm: type[RLModule], **options: object) -> RLModule:
    return algorithm(None, [AnswerTagReward()], **({"group_size": 3} | options))


def test_sequence_estimators_use_rewards_with_kl(batch: ScoredBatch) -> None:
    """Rewards 0.8, -0.6, -0.7: each minus the mean of the two others."""
    module = instance(RLOO, kl=KL(reward_coef=2.0))
    expected_N = torch.tensor([0.8 + 0.65, -0.6 - 0.05, -0.7 - 0.1])
    torch.testing.assert_close(module.compute_advantages(batch).advantages_NT[:, 0], expected_N)


def test_token_estimators_use_the_kl_of_the_tokens_that_follow(batch: ScoredBatch) -> None:
    """Rewards to go: 0.8 | -0.6, -0.4 | -0.7, -0.5, -0.1; then whitened."""
    module = instance(ReinforcePP, kl=KL(reward_coef=2.0))
    returns_NT = torch.tensor([[0.8, 0.0, 0.0], [-0.6, -0.4, 0.0], [-0.7, -0.5, -0.1]])
    expected_NT = masked_whiten(returns_NT, batch.sampled_mask_NT)
    torch.testing.assert_close(module.compute_advantages(batch).advantages_NT, expected_NT)


def test_truncated_responses_stay_in_the_baseline_and_are_not_trained(batch: ScoredBatch) -> None:
    assert truncated_rows(batch).tolist() == [False, False, True]
    masked = mask_rows(batch, Masking(truncated=True))
    assert masked.trained_mask_NT.sum(1).tolist() == [1, 2, 0]
    assert masked.lengths_N.tolist() == [1, 2, 3]  # penalties and baselines read the sampled tokens
    assert mask_rows(batch, Masking()) is batch
    module = instance(GRPO, masking=Masking(truncated=True), kl=KL(loss_coef=0.0, reward_coef=2.0))
    trained = module.compute_advantages(batch)
    rewards_N = torch.tensor([0.8, -0.6, -0.7])  # the truncated row pays its KL
    all_three = grpo(rewards_N, batch.group_N)  # the baseline has it as well
    assert trained.group_size == 2  # a member that no group trains is not sent through the model
    torch.testing.assert_close(trained.rewards_N, rewards_N[:2])
    torch.testing.assert_close(trained.advantages_NT[:, 0], all_three[:2])
    counts = module.updater.denominators(module.terms(trained))
    assert counts["policy"] == 2  # sequence means of two rows


def test_length_is_punished_on_sampled_tokens_alone(batch: ScoredBatch) -> None:
    """Budget 4, buffer 2: 3 tokens are half way through it; with one of them given, 2 are not in it."""
    options = LengthPenalty(buffer_tokens=2)
    assert length_penalties(batch, options, max_tokens=4).tolist() == [0, 0, -0.5]
    given_NT = torch.tensor([[False] * 3, [False] * 3, [True, False, False]])
    assert length_penalties(given(batch, given_NT), options, max_tokens=4).tolist() == [0, 0, 0]
    assert length_penalties(batch, LengthPenalty(), max_tokens=4) is None


def test_length_penalty_moves_advantages_and_not_the_logged_reward(tmp_path: Path) -> None:
    """The buffer is the whole budget, so that every response is punished."""
    options = {"length_penalty": LengthPenalty(buffer_tokens=8), "dynamic_sampling": DynamicSampling(max_rounds=0)}
    module = fitted(tmp_path, DAPO, **options)
    module.metrics.clear()
    batch = module.compute_logprobs(module.score(module.sample(PromptBatch(prompts(DAPO)))))
    trained = module.compute_advantages(batch)
    penalty_N = overlong_penalty(batch.lengths_N, max_tokens=8, buffer_tokens=8)
    assert penalty_N.max() < 0
    expected_N = grpo(batch.scores_N + penalty_N, batch.group_N)
    torch.testing.assert_close(trained.advantages_NT[:, 0], expected_N)
    means = module.metrics.means()
    assert means["reward"] == pytest.approx(float(batch.scores_N.mean()))
    assert means["overlong_penalty"] == pytest.approx(float(penalty_N.mean()))
    assert means["truncated_fraction"] == pytest.approx(float(truncated_rows(batch).float().mean()))


def test_adaptive_coefficient_follows_the_divergence_of_the_batch(batch: ScoredBatch) -> None:
    """Token mean of the six sampled gaps: (3·0.1 + 2·0.2 + 0.3) / 6."""
    state, metrics = RunState(kl_factor=1.5), MetricAccumulator()
    adapt_kl(state, batch, KL(reward_coef=0.5, target=0.05, horizon=100), metrics)
    expected = AdaptiveKLController(1.5, 0.05, 100)
    expected.update(1.0 / 6, 3)
    assert state.kl_factor == pytest.approx(expected.coef, rel=1e-6) and expected.coef != 1.5
    assert metrics.means()["kl_factor"] == pytest.approx(state.kl_factor)


def test_adaptive_coefficient_moves_after_the_rollout_that_it_was_used_for(tmp_path: Path) -> None:
    module = fitted(tmp_path, RLOO, kl=KL(reward_coef=0.5, target=0.05, horizon=100))
    module.state.kl_factor = 1.5
    batch = scored_pass(module, prompts(RLOO))
    gap_NT = batch.old_logp_NT - batch.ref_logp_NT
    expected = AdaptiveKLController(1.5, 0.05, 100)
    expected.update(float(gap_NT[batch.sampled_mask_NT].mean()), 24)
    trained = module.compute_advantages(batch)
    assert module.state.kl_factor == pytest.approx(expected.coef, rel=1e-6) and expected.coef != 1.5
    before = instance(RLOO, group_size=4, kl=KL(reward_coef=0.5 * 1.5))
    torch.testing.assert_close(trained.advantages_NT, before.compute_advantages(batch).advantages_NT)


def test_adaptive_coefficient_survives_a_divergence_that_is_not_finite(batch: ScoredBatch) -> None:
    state = RunState(kl_factor=1.5)
    diverged = batch.with_computed(old_logp_NT=batch.old_logp_NT / 0.0)
    adapt_kl(state, diverged, KL(reward_coef=0.5, target=0.05), MetricAccumulator())
    assert state.kl_factor == 1.5


def test_fixed_coefficient_stays(tmp_path: Path) -> None:
    module = fitted(tmp_path, RLOO)
    one_pass(module, prompts(RLOO))
    assert module.state.kl_factor == 1.0 and math.isclose(module.kl.reward_coef, 0.001)


@pytest.mark.parametrize("stage", [ScoredBatch, TrainingBatch])
def test_denominators_ignore_masked_out_rows(batch: ScoredBatch, stage: type[ScoredBatch], tmp_path: Path) -> None:
    """The aggregation "constant" divides by budget x rows that train."""
    module = fitted(tmp_path, GRPO, aggregation="constant", kl=KL(loss_coef=0.0))
    trained = module.compute_advantages(scored_pass(module, prompts(GRPO, 2)))
    rows = trained.trained_mask_NT.clone()
    rows[3] = False
    updater, _ = recording_updater(module)
    assert updater.denominators(module.terms(trained.replace(trained_mask_NT=rows)))["policy"] == 7 * 8
