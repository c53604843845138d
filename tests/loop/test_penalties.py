"""Penalties reach the advantages, each by its own way, and nothing that is logged as reward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rllava_pl.functional.advantages import grpo
from rllava_pl.functional.kl import AdaptiveKLController
from rllava_pl.functional.reduce import masked_whiten
from rllava_pl.functional.rewards import overlong_penalty
from rllava_pl.loop.shaping import overlong, penalised, truncated, without_truncated
from rllava_pl.modules import DAPO, GRPO, RLOO, ReinforcePP, RLModule
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Experience, PromptBatch
from tests.modules.cases import experience
from tests.modules.passes import fitted, one_pass, prompts


@pytest.fixture
def batch() -> Experience:
    """Three samples of 1, 2 and 3 tokens; old - ref is 0.1 on the first token, 0.2 on the second, 0.3 on the third."""
    made = experience([[1.0, 0.0, 0.5]], tokens=[1, 2, 3], finish=["stop", "stop", "length"])
    gap_NT = torch.tensor([0.1, 0.2, 0.3]).expand(3, 3)
    return made.replace(old_logp_NT=-1 + gap_NT, ref_logp_NT=torch.full((3, 3), -1.0))


def test_kl_is_subtracted_from_the_reward_and_from_its_tokens(batch: Experience) -> None:
    """β = 2: sums 0.1, 0.1 + 0.2, 0.1 + 0.2 + 0.3, so rewards lose 0.2, 0.6 and 1.2."""
    shaped = penalised(batch, kl_coef=2.0)
    torch.testing.assert_close(shaped.rewards_N, torch.tensor([0.8, -0.6, -0.7]))
    expected_NT = torch.tensor([[1 - 0.2, 0.0, 0.0], [-0.2, -0.4, 0.0], [-0.2, -0.4, 0.5 - 0.6]])
    torch.testing.assert_close(shaped.token_rewards_NT, expected_NT)
    torch.testing.assert_close(shaped.token_rewards_NT.sum(1), shaped.rewards_N)


def test_tokens_of_a_demonstration_pay_no_kl(batch: Experience) -> None:
    demo_mask_NT = torch.tensor([[False] * 3, [False] * 3, [True, True, False]])
    shaped = penalised(batch.replace(demo_mask_NT=demo_mask_NT), kl_coef=2.0)
    torch.testing.assert_close(shaped.rewards_N, torch.tensor([0.8, -0.6, 0.5 - 0.6]))


def test_without_a_coefficient_the_reward_stands_on_the_last_token(batch: Experience) -> None:
    shaped = penalised(batch, kl_coef=0.0)
    assert shaped.rewards_N is batch.rewards_N
    assert shaped.token_rewards_NT.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0.5]]


def bare(algorithm: type[RLModule], **options: object) -> RLModule:
    return algorithm(None, [AnswerTagReward()], **({"group_size": 3} | options))


def test_sequence_estimators_see_the_kl(batch: Experience) -> None:
    """Rewards 0.8, -0.6, -0.7: each minus the mean of the two others."""
    module = bare(RLOO, kl_reward_coef=2.0)
    expected_N = torch.tensor([0.8 + 0.65, -0.6 - 0.05, -0.7 - 0.1])
    torch.testing.assert_close(module.credit(batch).advantages_NT[:, 0], expected_N)


def test_token_estimators_see_the_kl_of_what_is_still_to_come(batch: Experience) -> None:
    """Rewards to go: 0.8 | -0.6, -0.4 | -0.7, -0.5, -0.1; then whitened."""
    module = bare(ReinforcePP, kl_reward_coef=2.0)
    returns_NT = torch.tensor([[0.8, 0.0, 0.0], [-0.6, -0.4, 0.0], [-0.7, -0.5, -0.1]])
    torch.testing.assert_close(module.credit(batch).advantages_NT, masked_whiten(returns_NT, batch.mask_NT))


def test_truncated_responses_stay_in_the_baseline_and_are_not_trained(batch: Experience) -> None:
    assert truncated(batch).tolist() == [False, False, True]
    masked = without_truncated(batch)
    assert masked.lengths_N.tolist() == [1, 2, 0]
    module = bare(GRPO, mask_truncated=True)
    credited = module.credit(batch)
    all_three = grpo(batch.rewards_N, batch.group_N)
    torch.testing.assert_close(credited.advantages_NT[:, 0], torch.tensor([*all_three[:2], 0.0]))
    assert module.denominators(credited).tokens == 3 and module.denominators(credited).loss == 2


def test_length_is_punished_for_what_the_policy_wrote_itself(batch: Experience) -> None:
    """Budget 4, buffer 2: 3 tokens are half way through it, and one of them was given."""
    punish = {"max_tokens": 4, "buffer_tokens": 2, "scale": 1.0}
    assert overlong(batch, **punish).tolist() == [0, 0, -0.5]
    given_NT = torch.tensor([[False] * 3, [False] * 3, [True, False, False]])
    assert overlong(batch.replace(demo_mask_NT=given_NT), **punish).tolist() == [0, 0, 0]


def test_the_overlong_penalty_moves_advantages_and_not_the_logged_reward(tmp_path: Path) -> None:
    module = fitted(tmp_path, DAPO, overlong_buffer=0.5, max_refills=0)
    module.tally.clear()
    judged = module.collect(module.judge(module.rollout(PromptBatch(prompts(DAPO)))), 6)
    credited = module.credit(judged)
    penalty_N = overlong_penalty(judged.lengths_N, max_tokens=8, buffer_tokens=4)
    assert penalty_N.min() < 0
    expected_N = grpo(judged.rewards_N + penalty_N, judged.group_N)
    torch.testing.assert_close(credited.advantages_NT[:, 0], expected_N)
    means = module.tally.means()
    assert means["reward"] == pytest.approx(float(judged.rewards_N.mean()))
    assert means["overlong_penalty"] == pytest.approx(float(penalty_N.mean()))
    assert means["truncated_fraction"] == pytest.approx(float(truncated(judged).float().mean()))


@pytest.mark.parametrize("buffer", [1.0, -0.1])
def test_a_buffer_is_a_part_of_the_budget(buffer: float) -> None:
    with pytest.raises(ValueError, match=f"overlong_buffer is {buffer}; it must be at least 0 and below 1"):
        bare(GRPO, overlong_buffer=buffer)


def test_the_adaptive_coefficient_follows_the_divergence_of_the_batch(tmp_path: Path) -> None:
    module = fitted(tmp_path, RLOO, kl_reward_coef=0.5, kl_target=0.05, kl_horizon=100)
    module.kl_controller.coef = 1.5
    batch = module.evaluate(module.judge(module.rollout(PromptBatch(prompts(RLOO)))))
    gap_NT = batch.old_logp_NT - batch.ref_logp_NT
    observed = float(gap_NT[batch.mask_NT].mean())
    expected = AdaptiveKLController(1.5, 0.05, 100)
    expected.update(observed, 24)
    credited = module.credit(batch)
    assert module.kl_controller.coef == pytest.approx(expected.coef, rel=1e-6) and expected.coef != 1.5
    before = bare(RLOO, group_size=4, kl_reward_coef=0.5 * 1.5)  # of this rollout: the coefficient before it moved
    torch.testing.assert_close(credited.advantages_NT, before.credit(batch).advantages_NT)


def test_a_fixed_coefficient_stays(tmp_path: Path) -> None:
    module = fitted(tmp_path, RLOO)
    one_pass(module, prompts(RLOO))
    assert module.kl_controller.coef == 1.0 and math.isclose(module.kl_reward_coef, 0.001)


def test_an_adaptive_coefficient_needs_one_to_adapt() -> None:
    with pytest.raises(ValueError, match="kl_target adapts the KL coefficient, but kl_loss_coef and kl_reward_coef"):
        bare(DAPO, kl_target=0.1)
