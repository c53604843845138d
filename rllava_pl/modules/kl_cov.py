"""KL-Cov."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.modules.covariance import CovarianceModule
from rllava_pl.types import Experience

log = logging.getLogger(__name__)


class KLCov(CovarianceModule):
    """KL-Cov (arXiv 2505.22617): keeps entropy by holding back the few tokens that eat it.

    loss = -A·ρ, plus β·|log ρ| on the ``ratio`` of tokens with the largest cov(log π, A). GRPO's advantages, mean over
    tokens, no other KL. At π = π_old the penalty's gradient is 0, so it needs two updates a rollout or more.

    Args:
        ratio: Tokens held back, as a part of the mini-batch's.
        beta: Weight of their penalty.
    """

    def __init__(self, *args, ratio: float = 2e-3, beta: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.ratio, self.beta = ratio, beta

    def _check_options(self) -> None:
        super()._check_options()
        if self.updates_per_rollout == 1:
            log.warning("KLCov with one update a rollout is plain policy gradient: raise minibatches or epochs")

    def select_tokens(self, minibatch: Experience) -> Tensor:
        """The tokens of largest covariance."""
        return losses.kl_cov_select(minibatch.old_logp_NT, minibatch.advantages_NT, minibatch.mask_NT, ratio=self.ratio)

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """-A·ρ, and the penalty on the selected tokens once the policy has moved.

        Before, log ρ is nothing but rounding, and the gradient of |log ρ| would be its sign: ±β by chance.
        """
        return losses.kl_cov(
            logp_NT,
            batch.old_logp_NT,
            batch.advantages_NT,
            batch.mask_NT,
            beta=self.beta,
            selected_NT=torch.zeros_like(batch.mask_NT) if self.first_update else batch.selected_NT,
        )
