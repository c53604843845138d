"""Direct preference optimization."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional import preference
from rllava_pl.loop.optimization import Counts
from rllava_pl.models.vlm import VLM
from rllava_pl.modules.supervised import SupervisedModule
from rllava_pl.rewards.base import BaseReward
from rllava_pl.types import Experience, PolicyOutput, Request, Reward, Rollout


class DPO(SupervisedModule):
    """DPO (arXiv 2305.18290): the better response of a pair gains on the worse one, measured from the reference.

    h = β·[(log π(c) - log π_ref(c)) - (log π(r) - log π_ref(r))], sums over response tokens; loss = -log σ(h), mean
    over the pairs of the mini-batch on all ranks. Needs prompts with ``target`` (chosen) and ``rejected``; both
    responses share the prompt's forward, its images included.

    Args:
        policy: The model to train.
        rewards: For validation and test alone; may be empty.
        beta: β; paper: 0.1.
        label_smoothing: Probability that a pair is labelled the wrong way round.
    """

    given_fields = ("target", "rejected")

    def __init__(
        self,
        policy: VLM,
        rewards: list[BaseReward | Reward] | None = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(policy, rewards or [], group_size=2, aggregation="sequence-mean-token-sum", **kwargs)
        self.beta, self.label_smoothing = beta, label_smoothing

    @property
    def needs_reference(self) -> bool:
        """Always."""
        return True

    def sample(self, requests: list[Request]) -> list[Rollout]:
        """Chosen and rejected of each prompt."""
        return [self.given(r, getattr(r.prompt, field), field) for r in requests for field in self.given_fields]

    def advantages(self, experience: Experience) -> Tensor:
        """There is no credit but the comparison itself, (N,)."""
        return torch.zeros_like(experience.rewards_N)

    def loss(self, output: PolicyOutput, batch: Experience, counts: Counts) -> Tensor:
        """This micro-batch's share of the mean over pairs; each half of a pair counts as one sequence."""
        loss_P, chosen_P, rejected_P = self.compare(output.logp_NT, batch)
        loss = loss_P.sum() / (counts.loss / 2).clamp(min=1)
        self.observe_tokens(output, batch, loss, torch.zeros_like(batch.mask_NT))
        pairs_P = batch.mask_NT.any(1)[::2]
        self.tally.add_all(_scores(chosen_P, rejected_P), pairs_P)
        self.tally.add_masked("chosen_nll", -output.logp_NT[::2], batch.mask_NT[::2])
        return loss

    def compare(self, logp_NT: Tensor, batch: Experience) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and the implicit rewards of chosen and rejected of each pair, (P,) each."""
        sums_N = (logp_NT * batch.mask_NT).sum(1)
        ref_N = (batch.ref_logp_NT * batch.mask_NT).sum(1)
        loss_P, chosen_P, rejected_P = preference.dpo(
            sums_N[::2], sums_N[1::2], ref_N[::2], ref_N[1::2], beta=self.beta, label_smoothing=self.label_smoothing
        )
        return loss_P * batch.mask_NT.any(1)[::2], chosen_P, rejected_P

    def examine_given(self, experience: Experience) -> None:
        """``val/pair_accuracy`` and ``val/margin``: how often and by how much the better response is preferred.

        Also the two rewards and the negative log-likelihood of the better response: both rewards may fall.
        """
        logp_NT = self.given_logp(self.policy, experience)
        with self.policy.adapters_off():
            experience = experience.replace(ref_logp_NT=self.given_logp(self.reference or self.policy, experience))
        _, chosen_P, rejected_P = self.compare(logp_NT, experience)
        for name, values_P in _scores(chosen_P, rejected_P).items():
            self.scores.add(name, values_P)
        self.scores.add("chosen_nll", -logp_NT[::2][experience.mask_NT[::2]])

    def _check_options(self) -> None:
        super()._check_options()
        if self.micro_batch_size % 2:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}; a pair stays together, so it must be even")


def _scores(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    margin_P = chosen_P - rejected_P
    accuracy_P = (margin_P > 0).float()
    return {"margin": margin_P, "pair_accuracy": accuracy_P, "chosen_reward": chosen_P, "rejected_reward": rejected_P}
