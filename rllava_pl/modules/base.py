"""The RL loop as a LightningModule: rollout, judge, evaluate, credit, update, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from rllava_pl.functional.kl import kl_estimate
from rllava_pl.functional.losses import clipped
from rllava_pl.functional.reduce import reduce_loss
from rllava_pl.functional.rewards import informative_groups
from rllava_pl.functional.seeds import permutation, seed_from
from rllava_pl.modules.evaluation import Evaluation
from rllava_pl.modules.experience import assemble, join_rows, microbatches, minibatches, over_ranks
from rllava_pl.modules.optimization import Optimization
from rllava_pl.modules.tally import Tally
from rllava_pl.rewards.base import judge
from rllava_pl.strategies import updates
from rllava_pl.strategies.collectives import world_size
from rllava_pl.types import Experience, PolicyBatch, PolicyOutput, PromptBatch, Rollout


class RLModule(Optimization, Evaluation):
    """One RL algorithm on a vision-language model; one ``training_step`` is one pass of the loop.

    Subclasses say how credit is assigned (``advantages``) and, where it is not PPO's clipped surrogate, how the policy
    is pulled (``policy_loss``). ``Trainer(max_steps=...)`` counts optimizer steps; ``max_rollouts`` counts passes.

    Args:
        policy: The model to train.
        rewards: Judges of the completions; the reward is the sum of weight x value.
        group_size: Completions sampled of each prompt.
        sampling: Response budget and temperature.
        max_rollouts: Passes of the loop in the run; the learning-rate schedule ends with it. 0: until the Trainer
            stops.
        minibatches: Optimizer steps a rollout batch is split into.
        epochs: Times each rollout batch is gone through.
        micro_batch_size: Completions in one forward and backward; 0: all of a mini-batch. Never changes the gradient.
        optimizer: Over the trainable parameters.
        lr_schedule: After the warm-up: constant, or decay over ``max_rollouts`` to ``final_lr_ratio`` of the peak.
        warmup_steps: Optimizer steps in which the learning rate rises linearly to its peak.
        final_lr_ratio: Where linear and cosine schedules end, as a part of the peak.
        max_grad_norm: Gradients are scaled down to this global L2 norm.
        aggregation: How per-token losses become one number, over the mini-batch of all ranks.
        clip_low: Ratios below 1 - clip_low are not pushed further down.
        clip_high: Ratios above 1 + clip_high are not pushed further up.
        kl_loss_coef: Weight of the KL divergence to the reference policy in the loss; 0 loads no reference.
        kl_reward_coef: Weight of the KL divergence (k1, summed over the response) subtracted from the reward.
        kl_estimator: Form of the KL term in the loss.
        entropy_coef: Weight of the entropy bonus.
        val_samples: Samples drawn of each prompt in validation and test beside the greedy one; 0: greedy only.
        seed: Of sampling and of the order of mini-batches; the CLI links it to ``seed_everything``.
    """

    # -- the loop ----------------------------------------------------------------------------------------------------

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """One pass: sample, judge, evaluate, assign credit, update, report."""
        self._check_batch(prompts)
        rollouts = self.rollout(prompts)
        experience = self.judge(rollouts)
        experience = self.evaluate(experience)
        experience = self.credit(experience)
        for minibatch in self.minibatches(experience):
            self.update(minibatch)
        self.report(experience)

    def rollout(self, prompts: PromptBatch) -> list[Rollout]:
        """``group_size`` completions of every prompt from the engine."""
        with self.phase("rollout"):
            requests = self.requests(list(prompts), samples=self.group_size, stream="train")
            self.rollout_version = self.weight_version
            return self.engine.generate(requests, self.sampling)

    def judge(self, rollouts: Sequence[Rollout]) -> Experience:
        """Rewards; groups with a sample that could not be scored are dropped and counted."""
        with self.phase("reward"):
            judgement = judge(self.rewards, rollouts)
            device = self.policy.device
            unscored = torch.tensor(sum(judgement.causes.values()), device=device)
            self.tally.add("unscored_samples", unscored, 1 / world_size())  # a total, not a mean over ranks
            return assemble(rollouts, judgement, self.group_size, device)

    def evaluate(self, experience: Experience) -> Experience:
        """Log-probs of the sampled tokens under the sampling policy and the reference, as far as they are needed.

        Old log-probs are the engine's where it shares weights and arithmetic with the trainer (``engine.exact``). Else
        they are computed here; with a single update a rollout not even that: the update's own forward gives them.
        """
        with self.phase("evaluate"):
            old = ref = None
            if self.engine.exact:
                old = experience.engine_logp_NT
            elif self.updates_per_rollout > 1 or self.kl_reward_coef:
                old = self.score(self.trainer.strategy.model, experience)
            if self.needs_reference:
                with self.policy.adapters_off():
                    ref = self.score(self.reference or self.trainer.strategy.model, experience)
            return experience.replace(old_logp_NT=old, ref_logp_NT=ref)

    def credit(self, experience: Experience) -> Experience:
        """Advantages, from the rollout batch of all ranks."""
        everyone, own = over_ranks(self.penalise(experience))
        advantages = self.advantages(everyone)
        advantages_NT = advantages[:, None].expand(everyone.mask_NT.shape) if advantages.ndim == 1 else advantages
        width = experience.mask_NT.shape[1]
        return experience.replace(advantages_NT=advantages_NT[own, :width].masked_fill(~experience.mask_NT, 0.0))

    def minibatches(self, experience: Experience) -> Iterator[Experience]:
        """Mini-batches of whole groups, in an order that depends on seed, rollout and epoch alone."""
        for epoch in range(self.epochs):
            seed = seed_from(self.seed, "minibatches", self.rollout_index, epoch)
            order = list(permutation(seed, len(experience.inputs)))
            yield from minibatches(experience, self.num_minibatches, order)

    def update(self, minibatch: Experience) -> None:
        """One optimizer step; the loss is normalised by counts of the whole mini-batch over all ranks."""
        with self.phase("update"):
            loss_count, token_count = self.denominators(minibatch).unbind()
            if token_count == 0:  # nothing to learn from on any rank: all ranks leave together
                return
            pieces = microbatches(minibatch, self.micro_batch_size)
            for k, piece in enumerate(pieces):
                with updates.micro_batch(self.trainer.strategy, last=k == len(pieces) - 1):
                    loss = self.loss(self.trainer.strategy.model(piece.batch), piece, loss_count, token_count)
                    self.manual_backward(loss * world_size())  # gradients are averaged over ranks, the loss is a sum
            self.step()

    def report(self, experience: Experience) -> None:
        """Log the pass: means over all ranks, and seconds a phase."""
        tally, counted_N = self.tally, experience.mask_NT.any(1)  # a silenced group counts nowhere
        truncated = [rollout.finish_reason == "length" for rollout in experience.rollouts]
        samples = {
            "reward": experience.rewards_N,
            **{f"reward/{name}": values_N for name, values_N in experience.components.items()},
            "response_tokens": experience.lengths_N,
            "truncated_fraction": torch.tensor(truncated, device=counted_N.device),
            "informative_groups": informative_groups(experience.rewards_N, experience.group_N),
        }
        for name, values_N in samples.items():
            tally.add_masked(name, values_N.float(), counted_N)
        metrics = {f"train/{name}": value for name, value in tally.means().items()}
        metrics |= {f"time/{name}_seconds": value for name, value in self.seconds.items()}
        self.publish(metrics)
        self.tally = Tally()
        self.seconds.clear()
        self.rollouts_done += 1

    # -- what an algorithm decides -----------------------------------------------------------------------------------

    def advantages(self, experience: Experience) -> Tensor:
        """Credit of each sample (N,) or token (N, T), from the gathered batch of all ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages(self, experience)")

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """Loss of every token, to be minimised, before aggregation; by default the clipped surrogate of PPO."""
        return clipped(
            logp_NT, batch.old_logp_NT, batch.advantages_NT, clip_low=self.clip_low, clip_high=self.clip_high
        )

    # -- its parts ---------------------------------------------------------------------------------------------------

    def forward(self, batch: PolicyBatch) -> PolicyOutput:
        """Log-probs and entropies of the response tokens; what sharding wrappers wrap."""
        return self.policy(batch)

    @torch.no_grad()
    def score(self, policy: torch.nn.Module, experience: Experience) -> Tensor:
        """Log-probs (N, T) of an experience under ``policy``, without gradients."""
        pieces = microbatches(experience, self.micro_batch_size)
        logp = [policy(piece.batch).logp_NT for piece in pieces]
        return join_rows(logp, experience.mask_NT.shape[1])[: len(experience)]

    def penalise(self, experience: Experience) -> Experience:
        """Subtract the KL divergence to the reference from the reward: r - β · Σ_t m·(log π_old - log π_ref)."""
        if not self.kl_reward_coef:
            return experience
        divergence_N = ((experience.old_logp_NT - experience.ref_logp_NT) * experience.mask_NT).sum(1)
        return experience.replace(rewards_N=experience.rewards_N - self.kl_reward_coef * divergence_N)

    def loss(self, output: PolicyOutput, batch: Experience, loss_count: Tensor, token_count: Tensor) -> Tensor:
        """This micro-batch's share of the mini-batch's loss: policy + KL - entropy bonus."""
        logp_NT, mask_NT = output.logp_NT, batch.mask_NT
        if batch.old_logp_NT is None:
            batch = batch.replace(old_logp_NT=logp_NT.detach())
        loss_NT = self.policy_loss(logp_NT, batch)
        if self.kl_loss_coef:
            loss_NT = loss_NT + self.kl_loss_coef * kl_estimate(logp_NT, batch.ref_logp_NT, self.kl_estimator)
        limit = self.sampling.max_tokens
        loss = reduce_loss(loss_NT, mask_NT, self.aggregation, denominator=loss_count, max_tokens=limit)
        self.observe(output, batch, loss)
        if self.entropy_coef:
            bonus = reduce_loss(output.entropy_NT, mask_NT, "token-mean", denominator=token_count)
            loss = loss - self.entropy_coef * bonus
        return loss

    @torch.no_grad()
    def observe(self, output: PolicyOutput, batch: Experience, loss: Tensor) -> None:
        """Token statistics of one micro-batch, for the report."""
        logp_NT, mask_NT, tally = output.logp_NT, batch.mask_NT, self.tally
        log_ratio_NT = logp_NT - batch.old_logp_NT
        outside_NT = (log_ratio_NT.exp() < 1 - self.clip_low) | (log_ratio_NT.exp() > 1 + self.clip_high)
        tally.add("loss", loss, 0)  # a sum over micro-batches and ranks; counted once an optimizer step
        tally.add_masked("clip_fraction", outside_NT.float(), mask_NT)
        tally.add_masked("entropy", output.entropy_NT, mask_NT)
        if batch.ref_logp_NT is not None:
            tally.add_masked("kl", kl_estimate(logp_NT, batch.ref_logp_NT, "k3"), mask_NT)
        if self.first_update:  # the policy still is the one that sampled: what differs is the engine's arithmetic
            tally.add_masked("engine_mismatch_kl", kl_estimate(batch.engine_logp_NT, logp_NT, "k3"), mask_NT)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage towards ``time/<name>_seconds``."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - start

    @property
    def first_update(self) -> bool:
        """True until the first optimizer step on the present rollout batch."""
        return self.weight_version == self.rollout_version
