"""The RL loop as a LightningModule: rollout, judge, collect, evaluate, credit, update, report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import world_size
from rllava_pl.functional.kl import AdaptiveKLController, kl_estimate
from rllava_pl.functional.losses import WeightLevel, WeightMode, clipped, importance_weights
from rllava_pl.functional.reduce import masked_mean, reduce_loss
from rllava_pl.functional.seeds import permutation, seed_from
from rllava_pl.loop import shaping
from rllava_pl.loop.checks import credit_of_tokens, loss_of_tokens
from rllava_pl.loop.evaluation import Evaluation
from rllava_pl.loop.experience import assemble, minibatches, over_ranks
from rllava_pl.loop.observation import Observation
from rllava_pl.loop.optimization import Counts
from rllava_pl.rewards.output import Judgement
from rllava_pl.strategies import adapter as updates
from rllava_pl.types import Experience, PolicyBatch, PolicyOutput, PromptBatch, Request, Rollout


class RLModule(Observation, Evaluation):
    """One RL algorithm on a vision-language model; one ``training_step`` is one pass of the loop.

    Subclasses say how credit is assigned (``advantages``) and, where it is not PPO's clipped surrogate, how the policy
    is pulled (``policy_loss``). ``Trainer(max_steps=...)`` counts optimizer steps; ``max_rollouts`` counts passes.

    Args:
        policy: The model to train.
        rewards: Judges of the completions; the reward is the sum of weight x value.
        judging: Where rewards run, their limits, and what becomes of samples that they could not score.
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
        max_skipped: Updates in a row that are left out because a number is not finite, before the run stops.
        aggregation: How per-token losses become one number, over the mini-batch of all ranks.
        clip_low: Ratios below 1 - clip_low are not pushed further down.
        clip_high: Ratios above 1 + clip_high are not pushed further up.
        dual_clip: Bounds the ratio of tokens with negative advantage (arXiv 1912.09729), above 1; null: no bound.
        kl_loss_coef: Weight of the KL divergence to the reference policy in the loss; 0 loads no reference.
        kl_reward_coef: Weight of the KL divergence (k1, summed over the response) subtracted from the reward.
        kl_estimator: Form of the KL term in the loss.
        kl_target: The KL coefficients are adapted so that the divergence (token mean of k1) stays near this; 0: fixed.
        kl_horizon: Samples in which an adapted coefficient can at most change by a fifth.
        entropy_coef: Weight of the entropy bonus.
        overlong_buffer: Part of the budget, at its end, in which length is punished linearly; 0: no punishment.
        overlong_scale: The punishment where the budget ends.
        mask_truncated: Truncated responses count in their group's baseline but are not trained.
        max_refills: Further batches of prompts asked, by the same policy, to replace groups whose answers all earned
            the same (dynamic sampling); 0: every batch is taken as it is.
        informative_share: Part of a batch that must be informative for it to be full.
        informative_component: The reward component that decides whether a group is informative.
        engine_correction: How importance weights between engine and trainer are bounded, by token or by sequence; idle
            where the engine computes with the trainer's own weights and arithmetic.
        engine_correction_cap: Largest such weight.
        val_samples: Samples drawn of each prompt in validation and test beside the greedy one; 0: greedy only.
        seed: Of sampling and of the order of mini-batches; the CLI links it to ``seed_everything``.
    """

    # -- the loop ----------------------------------------------------------------------------------------------------

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """One pass: sample, judge, collect, evaluate, assign credit, update, report."""
        self._check_batch(prompts)
        rollouts = self.rollout(prompts)
        experience = self.collect(self.judge(rollouts), wanted=len(prompts))
        if experience is None:  # the batch is not full: the same policy goes on with the next prompts
            return
        experience = self.evaluate(experience)
        experience = self.credit(experience)
        for minibatch in self.minibatches(experience):
            self.update(minibatch)
        self.report(experience)

    def rollout(self, prompts: PromptBatch) -> list[Rollout]:
        """``group_size`` completions of every prompt from the engine."""
        with self.phase("rollout"):
            self.rollout_version = self.weight_version
            rollouts = self.sample(self.requests(list(prompts), samples=self.group_size, stream="train"))
            self.observe_engine()
            return rollouts

    def judge(self, rollouts: Sequence[Rollout]) -> Experience:
        """Rewards; groups with a sample that could not be scored are dropped and counted."""
        with self.phase("reward"):
            judgement = self.settle(self.score_rollouts(rollouts))
            return assemble(rollouts, judgement, self.group_size + self.extra_members, self.policy.device)

    def collect(self, experience: Experience, wanted: int) -> Experience | None:
        """With dynamic sampling, the groups worth training on once there are enough of them; else all at once."""
        self.observe_samples(experience)
        rounds = self.collection.rounds
        batch = self.collection.add(experience, wanted)
        if batch is not None and self.collection.max_refills:
            self.tally.add("refills", torch.tensor(rounds, device=self.policy.device))
        return batch

    def evaluate(self, experience: Experience) -> Experience:
        """Log-probs of the sampled tokens under the sampling policy and the reference, and a critic's values.

        Old log-probs are the engine's where it shares weights and arithmetic with the trainer (``engine.exact``). Else
        they are computed here; with a single update a rollout not even that: the update's own forward gives them.
        """
        with self.phase("evaluate"):
            if self.engine.exact and not self.needs_values:
                experience = experience.replace(old_logp_NT=experience.engine_logp_NT)
            elif self.evaluates_old_logp:
                old = self.score(self.trainer.strategy.model, experience)
                experience = experience.replace(old_logp_NT=old.logp_NT, values_NT=old.values_NT)
            if self.needs_reference:
                ref = self.score(partial(self.trainer.strategy.model, reference=True), experience)
                experience = experience.replace(ref_logp_NT=ref.logp_NT)
            return experience

    def credit(self, experience: Experience) -> Experience:
        """Advantages, from the rollout batch of all ranks."""
        experience = self.shape(experience)
        everyone, own = over_ranks(experience)
        self.adapt_kl(everyone)
        advantages_NT = credit_of_tokens(self, self.advantages(everyone), everyone.mask_NT)
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
            counts = self.denominators(minibatch)
            if counts.tokens == 0:  # nothing to learn from on any rank: all ranks leave together
                self.tally.add_total("skipped_updates", torch.ones_like(counts.tokens) / world_size())
                return
            losses = self.in_pieces(minibatch, partial(self.backpropagate, counts), exchanges=True)
            self.step(minibatch, losses)

    def report(self, experience: Experience) -> None:
        """Log the pass: means over all ranks, and seconds a phase."""
        self.observe_credit(experience)
        self.publish_metrics()
        self.rollouts_done += 1

    # -- what an algorithm decides -----------------------------------------------------------------------------------

    def advantages(self, experience: Experience) -> Tensor:
        """Credit of each sample (N,) or token (N, T), from the gathered batch of all ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages(self, experience)")

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """Loss of every token, to be minimised, before aggregation; by default the clipped surrogate of PPO."""
        return clipped(logp_NT, batch.old_logp_NT, batch.advantages_NT, **self.clip_range, dual_clip=self.dual_clip)

    def sample(self, requests: list[Request]) -> list[Rollout]:
        """Responses to the requests, in order; ``group_size`` + ``extra_members`` of each prompt."""
        return self.engine.generate(requests, self.sampling)

    # -- its parts ---------------------------------------------------------------------------------------------------

    def forward(self, batch: PolicyBatch, reference: bool = False) -> PolicyOutput:
        """Log-probs and entropies of the response tokens, of the policy or its reference.

        All of it goes through ``trainer.strategy.model``, which gathers what is sharded.
        """
        if not reference:
            return self.policy(batch)
        if self.reference is not None:
            return self.reference(batch)
        with self.policy.adapters_off():
            return self.policy(batch)

    def backpropagate(self, counts: Counts, piece: Experience, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; gradients add up, and are exchanged in the last one."""
        with updates.micro_batch(self.trainer.strategy, last=last):
            loss = self.loss(self.trainer.strategy.model(piece.batch), piece, counts)
            self.manual_backward(loss * world_size())  # gradients are averaged over ranks, the loss is a sum
        return loss.detach()

    @property
    def clip_range(self) -> dict[str, float]:
        """The two knobs of most losses, by name."""
        return {"clip_low": self.clip_low, "clip_high": self.clip_high}

    def score_rollouts(self, rollouts: Sequence[Rollout]) -> Judgement:
        """What the rewards say."""
        return self.ask_rewards(rollouts)

    def shape(self, experience: Experience) -> Experience:
        """Penalties: length, truncation, KL divergence. Only the advantages see them."""
        if self.overlong_buffer:
            punishment_N = shaping.overlong(
                experience,
                max_tokens=self.sampling.max_tokens,
                buffer_tokens=self.overlong_tokens,
                scale=self.overlong_scale,
            )
            counted_N = experience.own_mask_NT.any(1) & (experience.group_N >= 0)  # not what stands beside a group
            self.tally.add_masked("overlong_penalty", punishment_N, counted_N)
            experience = experience.replace(rewards_N=experience.rewards_N + punishment_N)
        if self.mask_truncated:
            experience = shaping.without_truncated(experience)
        return shaping.penalised(experience, kl_coef=self.kl_reward_coef * self.kl_controller.coef)

    def adapt_kl(self, everyone: Experience) -> None:
        """Move an adaptive KL coefficient by the divergence of the whole rollout batch."""
        if isinstance(self.kl_controller, AdaptiveKLController):
            divergence_NT = everyone.old_logp_NT - everyone.ref_logp_NT  # type: ignore[operator]
            sampled_NT = everyone.own_mask_NT & (everyone.group_N >= 0)[:, None]  # not what stands beside a group
            observed = float(masked_mean(divergence_NT, sampled_NT))
            if math.isfinite(observed):  # else the updates are left out, and the coefficient would be lost for good
                self.kl_controller.update(observed, int(sampled_NT.any(1).sum()))
            self.tally.add("kl_factor", torch.tensor(self.kl_controller.coef, device=self.policy.device))

    def loss(self, output: PolicyOutput, batch: Experience, counts: Counts) -> Tensor:
        """This micro-batch's share of the mini-batch's loss: policy + KL - entropy bonus."""
        logp_NT = output.logp_NT
        old_logp_NT = logp_NT.detach() if batch.old_logp_NT is None else batch.old_logp_NT
        batch = batch.replace(old_logp_NT=old_logp_NT, entropy_NT=output.entropy_NT.detach())
        loss_NT = self.correct(loss_of_tokens(self, self.policy_loss(logp_NT, batch), logp_NT), batch)
        if self.kl_loss_coef:
            kl_NT = kl_estimate(logp_NT, batch.ref_logp_NT, self.kl_estimator).masked_fill(batch.demo_mask_NT, 0.0)
            loss_NT = loss_NT + self.kl_loss_coef * self.kl_controller.coef * kl_NT
        loss = self.aggregate(loss_NT, batch, counts)
        self.observe_tokens(output, batch, loss, self.cut_off(logp_NT, batch))
        if self.entropy_coef:
            bonus = reduce_loss(output.entropy_NT, batch.mask_NT, "token-mean", denominator=counts.tokens)
            loss = loss - self.entropy_coef * bonus
        return loss

    def correct(self, loss_NT: Tensor, batch: Experience) -> Tensor:
        """Weigh by the ratio between the trainer's and the engine's probabilities, where they are not the same."""
        if self.engine_correction == "none" or self.engine.exact:
            return loss_NT
        level, mode = self.engine_correction.split("-")
        weights_NT = importance_weights(
            batch.old_logp_NT,
            batch.engine_logp_NT,
            batch.own_mask_NT,
            level=cast(WeightLevel, level),
            mode=cast(WeightMode, mode),
            cap=self.engine_correction_cap,
        )
        self.tally.add_masked("engine_weight", weights_NT, batch.own_mask_NT)
        return loss_NT * weights_NT.masked_fill(batch.demo_mask_NT, 1.0)

    def cut_off(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """Bool (N, T): tokens with credit whose gradient the loss holds at 0; what clipping means, whatever the loss.

        The loss is taken once more of the log-probs alone, without the model behind them.
        """
        with torch.enable_grad():
            leaf_NT = logp_NT.detach().requires_grad_()
            (gradient_NT,) = torch.autograd.grad(self.policy_loss(leaf_NT, batch).sum(), leaf_NT)
        return (gradient_NT == 0) & (batch.advantages_NT != 0)
