"""ReMax: the greedy answer is the baseline, and is not trained."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.loop.options import KL, LengthPenalty
from rllava_pl.modules import ReMax, RLModule
from rllava_pl.types import PromptBatch
from tests.modules.passes import fitted, prompts, scored_pass


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> RLModule:
    return fitted(
        tmp_path_factory.mktemp("run"), ReMax, kl=KL(reward_coef=0.1), length_penalty=LengthPenalty(buffer_tokens=8)
    )


def test_baseline_is_the_greedy_answer_with_its_penalties(module: RLModule) -> None:
    """The buffer of the length penalty is the whole budget of 8 tokens, so that every answer is punished."""
    rows = prompts(ReMax)
    batch = scored_pass(module, rows)
    assert batch.group_size == 5 and len(batch) == 30
    greedy, _ = module.evaluator.evaluate(rows)
    assert [r.response_ids.tolist() for r in batch.rollouts[4::5]] == [r.response_ids.tolist() for r in greedy]
    trained = module.compute_advantages(batch)
    assert trained.group_size == 4 and len(trained) == 24

    divergence_N = ((batch.old_logp_NT - batch.ref_logp_NT) * batch.sampled_mask_NT).sum(1)
    penalty_N = 0.1 * divergence_N + batch.lengths_N.float() / 8
    total_PG = (batch.scores_N - penalty_N).unflatten(0, (6, 5))
    assert penalty_N[4::5].abs().min() > 0
    expected_N = (total_PG[:, :4] - total_PG[:, 4:]).flatten()
    torch.testing.assert_close(trained.advantages_NT[:, 0], expected_N)


def test_greedy_answers_are_in_no_metric_of_samples(module: RLModule) -> None:
    module.metrics.clear()
    batch = module.score(module.sample(PromptBatch(prompts(ReMax))))
    module.compute_advantages(module.compute_logprobs(batch))
    own_N = torch.arange(30) % 5 < 4
    means = module.metrics.means()
    assert means["reward"] == pytest.approx(float(batch.scores_N[own_N].mean()))
    assert means["response_tokens"] == pytest.approx(float(batch.lengths_N[own_N].float().mean()))
    assert means["overlong_penalty"] == pytest.approx(-float(batch.lengths_N[own_N].float().mean()) / 8)


def test_greedy_answer_is_in_the_baseline_of_its_group_and_not_trained(module: RLModule) -> None:
    batch = module.score(module.sample(PromptBatch(prompts(ReMax, 2))))
    groups_PG = batch.by_prompt(batch.group_N)
    assert (groups_PG == groups_PG[:, :1]).all() and len(groups_PG.unique()) == 2 and batch.in_baseline_N.all()
    assert batch.by_prompt(batch.trained_mask_NT.any(1)).tolist() == [[True] * 4 + [False]] * 2
    assert batch.sampled_mask_NT.any(1).all()
