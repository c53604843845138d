"""Decoupled clip and dynamic sampling policy optimization."""

from __future__ import annotations

from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import KL, Clip, DynamicSampling, LengthPenalty
from rllava_pl.modules.grpo import GRPO


class DAPO(GRPO):
    """DAPO (arXiv 2503.14476): GRPO with four changes that keep long reasoning alive.

    Clip-higher; all-right and all-wrong groups replaced, decided by accuracy; a mean over tokens; a soft length limit.

    Args:
        aggregation: Paper: mean over the tokens of the mini-batch.
        clip: Paper: 0.28 above, 0.2 below.
        kl: Paper: no KL term.
        length_penalty: Paper: over the last 4,096 of 20,480 tokens.
        dynamic_sampling: Further rounds of generation before training on what there is.
    """

    def __init__(
        self,
        *args,
        aggregation: ReduceMode = "token-mean",
        clip: Clip = Clip(high=0.28),
        kl: KL = KL(),
        length_penalty: LengthPenalty = LengthPenalty(buffer_tokens=None),
        dynamic_sampling: DynamicSampling = DynamicSampling(max_rounds=20),
        **kwargs,
    ) -> None:
        super().__init__(
            *args,
            aggregation=aggregation,
            clip=clip,
            kl=kl,
            length_penalty=length_penalty,
            dynamic_sampling=dynamic_sampling,
            **kwargs,
        )
