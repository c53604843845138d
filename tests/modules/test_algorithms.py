"""Each named algorithm is what its paper says: defaults, advantages and loss against one table.

The table repeats the numbers on purpose; it takes nothing from the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rllava_pl.functional import advantages as credit
from rllava_pl.functional import demonstrations as fusion
from rllava_pl.functional import losses
from rllava_pl.loop.options import Batching, Clip, DynamicSampling, LengthPenalty
from rllava_pl.modules import DPO, SFT, PolicyModule, Recipe, RLModule
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Credit, PolicyOutput, Sampling, TrainingBatch
from tests import runs
from tests.modules.cases import scored, trainable, two_groups

TOKENS, ROWS, BUDGET = "token-mean", "sequence-mean-token-mean", "constant"
INF = float("inf")
NAMED = {algorithm.__name__: algorithm for algorithm in runs.ALGORITHMS if algorithm is not Recipe}
"""A Recipe has the defaults of the functions it is made of."""


def column(advantages_N: Tensor) -> Callable[[TrainingBatch], Tensor]:
    return lambda _: advantages_N


def group(*, std: bool) -> Callable[[TrainingBatch], Tensor]:
    return lambda e: credit.grpo(e.rewards_N, e.group_N, scale_by_std=std)


def surrogate(function: Callable[..., Tensor], **options: float) -> Callable[[Tensor, TrainingBatch], Tensor]:
    return lambda logp, e: function(logp, e.old_logp_NT, e.advantages_NT, **options)


def masked(function: Callable[..., Tensor], **options: float) -> Callable[[Tensor, TrainingBatch], Tensor]:
    return lambda logp, e: function(logp, e.old_logp_NT, e.advantages_NT, e.trained_mask_NT, **options)


def chosen(function: Callable[..., Tensor], **options: float) -> Callable[[Tensor, TrainingBatch], Tensor]:
    return lambda logp, e: masked(function, selected_NT=e.selected_NT, **options)(logp, e)


def mixed(function: Callable[..., Tensor], **options: object) -> Callable[[Tensor, TrainingBatch], Tensor]:
    return lambda logp, e: function(logp, e.old_logp_NT, e.advantages_NT, e.trained_mask_NT, e.given_mask_NT, **options)


def reinforce(logp: Tensor, e: TrainingBatch) -> Tensor:
    return -e.advantages_NT * logp


CLIPPED = surrogate(losses.clipped, clip_low=0.2, clip_high=0.2)


@dataclass(frozen=True)
class Row:
    """One algorithm of the literature."""

    advantages: Callable[[TrainingBatch], Tensor] | None
    loss: Callable[[Tensor, TrainingBatch], Tensor] | None
    aggregation: str
    kl_loss: tuple[str, float] = ("k3", 0.0)
    kl_reward: float = 0.0
    entropy: float = 0.0
    group_size: int = 8
    extra_rows: int = 0


TABLE = {
    "GRPO": Row(group(std=True), CLIPPED, ROWS, kl_loss=("k3", 0.04)),
    "DrGRPO": Row(group(std=False), CLIPPED, BUDGET),
    "DAPO": Row(group(std=True), surrogate(losses.clipped, clip_low=0.2, clip_high=0.28), TOKENS),
    "RLOO": Row(lambda e: credit.rloo(e.rewards_N, e.group_N), CLIPPED, TOKENS, kl_reward=0.001),
    "ReinforcePP": Row(
        lambda e: credit.reinforce_pp(e.token_rewards_NT, e.sampled_mask_NT)[0], CLIPPED, TOKENS, kl_reward=0.001
    ),
    "ReinforcePPBaseline": Row(
        lambda e: credit.reinforce_pp_baseline(e.rewards_N, e.group_N, e.sampled_mask_NT),
        CLIPPED,
        TOKENS,
        kl_loss=("k2", 0.001),
    ),
    # Rows 2 and 5 are the greedy answers, with rewards 0.5 and 0: 1 - .5, 0 - .5, 0 and 1 - 0, 1 - 0, 0.
    "ReMax": Row(
        column(torch.tensor([0.5, -0.5, 0.0, 1.0, 1.0, 0.0])), CLIPPED, TOKENS, kl_reward=0.001, extra_rows=1
    ),
    "OPO": Row(lambda e: credit.opo(e.rewards_N, e.group_N, e.lengths_N), reinforce, TOKENS),
    "GPG": Row(lambda e: credit.gpg(e.rewards_N, e.group_N, f_norm=1.0), reinforce, TOKENS),
    "GMPO": Row(group(std=True), masked(losses.gmpo, clip_low=0.4, clip_high=0.4), ROWS),
    "GSPO": Row(group(std=True), masked(losses.gspo, clip_low=3e-4, clip_high=4e-4), ROWS),
    "ClipCov": Row(group(std=True), chosen(losses.clip_cov, clip_low=1.0, clip_high=1.0), TOKENS),
    "KLCov": Row(group(std=True), chosen(losses.kl_cov, beta=1.0), TOKENS),
    "PassAtK": Row(lambda e: credit.pass_at_k(e.rewards_N, e.group_N, scale_by_std=True), CLIPPED, TOKENS),
    "CISPO": Row(group(std=True), surrogate(losses.cispo, clip_low=1.0, clip_high=4.0), TOKENS),
    "SAPO": Row(group(std=True), surrogate(losses.sapo, temperature_positive=1.0, temperature_negative=1.05), ROWS),
    "PPO": Row(None, CLIPPED, TOKENS, kl_reward=0.001, group_size=1),
    "DPO": Row(None, None, TOKENS, group_size=2),
    "SFT": Row(None, None, TOKENS, group_size=1),
    "LUFFY": Row(group(std=False), mixed(fusion.luffy, shaping=0.1, clip=None), BUDGET, entropy=0.001),
    "SRFT": Row(
        group(std=False),
        lambda logp, e: fusion.srft(
            logp, e.advantages_NT, e.trained_mask_NT, e.given_mask_NT, e.scores_N, e.entropy_NT,
            sft_scale=0.5, rl_scale=0.1, success_threshold=1.0, shaping=0.1,
        ),
        BUDGET,
    ),
    "UFT": Row(
        group(std=True),
        mixed(fusion.uft, hint_coef=0.001, clip_low=0.2, clip_high=0.2),
        TOKENS,
        kl_loss=("k3", 0.001),
    ),
    "HPT": Row(
        group(std=False),
        mixed(fusion.hpt, sft_coef=1.0, rl_coef=1.0, clip_low=1.0, clip_high=INF),
        BUDGET,
        entropy=0.001,
        extra_rows=1,
    ),
    "CHORD": Row(
        group(std=True),
        mixed(fusion.chord, mu=0.1, weighting="phi", clip_low=0.2, clip_high=0.2),
        TOKENS,
        extra_rows=1,
    ),
}  # fmt: skip


def instance(algorithm: type[PolicyModule], **options: object) -> PolicyModule:
    return algorithm(None, [AnswerTagReward()], **options)


@pytest.fixture
def batch() -> TrainingBatch:
    return two_groups()


def test_table_has_every_algorithm_but_recipe() -> None:
    assert set(TABLE) == set(NAMED)


@pytest.mark.parametrize("algorithm", NAMED.values(), ids=NAMED)
def test_defaults(algorithm: type[RLModule]) -> None:
    module, row = instance(algorithm), TABLE[algorithm.__name__]
    assert (module.group_size, module.extra_rows) == (row.group_size, row.extra_rows)
    assert module.max_grad_norm == 1.0 and module.batching == Batching()
    assert module.needs_reference == bool(row.kl_loss[1] or row.kl_reward or algorithm is DPO)
    if not isinstance(module, RLModule):
        return
    assert module.aggregation == row.aggregation
    assert (module.kl.loss_coef, module.kl.reward_coef) == (row.kl_loss[1], row.kl_reward)
    if module.kl.loss_coef:
        assert module.kl.estimator == row.kl_loss[0]
    assert module.entropy_coef == row.entropy


def test_sft_is_the_mean_of_the_negative_log_likelihood(batch: TrainingBatch) -> None:
    module = instance(SFT)
    (term,) = module.terms(batch).values()
    assert (term.aggregation, term.weight) == (TABLE["SFT"].aggregation, 1.0)
    assert torch.equal(term.mask_NT, batch.trained_mask_NT)
    ones = batch.replace(advantages_NT=torch.ones(6, 4))
    loss_NT = module.losses(PolicyOutput(batch.old_logp_NT, batch.entropy_NT), ones)["policy"]
    assert torch.equal(loss_NT, -batch.old_logp_NT)


def test_dpo_is_a_mean_over_pairs() -> None:
    pairs = trainable(scored([[1, 0]] * 3))
    (term,) = instance(DPO).terms(pairs).values()
    assert (term.aggregation, term.weight) == ("token-mean", 1.0)
    assert term.mask_NT.sum(1).tolist() == [1, 0] * 3  # one token a pair, so that each counts once


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.advantages is not None])
def test_advantages(name: str, batch: TrainingBatch) -> None:
    row, extra = TABLE[name], NAMED[name].extra_rows
    module = instance(NAMED[name], **({"group_size": 3 - extra} if extra else {}))
    returned = module.advantages(batch)
    advantages = returned.advantages if isinstance(returned, Credit) else returned
    torch.testing.assert_close(advantages, row.advantages(batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.loss is not None])
def test_loss_of_tokens(name: str, batch: TrainingBatch) -> None:
    row, module = TABLE[name], instance(NAMED[name])
    for shift in (-1.0, -0.3, -1e-4, 0.0, 1e-4, 0.25, 0.5):  # on both sides of every clip range
        logp_NT = batch.old_logp_NT + shift
        loss_NT, expected_NT = module.policy_loss(logp_NT, batch), row.loss(logp_NT, batch)
        mask_NT = batch.trained_mask_NT
        torch.testing.assert_close(loss_NT[mask_NT], expected_NT[mask_NT], rtol=0, atol=0)


ONE_IS_ENOUGH = ["ReinforcePP", "ReMax", "PPO"]


@pytest.mark.parametrize("name", [name for name in TABLE if name not in (*ONE_IS_ENOUGH, "SFT", "DPO")])
def test_a_group_of_one_is_refused_where_completions_are_compared(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} compares the completions of a prompt: group_size must be >= 2, is 1"):
        instance(NAMED[name], group_size=1)


@pytest.mark.parametrize("name", ONE_IS_ENOUGH)
def test_one_completion_is_enough_elsewhere(name: str) -> None:
    instance(NAMED[name], group_size=1)


def test_dapo_has_all_of_its_parts() -> None:
    """What is left out of other implementations: no KL, filter on accuracy, length penalty, one token mean."""
    module = instance(NAMED["DAPO"], sampling=Sampling(max_tokens=20_480))
    assert module.clip == Clip(0.2, 0.28, None)
    assert not module.needs_reference and module.entropy_coef == 0
    assert module.scale_by_std
    assert module.aggregation == "token-mean"
    assert module.dynamic_sampling == DynamicSampling(20, 1.0, "accuracy")
    assert module.length_penalty == LengthPenalty(None, 1.0)
    assert module.length_penalty.resolve_buffer_tokens(module.sampling.max_tokens) == 4096
    assert not module.masking.truncated


def test_dual_clip_reaches_the_loss(batch: TrainingBatch) -> None:
    """A = -0.4 and ρ = e^1.5: min(0.4·4.48, 0.4·3) = 1.2 instead of 1.79."""
    module = instance(NAMED["GRPO"], clip=Clip(dual=3.0))
    loss_NT = module.policy_loss(batch.old_logp_NT + 1.5, batch)
    torch.testing.assert_close(loss_NT[1, :2], torch.full((2,), 1.2))


def test_opo_is_on_policy() -> None:
    for batching in (Batching(num_minibatches=2), Batching(update_epochs=3)):
        with pytest.raises(ValueError, match="a rollout serves one update"):
            instance(NAMED["OPO"], batching=batching)


def test_selection_has_the_papers_ratios(batch: TrainingBatch) -> None:
    module = instance(NAMED["ClipCov"])
    assert (module.ratio, module.lower, module.upper) == (2e-4, 1.0, 5.0)
    module = instance(NAMED["KLCov"])
    assert (module.ratio, module.beta) == (2e-3, 1.0)
    # 17 tokens: max(1, int(.002 · 17)) = 1, the one of largest covariance
    mask_NT = batch.trained_mask_NT
    expected_NT = losses.kl_cov_select(batch.old_logp_NT, batch.advantages_NT, mask_NT, ratio=2e-3)
    assert expected_NT.sum() == 1 and torch.equal(module.select(batch), expected_NT)
