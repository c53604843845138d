"""Geometric-mean policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.loop.options import KL, Clip
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import TrainingBatch


class GMPO(GRPO):
    """GMPO (arXiv 2507.20673): the geometric mean of the ratios instead of the arithmetic one.

    loss_i = -A_i·exp(mean over t of clip(log ρ_it)), clipped to (e^-0.4, e^0.4) on the side where that is pessimistic.
    One outlying token moves a geometric mean far less, so the range can be much wider than PPO's.

    Args:
        clip: How far log ρ may fall and rise; paper: 0.4.
        kl: Paper: no KL term.
    """

    def __init__(self, *args, clip: Clip = Clip(low=0.4, high=0.4), kl: KL = KL(), **kwargs) -> None:
        super().__init__(*args, clip=clip, kl=kl, **kwargs)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """The same value on every token of a response."""
        return losses.gmpo(logp_NT, batch.old_logp_NT, batch.advantages_NT, batch.trained_mask_NT, **self.clip.range)
