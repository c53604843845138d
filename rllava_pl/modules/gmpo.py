"""Geometric-mean policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import Experience


class GMPO(GRPO):
    """GMPO (arXiv 2507.20673): the geometric mean of the ratios instead of the arithmetic one.

    loss_i = -A_i·exp(mean over t of clip(log ρ_it)), clipped to (e^-0.4, e^0.4) on the side where that is pessimistic.
    One outlying token moves a geometric mean far less, so the range can be much wider than PPO's.

    Args:
        clip_low: How far log ρ may fall; paper: 0.4.
        clip_high: How far log ρ may rise; paper: 0.4.
        kl_loss_coef: Paper: no KL term.
    """

    def __init__(
        self, *args, clip_low: float = 0.4, clip_high: float = 0.4, kl_loss_coef: float = 0.0, **kwargs
    ) -> None:
        super().__init__(*args, clip_low=clip_low, clip_high=clip_high, kl_loss_coef=kl_loss_coef, **kwargs)

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """The same value on every token of a response."""
        return losses.gmpo(logp_NT, batch.old_logp_NT, batch.advantages_NT, batch.mask_NT, **self.clip_range)
