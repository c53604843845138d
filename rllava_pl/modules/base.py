"""The RL loop as a LightningModule: rollout, judge, evaluate, credit, update, report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rllava_pl.functional.losses import clipped
from rllava_pl.functional.rewards import informative_groups
from rllava_pl.functional.seeds import permutation, seed_from
from rllava_pl.models.policy import Policy
from rllava_pl.models.vlm import VLM
from rllava_pl.modules.evaluation import Evaluation
from rllava_pl.modules.experience import assemble, join_rows, microbatches, minibatches, over_ranks
from rllava_pl.modules.lifecycle import Lifecycle
from rllava_pl.modules.optimization import Optimization
from rllava_pl.modules.tally import Tally
from rllava_pl.rewards.base import BaseReward, judge
from rllava_pl.rollout.managed import ManagedEngine
from rllava_pl.strategies.collectives import rank
from rllava_pl.types import Experience, PolicyBatch, PolicyOutput, Prompt, PromptBatch, Request, Reward, Rollout, Sampling

Aggregation = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"]
KLEstimator = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"]


class RLModule(Lifecycle, Optimization, Evaluation):
    """One RL algorithm on a vision-language model; one ``training_step`` is one pass of the loop.

    Subclasses say how credit is assigned (``advantages``) and, where it is not PPO's clipped surrogate, how the policy
    is pulled (``policy_loss``). ``Trainer(max_steps=...)`` counts optimizer steps; ``max_rollouts`` counts passes.

    Args:
        policy: The model to train.
        rewards: Judges of the completions; the reward is the sum of weight x value.
        group_size: Completions sampled of each prompt.
        sampling: Response budget and temperature.
        max_rollouts: Passes of the loop in the whole run; the learning-rate schedule ends with it. 0: until the Trainer stops.
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

    needs_groups: ClassVar[bool] = False
    """True for algorithms that compare the completions of a prompt with each other."""

    def __init__(
        self,
        policy: VLM,
        rewards: list[BaseReward | Reward],
        *,
        group_size: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        max_rollouts: int = 0,
        minibatches: int = 1,
        epochs: int = 1,
        micro_batch_size: int = 0,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_steps: int = 0,
        final_lr_ratio: float = 0.0,
        max_grad_norm: float = 1.0,
        aggregation: Aggregation = "token-mean",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_loss_coef: float = 0.0,
        kl_reward_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        entropy_coef: float = 0.0,
        val_samples: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(ignore=["policy", "rewards", "optimizer", "sampling"])
        self.source = policy
        self.rewards = rewards
        self.group_size = group_size
        self.sampling = sampling
        self.max_rollouts = max_rollouts
        self.num_minibatches = minibatches
        self.epochs = epochs
        self.micro_batch_size = micro_batch_size
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.final_lr_ratio = final_lr_ratio
        self.max_grad_norm = max_grad_norm
        self.aggregation = aggregation
        self.clip_low, self.clip_high = clip_low, clip_high
        self.kl_loss_coef, self.kl_reward_coef = kl_loss_coef, kl_reward_coef
        self.kl_estimator = kl_estimator
        self.entropy_coef = entropy_coef
        self.val_samples = val_samples
        self.seed = seed
        self._check_options()
        self.engine: ManagedEngine | None = None
        self.policy: Policy | None = None
        self.reference: Policy | None = None
        self.tally = Tally()
        self.seconds: Counter[str] = Counter()
        self.rollout_version = -1
        self.register_buffer("rollouts_done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates_done", torch.zeros((), dtype=torch.int64))

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
            self.tally.add("unscored_samples", torch.tensor(float(sum(judgement.causes.values()))))
            return assemble(rollouts, judgement, self.group_size, self.policy.device)

    def evaluate(self, experience: Experience) -> Experience:
        """Log-probs of the sampled tokens under the sampling policy and the reference, as far as they are needed.

        Old log-probs are the engine's where it shares weights and arithmetic with the trainer (``engine.exact``). Else they
        are computed here; with a single update a rollout not even that, since the update's own forward gives them.
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
        experience = self.penalise(experience)
        everyone, own = over_ranks(experience)
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

    def report(self, experience: Experience) -> None:
        """Log the pass: means over all ranks, and seconds a phase."""
        tally = self.tally
        tally.add("reward", experience.rewards_N.sum(), len(experience))
        for name, values_N in experience.components.items():
            tally.add(f"reward/{name}", values_N.sum(), len(experience))
        tally.add("response_tokens", experience.lengths_N.sum(), len(experience))
        truncated = sum(rollout.finish_reason == "length" for rollout in experience.rollouts)
        tally.add("truncated_fraction", torch.tensor(float(truncated)), len(experience))
        informative_N = informative_groups(experience.rewards_N, experience.group_N)
        tally.add("informative_groups", informative_N.sum(), len(experience))
        metrics = {f"train/{name}": value for name, value in tally.means().items()}
        metrics |= {f"time/{name}_seconds": value for name, value in self.seconds.items()}
        self.log_dict(metrics, batch_size=len(experience))
        self.tally, self.seconds = Tally(), Counter()
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

    def requests(self, prompts: Sequence[Prompt], *, samples: int, stream: str) -> list[Request]:
        """What to ask of the engine; every sample's seed is a function of run, stream, rollout, prompt and its number."""
        seen: Counter[str] = Counter()
        requests = []
        for p, (prompt, inputs) in enumerate(zip(prompts, self.policy.encode(prompts), strict=True)):
            first = seen[prompt.uid] * samples  # the same row twice in a batch must not give the same samples twice
            counters = range(first, first + samples)
            seeds = tuple(seed_from(self.seed, stream, self.rollout_index, prompt.uid, g) for g in counters)
            requests.append(Request(prompt, inputs, group=(rank() << 32) + p, seeds=seeds))
            seen[prompt.uid] += 1
        return requests

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

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage towards ``time/<name>_seconds``."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - start

    @property
    def rollout_index(self) -> int:
        """Passes of the loop so far."""
        return int(self.rollouts_done)

    @property
    def weight_version(self) -> int:
        """Optimizer steps in the present weights."""
        return int(self.updates_done)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps a rollout batch."""
        return self.num_minibatches * self.epochs

    @property
    def first_update(self) -> bool:
        """True until the first optimizer step on the present rollout batch."""
        return self.weight_version == self.rollout_version

    @property
    def needs_reference(self) -> bool:
        """Whether any KL term is on."""
        return bool(self.kl_loss_coef or self.kl_reward_coef)

    def _check_options(self) -> None:
        """Refuse options that contradict each other, with the arithmetic."""
        name, group, micro = type(self).__name__, self.group_size, self.micro_batch_size
        if not self.rewards:
            raise ValueError(f"{name}: no reward given; the policy learns from nothing else. E.g. rewards: [AnswerTagReward]")
        if group < (2 if self.needs_groups else 1):
            raise ValueError(f"{name} compares the completions of a prompt with each other: group_size must be >= 2, is {group}")
        if micro and micro % group and group % micro:
            raise ValueError(
                f"micro_batch_size {micro} and group_size {group}: a micro-batch holds whole groups (a multiple of {group}) "
                f"or equal parts of one (a divisor of {group}), because a group shares its prompt"
            )
        if min(self.num_minibatches, self.epochs) < 1:
            raise ValueError(f"minibatches ({self.num_minibatches}) and epochs ({self.epochs}) must be at least 1")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: all completions of a group would be equal and nothing could be learnt")
        if self.lr_schedule != "constant" and self.max_rollouts < 1:
            raise ValueError(f"lr_schedule {self.lr_schedule!r} decays over max_rollouts, which is {self.max_rollouts}; set it")

    def _check_batch(self, prompts: PromptBatch) -> None:
        if len(prompts) % self.num_minibatches or not len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts x group_size {self.group_size} = {len(prompts) * self.group_size} samples cannot be split "
                f"into {self.num_minibatches} mini-batches of whole groups; make the data's batch_size a multiple of minibatches"
            )
