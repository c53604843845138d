"""HPT: hybrid post-training."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional import advantages, demonstrations
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import Clip
from rllava_pl.modules.demonstrations import BesideGroupModule, mixed_inputs
from rllava_pl.types import Credit, RewardedBatch, TrainingBatch


class HPT(BesideGroupModule):
    """HPT (arXiv 2509.04419): imitate where the policy fails, explore where it succeeds.

    A prompt with at most ``gate`` right samples trains on its demonstration, -c·log π, and drops its samples; the
    others train on their samples, -A·ρ with A = r_i - mean(r) over samples. Demonstrations: mean over their tokens.

    Args:
        sft_coef: c; paper: 1, for one model 0.3.
        rl_coef: Weight of the samples' loss.
        gate: Largest number of right samples at which the demonstration is used; paper: 0 or 2.
        success_threshold: A sample with at least this score is right.
        aggregation: Paper: the sum over tokens, divided by a constant.
        clip: Paper: not clipped, 1 below and infinite above.
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
        clip: Clip = Clip(low=1.0, high=float("inf")),
        entropy_coef: float = 0.001,
        **kwargs,
    ) -> None:
        super().__init__(*args, aggregation=aggregation, clip=clip, entropy_coef=entropy_coef, **kwargs)
        self.sft_coef, self.rl_coef, self.gate, self.success_threshold = sft_coef, rl_coef, gate, success_threshold

    def advantages(self, batch: RewardedBatch) -> Credit:
        """Reward - mean over the samples of a prompt, (N,); of each prompt either samples or demonstration train."""
        advantages_N = advantages.grpo(batch.rewards_N, batch.group_N, scale_by_std=False)
        threshold, gate = self.success_threshold, self.gate
        failed_N = demonstrations.hpt_gate(batch.scores_N, batch.group_N, success_threshold=threshold, gate=gate)
        imitates_P = batch.by_prompt(failed_N)[:, 0] & batch.by_prompt(batch.given_mask_NT.any(1))[:, -1]
        self.metrics.add_masked({"imitated_prompts": imitates_P.float()}, torch.ones_like(imitates_P))
        is_last_G = torch.arange(batch.group_size, device=imitates_P.device) == self.group_size
        return Credit(advantages_N, trained=(imitates_P[:, None] == is_last_G).flatten())

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """-A·ρ, and -c·log π on demonstrations."""
        return demonstrations.hpt(
            logp_NT, *mixed_inputs(batch), sft_coef=self.sft_coef, rl_coef=self.rl_coef, **self.clip.range
        )
