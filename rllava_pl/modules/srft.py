"""SRFT: supervised and reinforcement fine-tuning in a single stage."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages, demonstrations
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.modules.demonstrations import MixedGroupModule
from rllava_pl.types import RewardedBatch, TrainingBatch


class SRFT(MixedGroupModule):
    """SRFT (arXiv 2506.19767): entropy decides how much is imitated and how much explored, row by row.

    With H the mean entropy of a row: demonstrations -w·e^{-H}·log π - A·p/(p + γ), A over the mixed group; right
    samples -v·e^{H}·log π; wrong ones +log π. Sum over tokens, divided by N·max_tokens; demonstrations: mean over
    theirs.

    Args:
        sft_scale: w.
        rl_scale: v.
        success_threshold: A sample with at least this score is right.
        shaping: γ; null: the plain ratio -A·p of the paper's text.
        aggregation: Paper: the sum over tokens, divided by a constant.
    """

    def __init__(
        self,
        *args,
        sft_scale: float = 0.5,
        rl_scale: float = 0.1,
        success_threshold: float = 1.0,
        shaping: float | None = 0.1,
        aggregation: ReduceMode = "constant",
        **kwargs,
    ) -> None:
        super().__init__(*args, aggregation=aggregation, **kwargs)
        self.sft_scale, self.rl_scale = sft_scale, rl_scale
        self.success_threshold, self.shaping = success_threshold, shaping

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Reward - mean over the mixed group, (N,); only demonstrations use it."""
        return advantages.grpo(batch.rewards_N, batch.group_N, scale_by_std=False)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Imitation and exploration, weighed by entropy."""
        return demonstrations.srft(
            logp_NT,
            batch.advantages_NT,
            batch.trained_mask_NT,
            batch.given_mask_NT,
            batch.scores_N,
            batch.entropy_NT,
            sft_scale=self.sft_scale,
            rl_scale=self.rl_scale,
            success_threshold=self.success_threshold,
            shaping=self.shaping,
        )
