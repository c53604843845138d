"""Every advantage can be combined with every loss, and an option that does not exist is refused by name."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from rllava_pl.functional import advantages, losses
from rllava_pl.functional.reduce import reduce_loss
from rllava_pl.modules import Recipe
from rllava_pl.modules.recipe import AdvantageName, LossName
from rllava_pl.rewards import AnswerTagReward
from tests.modules.cases import two_groups

NEEDED = {"cispo": {"clip_low": 1.0, "clip_high": 4.0}}


def recipe(**options: object) -> Recipe:
    return Recipe(None, [AnswerTagReward()], **options)


@pytest.mark.parametrize("loss", get_args(LossName))
@pytest.mark.parametrize("advantage", get_args(AdvantageName))
def test_every_pair_has_the_gradient_of_reinforce_at_ratio_one(advantage: str, loss: str) -> None:
    """At π = π_old every loss has REINFORCE's gradient: -A on each token, for row-constant A."""
    module = recipe(advantage=advantage, loss=loss, loss_options=NEEDED.get(loss))
    batch = two_groups()
    credit = module.advantages(batch)
    credit_NT = (credit[:, None].expand(6, 4) if credit.ndim == 1 else credit) * batch.trained_mask_NT
    assert credit_NT.any()
    logp_NT = batch.old_logp_NT.clone().requires_grad_()
    loss_NT = module.policy_loss(logp_NT, batch.replace(advantages_NT=credit_NT))
    reduce_loss(loss_NT, batch.trained_mask_NT, module.aggregation, denominator=1.0).backward()
    if credit.ndim == 1 or loss != "gmpo":  # whose advantage is the mean over a row
        torch.testing.assert_close(logp_NT.grad, -credit_NT, rtol=1e-5, atol=1e-6)


def test_options_reach_their_functions() -> None:
    batch = two_groups()
    module = recipe(advantage_options={"scale_by_std": False}, loss_options={"clip_high": 0.1, "dual_clip": 2.0})
    expected_N = advantages.grpo(batch.rewards_N, batch.group_N, scale_by_std=False)
    assert torch.equal(module.advantages(batch), expected_N)
    logp_NT = batch.old_logp_NT + 0.9
    expected_NT = losses.clipped(logp_NT, batch.old_logp_NT, batch.advantages_NT, clip_high=0.1, dual_clip=2.0)
    assert torch.equal(module.policy_loss(logp_NT, batch), expected_NT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "vtrace"}, "advantage is 'vtrace'; it must be one of 'grpo', 'rloo', 'opo'"),
        ({"loss": "clip_cov"}, "loss is 'clip_cov'; it must be one of 'clipped', 'gspo'"),
        ({"advantage_options": {"std": True}}, "advantage_options: grpo has no option 'std'; it has scale_by_std, eps"),
        ({"advantage": "rloo", "advantage_options": {"eps": 1}}, "rloo has no option 'eps'; it has none"),
        ({"loss_options": {"clip": 0.2}}, "loss_options: clipped has no option 'clip'; it has clip_low, clip_high"),
        ({"loss": "cispo"}, "loss_options: cispo needs clip_low, clip_high"),
        ({"loss": "cispo", "loss_options": {"clip_low": 1.0}}, "loss_options: cispo needs clip_high"),
    ],
)
def test_unknown_function_or_option_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_group_of_one_is_refused_where_the_advantage_compares_completions() -> None:
    with pytest.raises(ValueError, match="Recipe compares the completions of a prompt: group_size must be >= 2, is 1"):
        recipe(advantage="rloo", group_size=1)
    recipe(advantage="reinforce_pp", group_size=1)
