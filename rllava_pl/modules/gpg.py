"""Group policy gradient."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages, losses
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch, TrainingBatch


class GPG(RLModule):
    """GPG (arXiv 2504.02546): plain policy gradient with a group mean, scaled up for groups without information.

    A_i = α·(r_i - mean(r)) / f_norm, α = N / (samples in groups with unequal rewards): groups without information take
    part in the mean over tokens, and α undoes their dilution. loss = -A·log π, mean over tokens; no clipping, no KL.

    With ``dynamic_sampling: {max_rounds: 20, min_informative: 0.6}`` the policy samples until 60 % of the batch is
    informative, the setting of the authors' best row.

    Args:
        f_norm: Divides the advantages; the paper's 1.
    """

    needs_groups = True

    def __init__(self, *args, f_norm: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.f_norm = f_norm

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """α·(r - mean) / f_norm over each group, (N,)."""
        return advantages.gpg(batch.rewards_N, batch.group_N, f_norm=self.f_norm)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """-A·log π."""
        return losses.reinforce(logp_NT, batch.advantages_NT)
