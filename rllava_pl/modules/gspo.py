"""Group sequence policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.loop.options import KL, Clip
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import TrainingBatch


class GSPO(GRPO):
    """GSPO (arXiv 2507.18071): one ratio a sequence, because rewards belong to sequences.

    s_i = exp(mean over t of log ρ_it); loss = -min(A·s, A·clip(s, 1-ε_low, 1+ε_high)), with the gradient through each
    token's own log-prob. A mean over tokens moves far less than a token, so the range is three orders of magnitude
    narrower than PPO's.

    Args:
        clip: Paper: 3e-4 below and 4e-4 above.
        kl: Paper: no KL term.
    """

    def __init__(self, *args, clip: Clip = Clip(low=3e-4, high=4e-4), kl: KL = KL(), **kwargs) -> None:
        super().__init__(*args, clip=clip, kl=kl, **kwargs)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Clipped surrogate of the sequence's ratio, on every token."""
        return losses.gspo(logp_NT, batch.old_logp_NT, batch.advantages_NT, batch.trained_mask_NT, **self.clip.range)
