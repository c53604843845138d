"""Proximal policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional.advantages import gae
from rllava_pl.loop.options import KL, require_range
from rllava_pl.modules.actor_critic import ActorCritic
from rllava_pl.types import PolicyOutput, RewardedBatch, Term, TrainingBatch


class PPO(ActorCritic):
    """PPO (arXiv 1707.06347): clipped surrogate, with advantages from a critic (GAE, arXiv 1506.02438).

    δ_t = r_t + γ·V_{t+1} - V_t, A_t = δ_t + γ·λ·A_{t+1}, whitened over all trainable tokens of all ranks; returns
    R_t = A_t + V_t before whitening. The reward stands on the last token, the KL penalty (k1) on every one.

    Args:
        gamma: Discount γ.
        lam: λ of the advantages.
        lam_critic: λ of the returns; VAPO (arXiv 2504.05118) decouples the two and takes 1. Null: the same.
        length_adaptive: α of VAPO's λ_i = 1 - 1/(α·l_i), clamped to [0, 1], l_i the response's length; 0: off.
        imitation_coef: Weight of VAPO's -log π on right responses, mean over their tokens; 0: off.
        success_threshold: A response with at least this score is right.
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
        imitation_coef: float = 0.0,
        success_threshold: float = 1.0,
        group_size: int = 1,
        kl: KL = KL(reward_coef=0.001),
        **kwargs,
    ) -> None:
        super().__init__(*args, group_size=group_size, kl=kl, **kwargs)
        self.gamma, self.lam, self.lam_critic = gamma, lam, lam if lam_critic is None else lam_critic
        self.length_adaptive, self.imitation_coef = length_adaptive, imitation_coef
        self.success_threshold = success_threshold
        require_range(self, "gamma", "lam", "lam_critic", high=1.0)
        require_range(self, "length_adaptive", "imitation_coef")

    def estimate(self, batch: RewardedBatch) -> tuple[Tensor, Tensor]:
        """Whitened advantages, and returns."""
        states = (batch.token_rewards_NT, batch.values_NT, batch.sampled_mask_NT)
        adapted_N = (1 - 1 / (max(self.length_adaptive, 1e-9) * batch.lengths_N.clamp(min=1))).clamp(0, 1)
        advantages_NT, _ = gae(*states, gamma=self.gamma, lam=adapted_N if self.length_adaptive else self.lam)
        return advantages_NT, gae(*states, gamma=self.gamma, lam=self.lam_critic, whiten=False)[1]

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """Also the imitation of right responses."""
        right_NT = batch.trained_mask_NT & (batch.scores_N >= self.success_threshold)[:, None]
        active = self.imitation_coef and not self.trains_critic_only
        imitation = {"imitation": Term(right_NT, "token-mean", self.imitation_coef)} if active else {}
        return super().terms(batch) | imitation

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """Also -log π for the imitation."""
        return super().losses(output, batch) | {"imitation": -output.logp_NT}
