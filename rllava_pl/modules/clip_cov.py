"""Clip-Cov."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.functional.seeds import seed_from
from rllava_pl.loop.options import Clip
from rllava_pl.modules.covariance import CovarianceModule
from rllava_pl.types import TrainingBatch


class ClipCov(CovarianceModule):
    """Clip-Cov (arXiv 2505.22617): keeps entropy by masking out a few of the tokens that reduce it most.

    Entropy falls with cov(log π, A). Of the tokens whose covariance lies between ``lower`` and ``upper`` a random part,
    ``ratio`` of all tokens, gets no gradient. GRPO's advantages, mean over tokens, no KL.

    Args:
        ratio: Tokens masked out, as a fraction of the mini-batch's.
        lower: Tokens with a smaller covariance are not selected.
        upper: Tokens with a larger covariance are not selected.
        clip: Paper: 1 on both sides, so that the ratio is not clipped below.
    """

    def __init__(
        self,
        *args,
        ratio: float = 2e-4,
        lower: float = 1.0,
        upper: float = 5.0,
        clip: Clip = Clip(low=1.0, high=1.0),
        **kwargs,
    ) -> None:
        super().__init__(*args, clip=clip, **kwargs)
        self.ratio, self.lower, self.upper = ratio, lower, upper

    def select(self, minibatch: TrainingBatch) -> Tensor:
        """A random part of the tokens of high covariance."""
        seed = seed_from(self.seed, "clip_cov", self.state.updates)
        old_logp_NT = minibatch.old_logp_NT
        return losses.clip_cov_select(
            *(old_logp_NT, old_logp_NT, minibatch.advantages_NT, minibatch.trained_mask_NT),
            **self.clip.range,
            ratio=self.ratio,
            lower=self.lower,
            upper=self.upper,
            generator=torch.Generator(old_logp_NT.device).manual_seed(seed),
        )

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Clipped surrogate, 0 on the selected tokens."""
        inputs = (logp_NT, batch.old_logp_NT, batch.advantages_NT, batch.trained_mask_NT)
        low, high = self.clip.low, self.clip.high
        return losses.clip_cov(*inputs, clip_low=low, clip_high=high, selected_NT=batch.selected_NT)
