"""REINFORCE leave-one-out."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.loop.options import KL
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch


class RLOO(RLModule):
    """RLOO (arXiv 2402.14740): each completion is compared with the mean of the others of its prompt.

    A_i = r_i - mean of r_j over j ≠ i = G/(G-1)·(r_i - mean(r)): an unbiased baseline, since it does not contain the
    sample itself. Clipped surrogate, mean over tokens; KL to the reference (k1, summed over the response) inside the
    reward.

    Args:
        kl: KL divergence, subtracted from the reward.
    """

    needs_groups = True

    def __init__(self, *args, kl: KL = KL(reward_coef=0.001), **kwargs) -> None:
        super().__init__(*args, kl=kl, **kwargs)

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Reward minus the mean of the other completions, (N,)."""
        return advantages.rloo(batch.rewards_N, batch.group_N)
