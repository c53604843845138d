"""Direct preference optimization."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional import preference
from rllava_pl.modules.supervised import SupervisedModule
from rllava_pl.types import PolicyOutput, Term, TrainingBatch


class DPO(SupervisedModule):
    """DPO (arXiv 2305.18290): the better response of a pair gains on the worse one, measured from the reference.

    h = β·[(log π(c) - log π_ref(c)) - (log π(r) - log π_ref(r))], sums over response tokens; loss = -log σ(h), mean
    over the pairs of the mini-batch on all ranks. Needs prompts with ``target`` (chosen) and ``rejected``.

    Args:
        beta: β; paper: 0.1.
        label_smoothing: Probability that a pair is labelled the wrong way round.
    """

    given_fields = ("target", "rejected")
    needs_reference = True
    rows_together = 2

    def __init__(self, *args, beta: float = 0.1, label_smoothing: float = 0.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.beta, self.label_smoothing = beta, label_smoothing

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """A mean over pairs: the loss of a pair stands on the first token of the chosen response."""
        first_NT = torch.zeros_like(batch.trained_mask_NT)
        first_NT[::2, 0] = batch.trained_mask_NT[::2].any(1)
        return {"pair": Term(first_NT, "token-mean")}

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """-log σ(h) of each pair."""
        loss_P, chosen_P, rejected_P = self.compare(output.logp_NT, batch)
        self.log_tokens(output, batch)
        mask_NT = batch.trained_mask_NT
        self.metrics.add_masked(preference.pair_metrics(chosen_P, rejected_P), mask_NT[::2].any(1))
        self.metrics.add_masked({"chosen_nll": -output.logp_NT[::2]}, mask_NT[::2])
        return {"pair": loss_P.repeat_interleave(2)[:, None].expand_as(mask_NT)}

    def compare(self, logp_NT: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and the implicit rewards of chosen and rejected of each pair, (P,) each."""
        sums_N, ref_N = ((x_NT * batch.trained_mask_NT).sum(1) for x_NT in (logp_NT, batch.ref_logp_NT))
        pairs = (sums_N[::2], sums_N[1::2], ref_N[::2], ref_N[1::2])
        return preference.dpo(*pairs, beta=self.beta, label_smoothing=self.label_smoothing)

    def evaluate_given(self, batch: TrainingBatch) -> None:
        """``val/pair_accuracy``, ``val/margin``, and both rewards and the nll of the chosen: both rewards may fall."""
        logp_NT = self.given_logp(batch)
        batch = batch.with_computed(ref_logp_NT=self.given_logp(batch, reference=True))
        for name, values_P in preference.pair_metrics(*self.compare(logp_NT, batch)[1:]).items():
            self.evaluator.scores.add(name, values_P)
        self.evaluator.scores.add("chosen_nll", -logp_NT[::2][batch.trained_mask_NT[::2]])
