"""Proximal policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional.advantages import gae
from rllava_pl.loop.options import KL, require
from rllava_pl.modules.actor_critic import ActorCritic
from rllava_pl.types import PolicyOutput, RewardedBatch, Term, TrainingBatch


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
        for name, value in (("gamma", gamma), ("lam", lam), ("lam_critic", lam if lam_critic is None else lam_critic)):
            require(0 <= value <= 1, name, value, "between 0 and 1")
        require(length_adaptive >= 0, "length_adaptive", length_adaptive, "at least 0")
        require(imitation_coef >= 0, "imitation_coef", imitation_coef, "at least 0")
        self.gamma, self.lam = gamma, lam
        self.lam_critic = lam if lam_critic is None else lam_critic
        self.length_adaptive = length_adaptive
        self.imitation_coef, self.success_threshold = imitation_coef, success_threshold

    def estimate(self, batch: RewardedBatch) -> tuple[Tensor, Tensor]:
        """Whitened advantages, and returns."""
        states = (batch.token_rewards_NT, batch.values_NT, batch.sampled_mask_NT)
        lam: float | Tensor = self.lam
        if self.length_adaptive:
            lam = (1 - 1 / (self.length_adaptive * batch.lengths_N.clamp(min=1))).clamp(0, 1)
        advantages_NT, _ = gae(*states, gamma=self.gamma, lam=lam)
        _, returns_NT = gae(*states, gamma=self.gamma, lam=self.lam_critic, whiten=False)
        return advantages_NT, returns_NT

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """Also the imitation of right responses."""
        terms = super().terms(batch)
        if not self.imitation_coef or self.trains_critic_only:
            return terms
        right_NT = batch.trained_mask_NT & (batch.scores_N >= self.success_threshold)[:, None]
        return terms | {"imitation": Term(right_NT, "token-mean", self.imitation_coef)}

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """Also -log π for the imitation."""
        return super().losses(output, batch) | {"imitation": -output.logp_NT}
