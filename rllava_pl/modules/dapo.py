"""Decoupled clip and dynamic sampling policy optimization."""

from __future__ import annotations

from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.modules.grpo import GRPO


class DAPO(GRPO):
    """DAPO (arXiv 2503.14476): GRPO with four changes that keep long reasoning alive.

    Clip-higher; all-right and all-wrong groups replaced, judged by accuracy; a mean over tokens; a soft length limit.

    Args:
        aggregation: Paper: mean over the tokens of the mini-batch.
        clip_high: Paper: 0.28, with 0.2 below.
        kl_loss_coef: Paper: no KL term.
        overlong_buffer: Paper: 4,096 of 20,480 tokens.
        max_refills: Further rounds of generation before going on with what there is.
    """

    def __init__(
        self,
        *args,
        aggregation: ReduceMode = "token-mean",
        clip_high: float = 0.28,
        kl_loss_coef: float = 0.0,
        overlong_buffer: float = 0.2,
        max_refills: int = 20,
        **kwargs,
    ) -> None:
        super().__init__(
            *args,
            aggregation=aggregation,
            clip_high=clip_high,
            kl_loss_coef=kl_loss_coef,
            overlong_buffer=overlong_buffer,
            max_refills=max_refills,
            **kwargs,
        )
