"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.modules.supervised import SupervisedModule
from rllava_pl.types import PolicyOutput, Term, TrainingBatch


class SFT(SupervisedModule):
    """SFT: loss = -log π(target), mean over the target tokens of the mini-batch on all ranks.

    It is the corner of RL where every response is given and every advantage is 1. Needs prompts with a ``target``; no
    engine and no reward. The negative log-likelihood of the targets is also reported in validation and test.

    Args:
        aggregation: How per-token losses become one number, over the mini-batch of all ranks.
    """

    def __init__(self, *args, aggregation: ReduceMode = "token-mean", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.aggregation = aggregation

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """The policy's loss on the targets."""
        return {"policy": Term(batch.trained_mask_NT, self.aggregation)}

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """-log π."""
        self.log_tokens(output, batch)
        return {"policy": losses.reinforce(output.logp_NT, batch.advantages_NT)}
