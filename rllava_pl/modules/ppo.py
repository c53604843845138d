"""Proximal policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional.advantages import gae
from rllava_pl.functional.reduce import reduce_loss
from rllava_pl.loop.checks import NOT_NEGATIVE, PART
from rllava_pl.loop.optimization import Counts
from rllava_pl.modules.actor_critic import ActorCritic
from rllava_pl.types import Experience, PolicyOutput


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
        success_threshold: A response with at least this reward is right.
        group_size: Completions of each prompt.
        kl_reward_coef: Weight of the KL divergence in the reward.
    """

    ranges = ActorCritic.ranges | {"gamma": PART, "lam": PART, "lam_critic": PART, "length_adaptive": NOT_NEGATIVE}

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
        kl_reward_coef: float = 0.001,
        **kwargs,
    ) -> None:
        super().__init__(*args, group_size=group_size, kl_reward_coef=kl_reward_coef, **kwargs)
        self.gamma, self.lam = gamma, lam
        self.lam_critic = lam if lam_critic is None else lam_critic
        self.length_adaptive = length_adaptive
        self.imitation_coef, self.success_threshold = imitation_coef, success_threshold

    def estimate(self, everyone: Experience) -> tuple[Tensor, Tensor]:
        """Whitened advantages, and returns."""
        states = (everyone.token_rewards_NT, everyone.values_NT, everyone.mask_NT)
        lam: float | Tensor = self.lam
        if self.length_adaptive:
            lam = (1 - 1 / (self.length_adaptive * everyone.lengths_N.clamp(min=1))).clamp(0, 1)
        advantages_NT, _ = gae(*states, gamma=self.gamma, lam=lam)
        _, returns_NT = gae(*states, gamma=self.gamma, lam=self.lam_critic, whiten=False)
        return advantages_NT, returns_NT

    def credit(self, experience: Experience) -> Experience:
        """Advantages and returns, and which tokens belong to right responses."""
        right_NT = experience.mask_NT & (experience.rewards_N >= self.success_threshold)[:, None]
        return super().credit(experience).replace(selected_NT=right_NT)

    def loss(self, output: PolicyOutput, batch: Experience, counts: Counts) -> Tensor:
        """Policy and value loss, and the imitation of right responses."""
        loss = super().loss(output, batch, counts)
        if not self.imitation_coef or self.warms_up:
            return loss
        nll = reduce_loss(-output.logp_NT, batch.selected_NT, "token-mean", denominator=counts.selected)
        return loss + self.imitation_coef * nll
