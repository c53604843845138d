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
    over the pairs of the mini-batch on all ranks. Needs prompts with ``target`` (chosen) and ``rejected``; both
    responses share the prompt's forward, its images included.

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
        return {"pair": Term(_first_tokens(batch), "token-mean")}

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """-log σ(h) of each pair."""
        loss_P, chosen_P, rejected_P = self.compare(output.logp_NT, batch)
        pairs_P, chosen_NT = batch.trained_mask_NT.any(1)[::2], batch.trained_mask_NT[::2]
        self.metrics.add_masked(_pair_metrics(chosen_P, rejected_P), pairs_P)
        self.metrics.add_masked({"chosen_nll": -output.logp_NT[::2]}, chosen_NT)
        tokens = {"nll": -output.logp_NT, "entropy": output.entropy_NT}
        self.metrics.add_masked(tokens, batch.trained_mask_NT)
        return {"pair": loss_P.repeat_interleave(2)[:, None] * _first_tokens(batch)}

    def compare(self, logp_NT: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and the implicit rewards of chosen and rejected of each pair, (P,) each."""
        sums_N = (logp_NT * batch.trained_mask_NT).sum(1)
        ref_N = (batch.ref_logp_NT * batch.trained_mask_NT).sum(1)
        return preference.dpo(
            sums_N[::2], sums_N[1::2], ref_N[::2], ref_N[1::2], beta=self.beta, label_smoothing=self.label_smoothing
        )

    def evaluate_given(self, batch: TrainingBatch) -> None:
        """``val/pair_accuracy`` and ``val/margin``: how often and by how much the better response is preferred.

        Also the two rewards and the negative log-likelihood of the better response: both rewards may fall.
        """
        logp_NT = self.given_logp(self.policy, batch)
        if self.reference is not None:
            batch = batch.with_computed(ref_logp_NT=self.given_logp(self.reference, batch))
        else:
            with self.policy.adapters_off():
                batch = batch.with_computed(ref_logp_NT=self.given_logp(self.policy, batch))
        _, chosen_P, rejected_P = self.compare(logp_NT, batch)
        for name, values_P in _pair_metrics(chosen_P, rejected_P).items():
            self.evaluator.scores.add(name, values_P)
        self.evaluator.scores.add("chosen_nll", -logp_NT[::2][batch.trained_mask_NT[::2]])


def _first_tokens(batch: TrainingBatch) -> Tensor:
    """Bool (N, T): the first token of the chosen response of each pair that is trained."""
    first_NT = torch.zeros_like(batch.trained_mask_NT)
    first_NT[::2, 0] = batch.trained_mask_NT[::2].any(1)
    return first_NT


def _pair_metrics(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    margin_P = chosen_P - rejected_P
    accuracy_P = (margin_P > 0).float()
    return {"margin": margin_P, "pair_accuracy": accuracy_P, "chosen_reward": chosen_P, "rejected_reward": rejected_P}
