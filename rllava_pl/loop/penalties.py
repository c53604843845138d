"""From scores to rewards: penalties for length and for divergence from the reference; scores stay as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rllava_pl.functional.kl import AdaptiveKLController
from rllava_pl.functional.reduce import masked_mean
from rllava_pl.functional.rewards import overlong_penalty, place_rewards
from rllava_pl.loop.batch import truncated_rows
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.options import KL, LengthPenalty, Masking
from rllava_pl.loop.state import RunState
from rllava_pl.types import BatchT, RewardedBatch, ScoredBatch


def mask_rows(batch: BatchT, masking: Masking) -> BatchT:
    """Without the tokens that ``masking`` leaves out of the losses.

    A wrong answer and an answer that was cut off are different things, and a reward cannot tell them apart.
    """
    if not masking.truncated:
        return batch
    return batch.replace(trained_mask_NT=batch.trained_mask_NT & ~truncated_rows(batch)[:, None])


def length_penalties(batch: ScoredBatch, options: LengthPenalty, max_tokens: int) -> Tensor | None:
    """Penalty of each row (N,), at most 0, on its sampled tokens; None where the option is off."""
    buffer = options.resolve_buffer_tokens(max_tokens)
    if not buffer:
        return None
    return overlong_penalty(batch.lengths_N, max_tokens=max_tokens, buffer_tokens=buffer, scale=options.scale)


def penalize(batch: ScoredBatch, penalties_N: Tensor | None, kl_coef: float) -> RewardedBatch:
    """Rewards of sequences and of tokens.

    With k_t = log π_old(t) - log π_ref(t) on sampled tokens: ``rewards_N`` = score + length penalty - β·Σ_t k_t;
    ``token_rewards_NT`` is the same sum taken apart: score and length penalty on the last token, -β·k_t on every one.

    Args:
        batch: Scored, with ``old_logp_NT`` and ``ref_logp_NT`` if ``kl_coef`` is not 0.
        penalties_N: Length penalties, if any.
        kl_coef: β.
    """
    rewards_N = batch.scores_N if penalties_N is None else batch.scores_N + penalties_N
    token_rewards_NT = place_rewards(rewards_N, batch.sampled_mask_NT | batch.trained_mask_NT)
    if kl_coef:
        penalty_NT = kl_coef * (batch.old_logp_NT - batch.ref_logp_NT) * batch.sampled_mask_NT
        rewards_N, token_rewards_NT = rewards_N - penalty_NT.sum(1), token_rewards_NT - penalty_NT
    return batch.to_stage(RewardedBatch, rewards_N=rewards_N, token_rewards_NT=token_rewards_NT)


def adapt_kl(state: RunState, batch: ScoredBatch, options: KL, metrics: MetricAccumulator) -> None:
    """Move an adaptive KL coefficient by the divergence of the rollout batch of all ranks, a token mean of k1."""
    if not options.target:
        return
    sampled_NT = batch.sampled_mask_NT & batch.in_baseline_N[:, None]
    observed = float(masked_mean(batch.old_logp_NT - batch.ref_logp_NT, sampled_NT))
    if math.isfinite(observed):  # else the updates are skipped, and the coefficient would be lost for good
        controller = AdaptiveKLController(state.kl_factor, options.target, options.horizon)
        controller.update(observed, int(sampled_NT.any(1).sum()))
        state.kl_factor = controller.coef
    metrics.add("kl_factor", torch.tensor(state.kl_factor, device=batch.scores_N.device))
