"""Clip-Cov."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.functional.seeds import seed_from
from rllava_pl.modules.covariance import CovarianceModule
from rllava_pl.types import Experience


class ClipCov(CovarianceModule):
    """Clip-Cov (arXiv 2505.22617): keeps entropy by silencing a few of the tokens that eat it.

    Entropy falls with cov(log π, A). Of the tokens whose covariance lies between ``lower`` and ``upper`` a random part,
    ``ratio`` of all tokens, gets no gradient. GRPO's advantages, mean over tokens, no KL.

    Args:
        ratio: Tokens silenced, as a part of the mini-batch's.
        lower: Tokens with a smaller covariance are left alone.
        upper: And those with a larger one.
        clip_low: Paper: 1, so that the ratio is not clipped below.
        clip_high: Paper: 1.
    """

    def __init__(
        self,
        *args,
        ratio: float = 2e-4,
        lower: float = 1.0,
        upper: float = 5.0,
        clip_low: float = 1.0,
        clip_high: float = 1.0,
        **kwargs,
    ) -> None:
        super().__init__(*args, clip_low=clip_low, clip_high=clip_high, **kwargs)
        self.ratio, self.lower, self.upper = ratio, lower, upper

    def select_tokens(self, minibatch: Experience) -> Tensor:
        """A random part of the tokens of high covariance."""
        seed = seed_from(self.seed, "clip_cov", self.weight_version)
        return losses.clip_cov_select(
            minibatch.old_logp_NT,
            minibatch.old_logp_NT,
            minibatch.advantages_NT,
            minibatch.mask_NT,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio=self.ratio,
            lower=self.lower,
            upper=self.upper,
            generator=torch.Generator(minibatch.mask_NT.device).manual_seed(seed),
        )

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """Clipped surrogate, 0 on the selected tokens."""
        return losses.clip_cov(
            logp_NT,
            batch.old_logp_NT,
            batch.advantages_NT,
            batch.mask_NT,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            selected_NT=batch.selected_NT,
        )
