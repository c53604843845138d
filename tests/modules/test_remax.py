"""ReMax: the greedy answer is the baseline, and nothing but the baseline."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.modules import ReMax, RLModule
from rllava_pl.types import PromptBatch
from tests.modules.passes import fitted, prompts


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> RLModule:
    return fitted(tmp_path_factory.mktemp("run"), ReMax, kl_reward_coef=0.1, overlong_buffer=0.5)


def test_the_baseline_is_the_greedy_answer_with_its_own_penalties(module: RLModule) -> None:
    batch = prompts(ReMax)
    judged = module.judge(module.rollout(PromptBatch(batch)))
    assert judged.group_size == 5 and len(judged) == 30
    greedy, _ = module.examine(batch)
    assert [r.response_ids.tolist() for r in judged.rollouts[4::5]] == [r.response_ids.tolist() for r in greedy]
    evaluated = module.evaluate(judged)
    credited = module.credit(evaluated)
    assert credited.group_size == 4 and len(credited) == 24

    divergence_N = ((evaluated.old_logp_NT - evaluated.ref_logp_NT) * evaluated.mask_NT).sum(1)
    length_N = evaluated.lengths_N.float()
    penalty_N = 0.1 * divergence_N + ((length_N - 4) / 4).clamp(0, 1)  # the buffer is the second half of 8 tokens
    total_PG = (evaluated.rewards_N - penalty_N).unflatten(0, (6, 5))
    assert penalty_N[4::5].abs().max() > 0
    expected_N = (total_PG[:, :4] - total_PG[:, 4:]).flatten()
    torch.testing.assert_close(credited.advantages_NT[:, 0], expected_N)


def test_greedy_answers_are_in_no_metric(module: RLModule) -> None:
    module.tally.clear()
    judged = module.collect(module.judge(module.rollout(PromptBatch(prompts(ReMax)))), 6)
    module.credit(module.evaluate(judged))
    own_N = torch.arange(30) % 5 < 4
    means = module.tally.means()
    assert means["reward"] == pytest.approx(float(judged.rewards_N[own_N].mean()))
    assert means["response_tokens"] == pytest.approx(float(judged.lengths_N[own_N].float().mean()))
    penalty_N = ((judged.lengths_N.float() - 4) / 4).clamp(0, 1)
    assert means["overlong_penalty"] == pytest.approx(-float(penalty_N[own_N].mean()))


def test_their_groups_are_their_own(module: RLModule) -> None:
    judged = module.judge(module.rollout(PromptBatch(prompts(ReMax, 2))))
    samples, greedy = judged.group_N.unflatten(0, (2, 5))[:, :4], judged.group_N[4::5]
    assert (greedy < 0).all() and (samples >= 0).all() and len(samples.unique()) == 2
