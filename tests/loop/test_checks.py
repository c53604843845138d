"""Options out of range, and those that contradict each other, are refused before anything is loaded."""

from __future__ import annotations

from math import inf

import pytest
import torch

from rllava_pl.loop.checks import check_batch_size, check_credit, check_run_options, check_token_loss
from rllava_pl.loop.options import KL, Batching, Clip, DynamicSampling, Schedule
from rllava_pl.modules import CHORD, GRPO, LUFFY, PPO
from rllava_pl.types import Credit, Sampling
from tests import runs
from tests.modules.cases import two_groups

WRONG = [
    (GRPO, {"group_size": 0}, "group_size must be >= 2, is 0"),
    (GRPO, {"max_rollouts": -3}, "max_rollouts is -3; it must be at least 0"),
    (GRPO, {"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0; it must be larger than 0"),
    (GRPO, {"max_grad_norm": -1.0}, r"max_grad_norm is -1\.0"),
    (GRPO, {"max_skipped": 0}, "max_skipped is 0; it must be at least 1"),
    (GRPO, {"aggregation": "mean"}, "aggregation is 'mean'; it must be one of"),
    (GRPO, {"kl": KL(loss_coef=0.0, target=0.1)}, "kl.target adapts the KL coefficients, but kl.loss_coef and"),
    (PPO, {"critic": "sepearate"}, "critic is 'sepearate'; it must be one of 'shared', 'head', 'separate'"),
    (PPO, {"gamma": 1.5}, r"gamma is 1\.5; it must be between 0 and 1"),
    (
        PPO,
        {"group_size": 1, "dynamic_sampling": DynamicSampling(max_rounds=20)},
        "dynamic_sampling looks for groups whose rewards differ; group_size 1 has none",
    ),
    (CHORD, {"mu": 1.5}, r"mu is 1\.5"),
    (LUFFY, {"shaping": 0.0}, r"shaping is 0\.0; it must be larger than 0"),
    (LUFFY, {"ratio_clip": -0.1}, r"ratio_clip is -0\.1; it must be at least 0, or null"),
    (
        GRPO,
        {
            "schedule": Schedule(kind="linear", warmup_steps=12),
            "max_rollouts": 3,
            "batching": Batching(num_minibatches=2, update_epochs=2),
        },
        r"max_rollouts 3 x batching.num_minibatches 2 x batching.update_epochs 2 = 12 steps",
    ),
    (GRPO, {"schedule": Schedule(kind="linear"), "max_rollouts": 0}, "'linear' decays over max_rollouts, which is 0"),
]


@pytest.mark.parametrize(("algorithm", "options", "message"), WRONG)
def test_option_out_of_range_is_refused_by_name(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        runs.module(algorithm, **options)


def test_no_clipping_and_no_end_are_in_range():
    module = runs.module(GRPO, max_grad_norm=inf, max_rollouts=0, clip=Clip(high=inf))
    assert module.max_grad_norm == inf and module.clip.high == inf


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match=r"sampling.temperature is 0: all completions of a prompt would be equal"):
        check_run_options(0, Batching(), Schedule(), Sampling(temperature=0.0), 1.0, 5)


@pytest.mark.parametrize("size", [1, 3, 5, 6, 7])
@pytest.mark.parametrize("algorithm", [GRPO, CHORD])
def test_micro_batch_size_need_not_divide_the_group(algorithm, size):
    batching = Batching(micro_batch_size=size)
    assert runs.module(algorithm, batching=batching).batching.micro_batch_size == size


@pytest.mark.parametrize("prompts", [0, 4, 5])
def test_batch_that_minibatches_do_not_divide_is_refused(prompts):
    with pytest.raises(
        ValueError, match=rf"{prompts} prompts x group_size 4 = \d+ samples cannot be split into 3 mini"
    ):
        check_batch_size(prompts, 4, 3)
    check_batch_size(6, 4, 3)


def test_advantages_of_rows_are_spread_over_tokens_and_keep_what_is_beside_them():
    batch, advantages_N = two_groups(), torch.arange(6.0)
    credit = check_credit(GRPO, Credit(advantages_N, trained=advantages_N > 2), batch)
    assert torch.equal(credit.advantages, advantages_N[:, None].expand(6, 4)) and credit.trained.sum() == 3
    assert check_credit(GRPO, batch.advantages_NT, batch).advantages is batch.advantages_NT


def test_loss_that_was_reduced_is_refused():
    logp_NT = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"GRPO\.policy_loss returned None; it is the loss of every token, \(6, 4\)"):
        check_token_loss(GRPO, None, logp_NT)
    assert check_token_loss(GRPO, logp_NT, logp_NT) is logp_NT


class Reduces(GRPO):
    def policy_loss(self, logp_NT, batch):
        return super().policy_loss(logp_NT, batch)[batch.trained_mask_NT].sum()


class Misshapes(GRPO):
    def advantages(self, batch):
        return super().advantages(batch)[:-1]


class Forgets(GRPO):
    def advantages(self, batch):
        super().advantages(batch)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Reduces, r"Reduces\.policy_loss returned shape \(\); it is the loss of every token, \(8, \d+\)"),
        (Misshapes, r"Misshapes\.advantages returned shape \(\d+,\); it is one number a sample, \(\d+,\), or a token"),
        (Forgets, r"Forgets\.advantages returned None"),
    ],
)
def test_hook_that_returns_a_wrong_shape_is_refused_by_name(tmp_path, algorithm, message):
    """With a KL term a scalar would spread over all tokens, and the gradient depend on the micro-batches."""
    batching = Batching(num_minibatches=2, micro_batch_size=8)
    module = runs.module(algorithm, kl=KL(loss_coef=0.04), batching=batching)
    with pytest.raises(ValueError, match=message):
        runs.trainer(tmp_path).fit(module, runs.data())
    assert module.state.updates == 0
