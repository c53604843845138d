"""KL-Cov."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.modules.covariance import CovarianceModule
from rllava_pl.types import TrainingBatch

log = logging.getLogger(__name__)


class KLCov(CovarianceModule):
    """KL-Cov (arXiv 2505.22617): keeps entropy by a penalty on the few tokens that reduce it most.

    loss = -A·ρ, plus β·|log ρ| on the ``ratio`` of tokens with the largest cov(log π, A). GRPO's advantages, mean over
    tokens, no other KL. At π = π_old the penalty's gradient is 0, so it needs two updates a rollout or more.

    Args:
        ratio: Tokens with the penalty, as a fraction of the mini-batch's.
        beta: Weight of the penalty.
    """

    def __init__(self, *args, ratio: float = 2e-3, beta: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.ratio, self.beta = ratio, beta
        if self.batching.updates_per_rollout == 1:
            log.warning(
                "KLCov with one update a rollout is plain policy gradient: raise batching.num_minibatches or "
                "batching.update_epochs"
            )

    def select(self, minibatch: TrainingBatch) -> Tensor:
        """The tokens of largest covariance."""
        old_logp_NT, mask_NT = minibatch.old_logp_NT, minibatch.trained_mask_NT
        return losses.kl_cov_select(old_logp_NT, minibatch.advantages_NT, mask_NT, ratio=self.ratio)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """-A·ρ, and the penalty on the selected tokens from the second update of a rollout batch on.

        Before, log ρ is nothing but rounding, and the gradient of |log ρ| would be its sign: ±β by chance.
        """
        first = self.state.before_first_update
        return losses.kl_cov(
            logp_NT,
            batch.old_logp_NT,
            batch.advantages_NT,
            batch.trained_mask_NT,
            beta=self.beta,
            selected_NT=torch.zeros_like(batch.trained_mask_NT) if first else batch.selected_NT,
        )
