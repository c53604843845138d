"""Clipped importance-sampling policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import Experience


class CISPO(GRPO):
    """CISPO (MiniMax-M1, arXiv 2506.13585): the importance weight is clipped, the gradient never is.

    loss = -sg[clip(ρ, 1-ε_low, 1+ε_high)]·A·log π, mean over tokens. Rare tokens that turn an argument around have
    large ratios; PPO's clipping would drop them after their first update. ``max_refills`` adds dynamic sampling.

    Args:
        aggregation: Paper: mean over tokens.
        clip_low: 1: no lower bound, as in the paper.
        clip_high: The weight is at most 1 + clip_high; 4 is ScaleRL's (arXiv 2510.13786), whose bound is absolute, 5.
        kl_loss_coef: Paper: no KL term.
    """

    def __init__(
        self,
        *args,
        aggregation: ReduceMode = "token-mean",
        clip_low: float = 1.0,
        clip_high: float = 4.0,
        kl_loss_coef: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(
            *args, aggregation=aggregation, clip_low=clip_low, clip_high=clip_high, kl_loss_coef=kl_loss_coef, **kwargs
        )

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """-sg[clip(ρ)]·A·log π."""
        return losses.cispo(logp_NT, batch.old_logp_NT, batch.advantages_NT, **self.clip_range)

    def cut_off(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """Tokens whose weight is held at a bound; their gradient goes on."""
        ratio_NT = (logp_NT - batch.old_logp_NT).exp()
        return (ratio_NT > 1 + self.clip_high) | (ratio_NT < 1 - self.clip_low)
