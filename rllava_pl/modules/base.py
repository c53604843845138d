"""The RL loop: sample, score, fill the batch, log-probs, advantages, update, log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import gather_objects, rank
from rllava_pl.functional._numerics import check_choice
from rllava_pl.functional.kl import kl_estimate
from rllava_pl.functional.losses import clipped, importance_weights
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop import observe
from rllava_pl.loop.batch import assemble, drop_untrained_members, gather_batch, sorted_over_ranks
from rllava_pl.loop.checks import check_batch_size, check_credit, check_token_loss
from rllava_pl.loop.group_buffer import GroupBuffer
from rllava_pl.loop.metrics import moments
from rllava_pl.loop.options import (
    KL,
    Clip,
    DynamicSampling,
    EngineCorrection,
    LengthPenalty,
    Masking,
    complete,
)
from rllava_pl.loop.penalties import adapt_kl, length_penalties, mask_rows, penalize
from rllava_pl.loop.requests import make_requests
from rllava_pl.loop.rewards import RewardMonitor
from rllava_pl.models.vlm import VLM
from rllava_pl.modules.policy_module import STATE, PolicyModule
from rllava_pl.rewards import BaseReward
from rllava_pl.types import (
    Credit,
    PolicyOutput,
    Prompt,
    PromptBatch,
    Request,
    Reward,
    RewardedBatch,
    Rollout,
    ScoredBatch,
    Term,
    TrainingBatch,
)


class RLModule(PolicyModule):
    """One RL algorithm on a vision-language model; one ``training_step`` is one pass of the loop.

    Subclasses define how credit is assigned (``advantages``) and, where it is not PPO's clipped surrogate, the loss of
    the policy (``policy_loss``). ``Trainer(max_steps=...)`` counts optimizer steps; ``max_rollouts`` counts passes.

    Args:
        policy: The model to train.
        rewards: Score the completions; the reward is the sum of weight x value.
        group_size: Completions sampled of each prompt.
        aggregation: How per-token losses become one number, over the mini-batch of all ranks.
        clip: Clip range of the importance ratio.
        kl: KL divergence to the reference policy.
        entropy_coef: Weight of the entropy bonus.
        length_penalty: Penalty on responses that come close to the token budget.
        dynamic_sampling: Replaces groups whose samples all scored the same.
        engine_correction: Importance weights for the difference between engine and trainer.
        masking: Rows that are left out of the losses.
    """

    needs_groups: ClassVar[bool] = False
    """True for algorithms that compare the completions of a prompt with each other."""
    needs_old_logp: ClassVar[bool] = False
    """True for losses that read log-probs before the first update of a rollout batch."""

    def __init__(
        self,
        policy: VLM,
        rewards: list[BaseReward | Reward],
        *,
        group_size: int = 8,
        aggregation: ReduceMode = "token-mean",
        clip: Clip = Clip(),
        kl: KL = KL(),
        entropy_coef: float = 0.0,
        length_penalty: LengthPenalty = LengthPenalty(),
        dynamic_sampling: DynamicSampling = DynamicSampling(),
        engine_correction: EngineCorrection = EngineCorrection(),
        masking: Masking = Masking(),
        **kwargs,
    ) -> None:
        super().__init__(policy, rewards, **kwargs)
        self.group_size = group_size
        self.aggregation = aggregation
        self.clip = complete(type(self), "clip", clip)
        self.kl = complete(type(self), "kl", kl)
        self.entropy_coef = entropy_coef
        self.length_penalty = complete(type(self), "length_penalty", length_penalty)
        self.dynamic_sampling = complete(type(self), "dynamic_sampling", dynamic_sampling)
        self.engine_correction = complete(type(self), "engine_correction", engine_correction)
        self.masking = complete(type(self), "masking", masking)
        check_choice("aggregation", aggregation, get_args(ReduceMode))
        if group_size < (2 if self.needs_groups else 1):
            raise ValueError(
                f"{type(self).__name__} compares the completions of a prompt: group_size must be >= 2, is {group_size}"
            )
        if self.dynamic_sampling.max_rounds and group_size < 2:
            raise ValueError("dynamic_sampling looks for groups whose rewards differ; group_size 1 has none")
        if self.kl.target and not (self.kl.loss_coef or self.kl.reward_coef):
            raise ValueError("kl.target adapts the KL coefficients, but kl.loss_coef and kl.reward_coef are both 0")
        self.needs_reference = self.needs_reference or bool(self.kl.loss_coef or self.kl.reward_coef)
        self.group_buffer = GroupBuffer(self.dynamic_sampling)
        self.reward_monitor = RewardMonitor(self.scoring, self.metrics)
        self.phases.interruption.parts.append(self.group_buffer)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """One pass: sample, score, fill the batch, log-probs, advantages, updates, metrics."""
        check_batch_size(len(prompts), self.group_size, self.batching.num_minibatches)
        with self.phases("rollout"):
            self.state.sampled_at = self.state.updates
            rollouts = self.sample(prompts)
        batch = self.group_buffer.add(self.score(rollouts), wanted=len(prompts))
        if batch is None:  # not full yet: the same policy samples for the next prompts
            return
        batch = self.compute_logprobs(batch)
        training_batch = self.compute_advantages(batch)
        for minibatch in self.minibatches(training_batch):
            with self.phases("update"):
                self.updater.step(minibatch, self.terms, self.losses)
        self.log_rollout(training_batch)

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """Rewards of the rollouts; groups with a sample that could not be scored are dropped and counted."""
        with self.phases("reward"):
            output = self.reward_monitor.settle(self.reward_runner(rollouts), self.reward_runner, self.policy.device)
            batch = assemble(rollouts, output, self.group_size + self.extra_rows, self.policy.device)
            observe.samples(self.metrics, batch, self.group_buffer)
            return batch

    def compute_logprobs(self, batch: ScoredBatch) -> ScoredBatch:
        """Log-probs of the sampled tokens under the sampling policy and the reference, and a critic's values.

        Old log-probs are the engine's where it computes with the trainer's weights and arithmetic (``engine.exact``).
        Else they are computed here; with a single update a rollout the update's own forward gives them.
        """
        with self.phases("logprobs"):
            mask_NT = batch.sampled_mask_NT | batch.trained_mask_NT
            model = partial(self.updater.adapter.model, entropy=False)
            if self.engine.exact and not self.needs_values:
                batch = batch.with_computed(old_logp_NT=batch.engine_logp_NT)
            elif self.computes_old_logp:
                old = self.updater.forward(model, batch, mask_NT)
                values = {} if old.values_NT is None else {"values_NT": old.values_NT}
                batch = batch.with_computed(old_logp_NT=old.logp_NT, **values)
            if self.needs_reference:
                reference = self.updater.forward(partial(model, reference=True), batch, mask_NT)
                batch = batch.with_computed(ref_logp_NT=reference.logp_NT)
            return batch

    def compute_advantages(self, batch: ScoredBatch) -> TrainingBatch:
        """Penalties, then the advantages of this rank's rows from the rollout batch of all ranks."""
        penalties_N = length_penalties(batch, self.length_penalty, self.sampling.max_tokens)
        rewarded = penalize(mask_rows(batch, self.masking), penalties_N, self.kl.reward_coef * self.state.kl_factor)
        everyone, own = gather_batch(rewarded)
        adapt_kl(self.state, everyone, self.kl, self.metrics)
        credit = check_credit(type(self), self.advantages(everyone), everyone)
        own_rows = (own, slice(rewarded.trained_mask_NT.shape[1]))
        if credit.trained is not None:
            rewarded = rewarded.replace(trained_mask_NT=rewarded.trained_mask_NT & credit.trained[own, None])
        if credit.returns is not None:
            rewarded = rewarded.with_computed(returns_NT=credit.returns[own_rows])
        advantages_NT = credit.advantages[own_rows].masked_fill(~rewarded.trained_mask_NT, 0.0)
        observe.penalties(self.metrics, batch, penalties_N)
        return drop_untrained_members(rewarded.to_stage(TrainingBatch, advantages_NT=advantages_NT))

    def minibatches(self, batch: TrainingBatch) -> Iterator[TrainingBatch]:
        """Mini-batches of whole groups, in a seeded order, with the tokens that ``select`` marks in them."""
        for minibatch in super().minibatches(batch):
            if type(self).select is RLModule.select:
                yield minibatch
                continue
            everyone, own_rows = sorted_over_ranks(minibatch)
            selected_NT = self.select(everyone)[own_rows, : minibatch.trained_mask_NT.shape[1]]
            self.metrics.add_masked({"selected_fraction": selected_NT.float()}, minibatch.trained_mask_NT)
            yield minibatch.with_computed(selected_NT=selected_NT)

    def log_rollout(self, batch: TrainingBatch) -> None:
        """Log the pass: means over all ranks, and seconds a phase. Collective."""
        self.metrics.add_masked(moments("advantage_std", batch.advantages_NT), batch.own_mask_NT)
        observe.generation(self.metrics, self.engine, self.group_buffer, self.policy.device)
        metrics = observe.rollout_metrics(self.metrics, self.phases)
        self.reward_monitor.report(metrics, self.reward_runner)
        observe.publish(metrics, self, step=self.state.rollouts)
        self.health.check(metrics)
        self.reward_monitor.check(metrics)
        self.state.rollouts += 1

    # -- hooks of an algorithm ---------------------------------------------------------------------------------------

    def sample(self, prompts: PromptBatch) -> list[Rollout]:
        """``group_size`` episodes of every prompt, and ``extra_rows`` more, prompt by prompt."""
        requests = self.requests(prompts, samples=self.group_size, stream="train")
        return self.engine.generate(requests, self.sampling)

    def advantages(self, batch: RewardedBatch) -> Tensor | Credit:
        """Advantages of each row (N,) or token (N, T), from the rollout batch of all ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages(self, batch)")

    def select(self, minibatch: TrainingBatch) -> Tensor:
        """Bool (N, T): tokens that the loss treats differently, from the mini-batch of all ranks."""
        return torch.zeros_like(minibatch.trained_mask_NT)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Loss of every token, to be minimised, before aggregation; by default the clipped surrogate of PPO."""
        return clipped(logp_NT, batch.old_logp_NT, batch.advantages_NT, **self.clip.range, dual_clip=self.clip.dual)

    def clipped_tokens(self, policy_loss_NT: Tensor, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Bool (N, T): tokens with an advantage whose gradient the policy loss holds at 0; for metrics."""
        (gradient_NT,) = torch.autograd.grad(
            policy_loss_NT.sum(), logp_NT, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return (gradient_NT == 0) & (batch.advantages_NT != 0)

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """Policy, KL and entropy; an algorithm that adds terms extends this and ``losses``."""
        terms = {"policy": Term(batch.trained_mask_NT, self.aggregation)}
        if self.kl.loss_coef:
            policy = terms["policy"]
            terms["kl"] = Term(policy.mask_NT, policy.aggregation, self.kl.loss_coef * self.state.kl_factor)
        if self.entropy_coef:
            terms["entropy"] = Term(batch.trained_mask_NT, "token-mean", self.entropy_coef)
        return terms

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """Loss of every token (N, T) for each of the terms."""
        logp_NT = output.logp_NT.view_as(output.logp_NT)  # gradients of the output itself run FSDP's hooks
        batch = batch.with_computed(entropy_NT=output.entropy_NT.detach())
        if "old_logp_NT" not in batch.computed:
            batch = batch.with_computed(old_logp_NT=logp_NT.detach())
        policy_NT = check_token_loss(type(self), self.policy_loss(logp_NT, batch), logp_NT)
        first_update, exact = self.state.before_first_update, self.engine.exact
        clipped_NT = self.clipped_tokens(policy_NT, logp_NT, batch)
        observe.tokens(self.metrics, output, batch, clipped_NT, first_update=first_update, exact=exact)
        options = self.engine_correction
        if options.level != "none" and not exact:
            weights_NT = importance_weights(
                *(batch.old_logp_NT, batch.engine_logp_NT, batch.own_mask_NT),
                level=options.level,
                mode=options.mode,
                cap=options.cap,
            )
            self.metrics.add_masked({"engine_weight": weights_NT}, batch.own_mask_NT)
            policy_NT = policy_NT * weights_NT.masked_fill(batch.given_mask_NT, 1.0)
        losses = {"policy": policy_NT}
        if self.entropy_coef:
            losses["entropy"] = -output.entropy_NT
        if self.kl.loss_coef:
            kl_NT = kl_estimate(logp_NT, batch.ref_logp_NT, self.kl.estimator)
            losses["kl"] = kl_NT.masked_fill(batch.given_mask_NT, 0.0)
        return losses

    # -- details -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the groups of a batch that is not full yet, and what was measured of them."""
        super().on_save_checkpoint(checkpoint)
        metrics = gather_objects(self.metrics.state()) if self.group_buffer.rounds else []
        checkpoint[STATE] |= {"group_buffer": self.group_buffer.state(), "metrics": metrics}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the groups of a batch that is not full yet."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(STATE, {})
        self.group_buffer.restore(saved.get("group_buffer", []))
        if self.group_buffer.rounds:
            self.metrics.restore(saved["metrics"][rank()])

    @property
    def computes_old_logp(self) -> bool:
        """Whether the sampling policy's log-probs are needed before the first update, whose forward gives them."""
        return (
            self.needs_old_logp
            or self.needs_values
            or self.batching.updates_per_rollout > 1
            or bool(self.kl.reward_coef or self.kl.target)
        )

    def requests(self, prompts: Iterable[Prompt], *, samples: int, stream: str) -> list[Request]:
        """What to ask of the engine; a further round of dynamic sampling draws other numbers."""
        rollout, round_ = self.state.rollouts, self.group_buffer.rounds
        return make_requests(self.policy, list(prompts), samples, stream, self.seed, rollout, round_)
