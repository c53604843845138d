"""REINFORCE++ with a group baseline."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.loop.options import KL
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch


class ReinforcePPBaseline(RLModule):
    """REINFORCE++ with baseline (arXiv 2501.03262): the group gives the mean, the whole batch gives the scale.

    A = whiten(r_i - mean_g(r)) over all trainable tokens of all ranks. Clipped surrogate, mean over tokens; KL in the
    loss as k2, whose gradient is that of KL(π || π_ref).

    Args:
        kl: Paper: k2 in the loss.
    """

    needs_groups = True

    def __init__(self, *args, kl: KL = KL(loss_coef=0.001, estimator="k2"), **kwargs) -> None:
        super().__init__(*args, kl=kl, **kwargs)

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Centred in the group, whitened over the batch, (N, T)."""
        return advantages.reinforce_pp_baseline(batch.rewards_N, batch.group_N, batch.sampled_mask_NT)
