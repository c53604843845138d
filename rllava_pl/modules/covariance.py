"""What Clip-Cov and KL-Cov share."""

from __future__ import annotations

from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import KL
from rllava_pl.modules.grpo import GRPO


class CovarianceModule(GRPO):
    """GRPO whose loss treats tokens differently that are selected by their covariance of log-prob and advantage.

    ``select`` sees the mini-batch of all ranks: the means in the covariance and the number of selected tokens belong to
    it. Selected within micro-batches, at least one token of each would be, however small the ratio.

    Args:
        aggregation: Paper: mean over tokens.
        kl: Paper: no KL term.
    """

    needs_old_logp = True

    def __init__(self, *args, aggregation: ReduceMode = "token-mean", kl: KL = KL(), **kwargs) -> None:
        super().__init__(*args, aggregation=aggregation, kl=kl, **kwargs)
