"""On-policy RL with the optimal reward baseline."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages, losses
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch, TrainingBatch


class OPO(RLModule):
    """OPO (arXiv 2505.23585): exactly on-policy, with the baseline of least variance.

    A_i = r_i - Σ_j l_j·r_j / Σ_j l_j over the group, l the response lengths: the optimal baseline if the squared norm
    of a sample's gradient grows with its length. loss = -A·log π, mean over tokens; no clipping, no KL, no entropy
    bonus, and one optimizer step a rollout.
    """

    needs_groups = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.batching.updates_per_rollout != 1:
            raise ValueError(
                "OPO is on-policy, so a rollout serves one update: batching.num_minibatches "
                f"({self.batching.num_minibatches}) x batching.update_epochs ({self.batching.update_epochs}) must be 1"
            )

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Reward minus the length-weighted mean of the group, (N,)."""
        return advantages.opo(batch.rewards_N, batch.group_N, batch.lengths_N)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """-A·log π."""
        return losses.reinforce(logp_NT, batch.advantages_NT)
