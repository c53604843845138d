"""Penalties on the way from rewards to credit; what was judged stays in the log as it was."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional.rewards import overlong_penalty, place_rewards
from rllava_pl.types import Experience


def truncated(experience: Experience) -> Tensor:
    """Bool (N,): the response ended because its budget ran out."""
    cut = [rollout.finish_reason == "length" for rollout in experience.rollouts]
    return torch.tensor(cut, dtype=torch.bool, device=experience.mask_NT.device)


def without_truncated(experience: Experience) -> Experience:
    """Truncated responses keep their place in the group's baseline and are trained no more (DAPO, arXiv 2503.14476).

    A wrong answer and an answer that was cut off are different things; the reward cannot tell them apart.
    """
    kept_NT = experience.mask_NT & ~truncated(experience)[:, None]
    return experience.replace(mask_NT=kept_NT, demo_mask_NT=experience.demo_mask_NT & kept_NT)


def overlong(experience: Experience, *, max_tokens: int, buffer_tokens: int, scale: float) -> Tensor:
    """Soft punishment of length, (N,), at most 0; see ``functional.rewards.overlong_penalty``.

    Only what the policy wrote itself counts.
    """
    lengths_N = experience.own_mask_NT.sum(1)
    return overlong_penalty(lengths_N, max_tokens=max_tokens, buffer_tokens=buffer_tokens, scale=scale)


def penalised(experience: Experience, *, kl_coef: float) -> Experience:
    """Subtract the KL divergence to the reference (k1), for sequence and for token estimators alike.

    r_i - β·Σ_t m·(log π_old - log π_ref) in ``rewards_N``; the same sum, taken apart over tokens, in
    ``token_rewards_NT``: the reward stands on the last trainable token.
    """
    token_rewards_NT = place_rewards(experience.rewards_N, experience.mask_NT)
    if not kl_coef or experience.old_logp_NT is None or experience.ref_logp_NT is None:
        return experience.replace(token_rewards_NT=token_rewards_NT)
    penalty_NT = kl_coef * (experience.old_logp_NT - experience.ref_logp_NT) * experience.own_mask_NT
    return experience.replace(
        rewards_N=experience.rewards_N - penalty_NT.sum(1), token_rewards_NT=token_rewards_NT - penalty_NT
    )
