"""Proximal policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional.advantages import gae
from rllava_pl.loop.options import KL, require_range
from rllava_pl.modules.actor_critic import ActorCritic
from rllava_pl.types import RewardedBatch


class PPO(ActorCritic):
    """PPO (arXiv 1707.06347): clipped surrogate, with advantages from a critic (GAE, arXiv 1506.02438).

    δ_t = r_t + γ·V_{t+1} - V_t, A_t = δ_t + γ·λ·A_{t+1}, whitened over all trainable tokens of all ranks; returns
    R_t = A_t + V_t before whitening. The reward stands on the last token, the KL penalty (k1) on every one. Mean over
    tokens. One completion a prompt is enough.

    Args:
        gamma: Discount γ.
        lam: λ of the advantages.
        lam_critic: λ of the returns; VAPO (arXiv 2504.05118) decouples the two and takes 1. Null: the same.
        length_adaptive: α of VAPO's λ_i = 1 - 1/(α·l_i), clamped to [0, 1], l_i the response's length; 0: off.
        group_size: Completions of each prompt.
        kl: KL divergence, subtracted from the reward.
    """

    def __init__(
        self,
        *args,
        gamma: float = 1.0,
        lam: float = 1.0,
        lam_critic: float | None = None,
        length_adaptive: float = 0.0,
        group_size: int = 1,
        kl: KL = KL(reward_coef=0.001),
        **kwargs,
    ) -> None:
        super().__init__(*args, group_size=group_size, kl=kl, **kwargs)
        self.gamma, self.lam, self.lam_critic = gamma, lam, lam if lam_critic is None else lam_critic
        self.length_adaptive = length_adaptive
        require_range(self, "gamma", "lam", "lam_critic", high=1.0)
        require_range(self, "length_adaptive")

    def estimate(self, batch: RewardedBatch) -> tuple[Tensor, Tensor]:
        """Whitened advantages, and returns."""
        states = (batch.token_rewards_NT, batch.values_NT, batch.sampled_mask_NT)
        lam: float | Tensor = self.lam
        if self.length_adaptive:
            lam = (1 - 1 / (self.length_adaptive * batch.lengths_N.clamp(min=1))).clamp(0, 1)
        advantages_NT, _ = gae(*states, gamma=self.gamma, lam=lam)
        _, returns_NT = gae(*states, gamma=self.gamma, lam=self.lam_critic, whiten=False)
        return advantages_NT, returns_NT
