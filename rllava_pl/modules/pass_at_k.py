"""Pass@k training."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import KL
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import RewardedBatch


class PassAtK(GRPO):
    """Pass@k (arXiv 2503.19595): only the best answer of a group is rewarded, for what it adds to the others.

    A of the best = (r_max - r_second) / (std(r) + 1e-6), 0 for all others and where two are best. It is the gradient of
    the group's maximum, so it makes some answer right instead of most. Clipped surrogate, mean over tokens, no KL.

    Args:
        scale_by_std: Divide by the group's standard deviation; the paper does not.
        aggregation: Mean over tokens.
        kl: No KL term.
    """

    def __init__(
        self,
        *args,
        scale_by_std: bool = True,
        aggregation: ReduceMode = "token-mean",
        kl: KL = KL(),
        **kwargs,
    ) -> None:
        super().__init__(*args, scale_by_std=scale_by_std, aggregation=aggregation, kl=kl, **kwargs)

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """The best minus the second best, on the best, (N,)."""
        return advantages.pass_at_k(batch.rewards_N, batch.group_N, scale_by_std=self.scale_by_std)
