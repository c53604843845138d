"""Clipped importance-sampling policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import KL, Clip
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import TrainingBatch


class CISPO(GRPO):
    """CISPO (MiniMax-M1, arXiv 2506.13585): the importance weight is clipped, the gradient never is.

    loss = -sg[clip(ρ, 1-ε_low, 1+ε_high)]·A·log π, mean over tokens. Rare tokens that turn an argument around have
    large ratios; PPO's clipping would drop them after their first update.

    Args:
        aggregation: Paper: mean over tokens.
        clip: The weight is at most 1 + high; 4 is ScaleRL's (arXiv 2510.13786), whose bound is absolute, 5. Low 1: no
            lower bound, as in the paper.
        kl: Paper: no KL term.
    """

    def __init__(
        self,
        *args,
        aggregation: ReduceMode = "token-mean",
        clip: Clip = Clip(low=1.0, high=4.0),
        kl: KL = KL(),
        **kwargs,
    ) -> None:
        super().__init__(*args, aggregation=aggregation, clip=clip, kl=kl, **kwargs)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """-sg[clip(ρ)]·A·log π."""
        return losses.cispo(logp_NT, batch.old_logp_NT, batch.advantages_NT, **self.clip.range)

    def clipped_tokens(self, policy_loss_NT: Tensor, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Tokens whose weight is held at a bound; they keep their gradient."""
        ratio_NT = (logp_NT.detach() - batch.old_logp_NT).exp()
        return (ratio_NT > 1 + self.clip.high) | (ratio_NT < 1 - self.clip.low)
