"""What algorithms that learn from demonstrations beside rollouts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from torch import Tensor

from rllava_pl.loop.batch import interleave
from rllava_pl.loop.given_responses import check_given_responses, given_rollout
from rllava_pl.modules.base import RLModule
from rllava_pl.types import PolicyOutput, PromptBatch, Request, Rollout, ScoredBatch, Term, TrainingBatch


def mixed_inputs(batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What functions of ``functional.demonstrations`` take after the log-probs: old ones, advantages and two masks."""
    return batch.old_logp_NT, batch.advantages_NT, batch.trained_mask_NT, batch.given_mask_NT


class DemonstrationModule(RLModule):
    """RL beside demonstrations: the ``target`` of a prompt, where it has one, tokenised and closed by the end token.

    The loss has a term more, "imitation": the policy loss of given tokens, a mean over theirs. With one denominator for
    sampled and given tokens the weight of a demonstration would depend on how long it happens to be.
    """

    imitation_term: ClassVar[bool] = True
    """False where given tokens share the denominator of the sampled ones."""
    given_metric: ClassVar[str] = "demonstration_fraction"
    """Name of the metric for the fraction of trained tokens that were given."""

    def on_fit_start(self) -> None:
        """Check the given responses of data sets from files: none may exceed the budget."""
        super().on_fit_start()
        rows = getattr(getattr(self.trainer, "datamodule", None), "train_prompts", None)
        name, budget = type(self).__name__, self.sampling.max_tokens
        check_given_responses(rows, ["target"], self.policy, budget, owner=name, required=False)

    def given(self, request: Request, *, in_baseline: bool = True) -> Rollout:
        """The target of a request's prompt as a rollout; errors as of ``given_rollout``."""
        return given_rollout(self.policy, request, "target", self.sampling.max_tokens, in_baseline=in_baseline)

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """Also how many of the trained tokens were given."""
        batch = super().score(rollouts)
        self.metrics.add_masked({self.given_metric: batch.given_mask_NT.float()}, batch.trained_mask_NT)
        return batch

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """The terms of RL on sampled tokens, and imitation of the given ones."""
        terms = super().terms(batch)
        if not self.imitation_term:
            return terms
        sampled = {
            name: dataclasses.replace(terms[name], mask_NT=batch.own_mask_NT) for name in terms.keys() - {"entropy"}
        }
        return terms | sampled | {"imitation": Term(batch.given_mask_NT, "token-mean")}

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """The policy loss of given tokens is the imitation term."""
        losses = super().losses(output, batch)
        return losses | {"imitation": losses["policy"]}


class MixedGroupModule(DemonstrationModule):
    """The demonstration is one of the group: scored like the others, and part of the mean they are compared with."""

    needs_groups = True

    def sample(self, prompts: PromptBatch) -> list[Rollout]:
        """``group_size`` - 1 samples and the demonstration of prompts that have one, ``group_size`` samples else."""
        requests = self.requests(prompts, samples=self.group_size, stream="train")
        asked = [dataclasses.replace(r, seeds=r.seeds[:-1]) if r.prompt.target else r for r in requests]
        sampled = iter(self.engine.generate(asked, self.sampling))
        return [
            rollout
            for r in asked
            for rollout in (
                *islice(sampled, len(r.seeds)),
                *([self.given(r)] if r.prompt.target else []),
            )
        ]


class BesideGroupModule(DemonstrationModule):
    """The demonstration stands beside the group: trained on, but not part of the mean.

    It is one more row. A prompt without demonstration repeats its first sample there, which is not trained.
    """

    needs_groups = True
    extra_rows = 1

    def sample(self, prompts: PromptBatch) -> list[Rollout]:
        """``group_size`` samples, then the demonstration or a row that is not trained."""
        requests = self.requests(prompts, samples=self.group_size, stream="train")
        sampled = self.engine.generate(requests, self.sampling)
        beside = [self._beside(r, sampled[p * self.group_size]) for p, r in enumerate(requests)]
        return interleave(sampled, beside, self.group_size)

    def _beside(self, request: Request, sample: Rollout) -> Rollout:
        if request.prompt.target:
            return self.given(request, in_baseline=False)
        return dataclasses.replace(sample, in_baseline=False, trained=False)
