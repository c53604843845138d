"""Group Relative Policy Optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import KL
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch


class GRPO(RLModule):
    """GRPO (arXiv 2402.03300): the mean of a prompt's own completions is the baseline, so no critic is needed.

    A_i = (r_i - mean(r)) / (std(r) + 1e-6) over the G completions of a prompt, on every token of i, 0 if all are equal;
    loss = -min(A·ρ, A·clip(ρ, 1-ε, 1+ε)) + β·KL(k3), ρ = π/π_old, averaged over tokens and then over completions.

    Args:
        scale_by_std: Divide by the group's standard deviation (unbiased).
        aggregation: Paper: mean over tokens, then over completions.
        kl: Paper: β = 0.04 in the loss. Many later works use 0 to 0.01.
    """

    needs_groups = True

    def __init__(
        self,
        *args,
        scale_by_std: bool = True,
        aggregation: ReduceMode = "sequence-mean-token-mean",
        kl: KL = KL(loss_coef=0.04),
        **kwargs,
    ) -> None:
        super().__init__(*args, aggregation=aggregation, kl=kl, **kwargs)
        self.scale_by_std = scale_by_std

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """(r - mean) / std over each group, (N,)."""
        return advantages.grpo(batch.rewards_N, batch.group_N, scale_by_std=self.scale_by_std)
