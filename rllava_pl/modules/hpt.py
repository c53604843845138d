"""HPT: hybrid post-training."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional import advantages, demonstrations
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.modules.demonstrations import BesideGroupModule
from rllava_pl.types import Experience


class HPT(BesideGroupModule):
    """HPT (arXiv 2509.04419): imitate where the policy fails, explore where it succeeds.

    A prompt with at most ``gate`` right samples trains on its demonstration, -c·log π, and drops its samples; the
    others train on their samples, -A·ρ with A = r_i - mean(r) over samples alone. Sum over tokens, divided by
    N·max_tokens; demonstrations: mean over theirs.

    Args:
        sft_coef: c; paper: 1, for one model 0.3.
        rl_coef: Weight of the samples' loss.
        gate: Largest number of right samples at which the demonstration is used; paper: 0 or 2.
        success_threshold: A sample with at least this reward is right.
        aggregation: Paper: the sum over tokens, divided by a constant.
        clip_high: Infinite: not clipped, as in the paper.
        clip_low: 1: not clipped.
        entropy_coef: Paper: 0.001.
    """

    def __init__(
        self,
        *args,
        sft_coef: float = 1.0,
        rl_coef: float = 1.0,
        gate: int = 0,
        success_threshold: float = 1.0,
        aggregation: ReduceMode = "constant",
        clip_low: float = 1.0,
        clip_high: float = float("inf"),
        entropy_coef: float = 0.001,
        **kwargs,
    ) -> None:
        super().__init__(
            *args, aggregation=aggregation, clip_low=clip_low, clip_high=clip_high, entropy_coef=entropy_coef, **kwargs
        )
        self.sft_coef, self.rl_coef = sft_coef, rl_coef
        self.gate, self.success_threshold = gate, success_threshold

    def credit(self, experience: Experience) -> Experience:
        """Advantages, and of each prompt either its samples or its demonstration."""
        failed_N = demonstrations.hpt_gate(
            experience.rewards_N, experience.group_N, success_threshold=self.success_threshold, gate=self.gate
        )
        shape = (-1, self.group_size + 1)
        given_P = experience.demo_mask_NT.any(1).unflatten(0, shape)[:, -1]
        imitates_P = failed_N.unflatten(0, shape)[:, 0] & given_P
        self.tally.add_masked("imitated_prompts", imitates_P.float(), torch.ones_like(imitates_P))
        last_G = torch.arange(self.group_size + 1, device=imitates_P.device) == self.group_size
        kept_NT = (imitates_P[:, None] == last_G).flatten()[:, None]
        experience = super().credit(experience)
        return experience.replace(mask_NT=experience.mask_NT & kept_NT, demo_mask_NT=experience.demo_mask_NT & kept_NT)

    def advantages(self, experience: Experience) -> Tensor:
        """Reward - mean over the samples of a prompt, (N,)."""
        return advantages.grpo(experience.rewards_N, experience.group_N, scale_by_std=False)

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """-A·ρ, and -c·log π on demonstrations."""
        return demonstrations.hpt(
            logp_NT,
            batch.old_logp_NT,
            batch.advantages_NT,
            batch.mask_NT,
            batch.demo_mask_NT,
            sft_coef=self.sft_coef,
            rl_coef=self.rl_coef,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
