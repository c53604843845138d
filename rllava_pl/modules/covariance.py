"""What Clip-Cov and KL-Cov share: tokens are chosen once, over the mini-batch of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import row_gatherer
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.functional.seeds import seed_from
from rllava_pl.loop.experience import over_ranks
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import Experience


class CovarianceModule(GRPO):
    """GRPO whose loss treats some tokens apart, chosen by their covariance between log-prob and advantage.

    The means in the covariance and the number of tokens belong to the whole mini-batch. Chosen within micro-batches,
    they would depend on their size, and at least one token of each would be chosen, however small the ratio.

    Args:
        aggregation: Paper: mean over tokens.
        kl_loss_coef: Paper: no KL term.
    """

    needs_old_logp = True

    def __init__(self, *args, aggregation: ReduceMode = "token-mean", kl_loss_coef: float = 0.0, **kwargs) -> None:
        super().__init__(*args, aggregation=aggregation, kl_loss_coef=kl_loss_coef, **kwargs)

    def select_tokens(self, minibatch: Experience) -> Tensor:
        """Bool (N, T): the tokens to treat apart, from a mini-batch of all ranks."""
        raise NotImplementedError

    def update(self, minibatch: Experience) -> None:
        """Choose, then update."""
        everyone, own = over_ranks(minibatch)
        order_N = _order_over_ranks(minibatch)
        selected_NT = torch.empty_like(everyone.mask_NT)
        selected_NT[order_N] = self.select_tokens(everyone.map(lambda x: x[order_N]))
        selected_NT = selected_NT[own, : minibatch.mask_NT.shape[1]]
        self.tally.add_masked("selected_fraction", selected_NT.float(), minibatch.mask_NT)
        super().update(minibatch.replace(selected_NT=selected_NT))


def _order_over_ranks(minibatch: Experience) -> Tensor:
    """(N,): the rows of all ranks in an order that depends on prompts and samples alone.

    Draws and ties go by position, which would otherwise differ with the number of ranks.
    """
    rows = enumerate(minibatch.rollouts)
    keys = [seed_from(rollout.prompt.uid, row % minibatch.group_size) for row, rollout in rows]
    device = minibatch.mask_NT.device
    gather, _ = row_gatherer(len(keys), device)
    return gather(torch.tensor(keys, dtype=torch.int64, device=device)).argsort(stable=True)
