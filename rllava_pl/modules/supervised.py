"""What SFT and DPO share: the loop with given responses, without engine and without reward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rllava_pl.loop.experience import assemble, join_rows, numbered, split
from rllava_pl.modules.demonstrations import DemonstrationModule
from rllava_pl.rewards.output import Judgement
from rllava_pl.types import Experience, PolicyOutput, PromptBatch, Rollout


class SupervisedModule(DemonstrationModule):
    """Learning from given responses alone, in the loop of RL: sampling is reading, judging is trusting.

    Rewards, if given, judge the greedy answers of validation and test; without them no answer is generated there.
    """

    needs_rewards = False
    needs_every_response = True
    demonstrations_apart = False

    def score_rollouts(self, rollouts: Sequence[Rollout]) -> Judgement:
        """Nothing is judged."""
        return Judgement([0.0] * len(rollouts), {}, {})

    def evaluate(self, experience: Experience) -> Experience:
        """Only a reference is asked, where the algorithm has one."""
        if not self.needs_reference:
            return experience
        with self.phase("evaluate"):
            ref = self.score(partial(self.trainer.strategy.model, reference=True), experience)
            return experience.replace(ref_logp_NT=ref.logp_NT)

    def correct(self, loss_NT: Tensor, batch: Experience) -> Tensor:
        """No engine has sampled anything, so there is nothing to correct."""
        return loss_NT

    def observe_samples(self, experience: Experience) -> None:
        """Lengths; there is no reward and no group."""
        self.tally.add_masked("response_tokens", experience.lengths_N.float(), experience.mask_NT.any(1))

    def observe_credit(self, experience: Experience) -> None:
        """There is none."""

    @torch.no_grad()
    def observe_tokens(self, output: PolicyOutput, batch: Experience, loss: Tensor, cut_NT: Tensor) -> None:
        """Negative log-likelihood and entropy of the given tokens."""
        self.tally.add("loss", loss, 0)
        self.tally.add_masked("nll", -output.logp_NT, batch.mask_NT)
        self.tally.add_masked("entropy", output.entropy_NT, batch.mask_NT)

    def _evaluate(self, prompts: PromptBatch, stage: str) -> None:
        if self.rewards:
            super()._evaluate(prompts, stage)
        if len(prompts):
            requests = self.requests(list(prompts), samples=self.group_size, stream=stage)
            rollouts = self.sample(requests)
            experience = assemble(rollouts, self.score_rollouts(rollouts), self.group_size, self.policy.device)
            self.examine_given(experience)

    def examine_given(self, experience: Experience) -> None:
        """Scores of the given responses of one validation batch: ``val/nll``."""
        logp_NT = self.given_logp(self.policy, experience)
        self.scores.add("nll", -logp_NT[experience.mask_NT])

    @torch.no_grad()
    def given_logp(self, policy: torch.nn.Module, experience: Experience) -> Tensor:
        """Log-probs (N, T) without gradients and without talking to other ranks, which may have no rows left."""
        pieces = split(numbered(experience), self.micro_batch_size)
        return join_rows([policy(piece.batch).logp_NT for piece in pieces], pieces, experience.mask_NT)
