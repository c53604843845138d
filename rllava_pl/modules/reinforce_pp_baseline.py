"""REINFORCE++ with a group baseline."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.functional.kl import KLEstimator
from rllava_pl.modules.base import RLModule
from rllava_pl.types import Experience


class ReinforcePPBaseline(RLModule):
    """REINFORCE++ with baseline (arXiv 2501.03262): the group gives the mean, the whole batch gives the scale.

    A = whiten(r_i - mean_g(r)) over all trainable tokens of all ranks. Clipped surrogate, mean over tokens; KL in the
    loss as k2, whose gradient is that of KL(π || π_ref).

    Args:
        kl_loss_coef: Weight of the KL term.
        kl_estimator: Paper: k2.
    """

    needs_groups = True

    def __init__(self, *args, kl_loss_coef: float = 0.001, kl_estimator: KLEstimator = "k2", **kwargs) -> None:
        super().__init__(*args, kl_loss_coef=kl_loss_coef, kl_estimator=kl_estimator, **kwargs)

    def advantages(self, experience: Experience) -> Tensor:
        """Centred in the group, whitened over the batch, (N, T)."""
        return advantages.reinforce_pp_baseline(experience.rewards_N, experience.group_N, experience.mask_NT)
