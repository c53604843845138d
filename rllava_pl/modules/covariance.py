"""What Clip-Cov and KL-Cov share: tokens are chosen once, over the mini-batch of all ranks."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.modules.grpo import GRPO
from rllava_pl.modules.loop.experience import over_ranks
from rllava_pl.types import Experience


class CovarianceModule(GRPO):
    """GRPO whose loss treats some tokens apart, chosen by their covariance between log-prob and advantage.

    The means in the covariance and the number of tokens belong to the whole mini-batch. Chosen within micro-batches,
    they would depend on their size, and at least one token of each would be chosen, however small the ratio.

    Args:
        aggregation: Paper: mean over tokens.
        kl_loss_coef: Paper: no KL term.
    """

    needs_old_logp: ClassVar[bool] = True

    def __init__(
        self,
        *args,  # noqa: ANN002
        aggregation: ReduceMode = "token-mean",
        kl_loss_coef: float = 0.0,
        **kwargs,  # noqa: ANN003
    ) -> None:
        super().__init__(*args, aggregation=aggregation, kl_loss_coef=kl_loss_coef, **kwargs)

    def select_tokens(self, minibatch: Experience) -> Tensor:
        """Bool (N, T): the tokens to treat apart, from a mini-batch of all ranks."""
        raise NotImplementedError

    def update(self, minibatch: Experience) -> None:
        """Choose, then update."""
        everyone, own = over_ranks(minibatch)
        selected_NT = self.select_tokens(everyone)[own, : minibatch.mask_NT.shape[1]]
        self.tally.add_masked("selected_fraction", selected_NT.float(), minibatch.mask_NT)
        super().update(minibatch.replace(selected_NT=selected_NT))
