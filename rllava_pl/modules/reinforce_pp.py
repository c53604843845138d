"""REINFORCE++."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.loop.options import KL
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch


class ReinforcePP(RLModule):
    """REINFORCE++ (arXiv 2501.03262): rewards to go, whitened over the whole batch instead of within groups.

    R_t = r_t + γ·R_{t+1}, with the reward on the last token and the KL penalty (k1) on every one; A = (R - mean) / std
    over all trainable tokens of all ranks. Clipped surrogate, mean over tokens. One completion a prompt is enough.

    Args:
        gamma: Discount of the reward to go.
        kl: KL divergence, subtracted from the reward.
    """

    def __init__(self, *args, gamma: float = 1.0, kl: KL = KL(reward_coef=0.001), **kwargs) -> None:
        super().__init__(*args, kl=kl, **kwargs)
        self.gamma = gamma

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Whitened reward to go of every token, (N, T)."""
        return advantages.reinforce_pp(batch.token_rewards_NT, batch.sampled_mask_NT, gamma=self.gamma)[0]
