"""What SFT and DPO share: updates on responses that the data give, without engine and without reward."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from rllava_pl.loop import observe
from rllava_pl.loop.batch import assemble
from rllava_pl.loop.checks import check_batch_size
from rllava_pl.loop.given_responses import check_given_responses, given_rollout
from rllava_pl.loop.micro_batches import join_rows, numbered
from rllava_pl.loop.penalties import penalize
from rllava_pl.models.vlm import VLM
from rllava_pl.modules.policy_module import PolicyModule
from rllava_pl.rewards import BaseReward, RewardOutput
from rllava_pl.types import PolicyOutput, Prompt, PromptBatch, Reward, TrainingBatch


class SupervisedModule(PolicyModule):
    """Supervised training on the responses of the data.

    Rewards, if given, score the greedy answers of validation and test; without them no answer is generated there.

    Args:
        policy: The model to train.
        rewards: For validation and test alone; may be empty.
    """

    needs_rewards = False
    given_fields: ClassVar[tuple[str, ...]] = ("target",)
    """Fields of a prompt that hold its responses, one row each."""

    def __init__(self, policy: VLM, rewards: list[BaseReward | Reward] | None = None, **kwargs) -> None:
        super().__init__(policy, rewards or [], **kwargs)
        self.group_size = len(self.given_fields)

    def on_fit_start(self) -> None:
        """Check the responses of data sets from files: none may be missing or exceed the budget."""
        super().on_fit_start()
        rows = getattr(getattr(self.trainer, "datamodule", None), "train_prompts", None)
        name, budget = type(self).__name__, self.sampling.max_tokens
        check_given_responses(rows, self.given_fields, self.policy, budget, owner=name, required=True)

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """One pass: given responses, reference log-probs where a loss needs them, updates, metrics."""
        check_batch_size(len(prompts), self.group_size, self.batching.num_minibatches)
        with self.phases("rollout"):
            self.state.sampled_at = self.state.updates
            batch = self.given_batch(list(prompts), "train")
        if self.needs_reference:
            with self.phases("logprobs"):
                model = partial(self.updater.adapter.model, reference=True, entropy=False)
                batch = batch.with_computed(ref_logp_NT=self.updater.forward(model, batch).logp_NT)
        for minibatch in self.minibatches(batch):
            with self.phases("update"):
                self.updater.step(minibatch, self.terms, self.losses)
        lengths_N = batch.trained_mask_NT.sum(1).float()
        self.metrics.add_masked({"response_tokens": lengths_N}, lengths_N > 0)
        metrics = observe.rollout_metrics(self.metrics, self.phases)
        observe.publish(metrics, self, step=self.state.rollouts)
        self.health.check(metrics)
        self.state.rollouts += 1

    def given_batch(self, prompts: list[Prompt], stream: str) -> TrainingBatch:
        """The responses of the data as a batch in which every token has advantage 1."""
        budget = self.sampling.max_tokens
        requests = self.requests(prompts, samples=1, stream=stream)
        rollouts = [given_rollout(self.policy, r, field, budget) for r in requests for field in self.given_fields]
        scored = assemble(rollouts, RewardOutput([0.0] * len(rollouts), {}, {}), self.group_size, self.policy.device)
        rewarded = penalize(scored, None, kl_coef=0.0)
        return rewarded.to_stage(TrainingBatch, advantages_NT=rewarded.trained_mask_NT.float())

    def log_tokens(self, output: PolicyOutput, batch: TrainingBatch) -> None:
        """Negative log-likelihood and entropy of the given tokens of a micro-batch."""
        self.metrics.add_masked({"nll": -output.logp_NT, "entropy": output.entropy_NT}, batch.trained_mask_NT)

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Score greedy answers where there are rewards, and the given responses."""
        if self.rewards:
            super().validation_step(prompts, batch_idx)
        if len(prompts):
            self.evaluate_given(self.given_batch(list(prompts), "val"))

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Score greedy answers where there are rewards, and the given responses."""
        if self.rewards:
            super().test_step(prompts, batch_idx)
        if len(prompts):
            self.evaluate_given(self.given_batch(list(prompts), "test"))

    def evaluate_given(self, batch: TrainingBatch) -> None:
        """Scores of the given responses of one validation batch: ``val/nll``."""
        logp_NT = self.given_logp(batch)
        self.evaluator.scores.add("nll", -logp_NT[batch.trained_mask_NT])

    @torch.no_grad()
    def given_logp(self, batch: TrainingBatch, *, reference: bool = False) -> Tensor:
        """Log-probs (N, T) without communication: other ranks may have no rows left."""
        runner = self.updater.micro_batches
        parts = runner.split(numbered(batch), runner.size or len(batch))
        outputs = [self.forward(part.policy_batch(), reference=reference, entropy=False).logp_NT for part in parts]
        return join_rows(outputs, parts, batch.trained_mask_NT)
