"""Soft adaptive policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.loop.options import KL
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import TrainingBatch


class SAPO(GRPO):
    """SAPO (arXiv 2511.20347), which trained Qwen3-VL: a sigmoid in the place of a hard clip.

    loss = -A·(4/τ)·σ(τ·(ρ - 1)). At ρ = 1 the gradient is that of REINFORCE; away from it, it fades instead of ending.
    Bad tokens (A < 0) get the larger τ, because their gradient spreads over the whole vocabulary.

    Args:
        temperature_positive: τ where A > 0; paper: 1.
        temperature_negative: τ elsewhere; paper: 1.05.
        kl: Paper: no KL term.
    """

    def __init__(
        self,
        *args,
        temperature_positive: float = 1.0,
        temperature_negative: float = 1.05,
        kl: KL = KL(),
        **kwargs,
    ) -> None:
        super().__init__(*args, kl=kl, **kwargs)
        self.temperature_positive, self.temperature_negative = temperature_positive, temperature_negative

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """The soft gate, on every token."""
        return losses.sapo(
            logp_NT,
            batch.old_logp_NT,
            batch.advantages_NT,
            temperature_positive=self.temperature_positive,
            temperature_negative=self.temperature_negative,
        )
