"""One pass of the loop taken apart, for tests of what an update does."""

from __future__ import annotations

import dataclasses
import tempfile
from math import inf
from pathlib import Path

import torch

from rllava_pl.functional.seeds import seed_from
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.options import Batching
from rllava_pl.loop.updater import Updater
from rllava_pl.modules import PolicyModule, RLModule
from rllava_pl.modules.supervised import SupervisedModule
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Prompt, PromptBatch, Rollout, Sampling, Score, ScoredBatch, TrainingBatch
from tests import runs


class Drawn(BaseReward):
    """0, 1/3, 2/3 or 1, a function of prompt and response: every group has something to teach."""

    components = ("accuracy",)

    def score(self, rollout: Rollout) -> Score:
        value = seed_from(rollout.prompt.uid, *rollout.response_ids.tolist()) % 4 / 3
        return Score(value, {"accuracy": value})


class Ranked(BaseReward):
    """0, 1, 2, ... by the place in the group, whatever was sampled."""

    components = ("accuracy",)

    def __call__(self, rollouts: list[Rollout]) -> list[Score]:
        seen: dict[str, int] = {}
        numbers = []
        for rollout in rollouts:
            numbers.append(seen.get(rollout.prompt.uid, 0))
            seen[rollout.prompt.uid] = numbers[-1] + 1
        return [Score(float(number), {"accuracy": float(number > 0)}) for number in numbers]

    def score(self, rollout: Rollout) -> Score:
        raise NotImplementedError  # the place is a property of the batch


def prompts(algorithm: type[PolicyModule], number: int = 6) -> list[Prompt]:
    data = runs.data(demonstrations=runs.share_of_targets(algorithm))
    data.setup("fit")
    return [data.train_prompts[i] for i in range(number)]


def fitted(root: Path, algorithm: type[PolicyModule], **options: object) -> PolicyModule:
    """A module after one rollout, whose policy is no longer its reference and writes responses of many lengths."""
    defaults = {"sampling": Sampling(max_tokens=8, temperature=3.0), "max_rollouts": 1, "rewards": [Drawn()]}
    module = runs.module(algorithm, **(defaults | options))
    runs.trainer(root).fit(module, runs.data(demonstrations=runs.share_of_targets(algorithm)))
    if module.needs_values:  # one update of a head that began at 0 leaves nearly no values
        torch.nn.init.normal_(module.value_head.weight, generator=torch.Generator().manual_seed(0))
    return module


def scored_pass(module: RLModule, batch: list[Prompt]) -> ScoredBatch:
    """Sampled, scored, and with the log-probs that the algorithm needs."""
    return module.compute_logprobs(module.score(module.sample(PromptBatch(batch))))


def one_pass(module: PolicyModule, batch: list[Prompt]) -> TrainingBatch:
    """A batch ready for an update, as if the policy had moved away from its samples."""
    module.state.sampled_at = module.state.updates - 1
    if isinstance(module, SupervisedModule):
        given = module.given_batch(batch, "train")
        if not module.needs_reference:
            return given
        return given.with_computed(ref_logp_NT=module.given_logp(given, reference=True))
    scored = scored_pass(module, batch)
    if "old_logp_NT" in scored.computed:
        scored = scored.with_computed(old_logp_NT=scored.old_logp_NT + drift(scored))
    return module.compute_advantages(scored)


def drift(batch: ScoredBatch) -> torch.Tensor:
    """Up to ±0.3 a token, a function of what the row says and not of where it stands; 0 where nothing was sampled."""
    phase_N = torch.tensor([seed_from(rollout.prompt.uid) % 100 for rollout in batch.rollouts])
    steps_T = torch.arange(batch.trained_mask_NT.shape[1])
    drift_NT = 0.3 * torch.sin(phase_N[:, None] + 3 * steps_T + batch.response_ids_NT)
    return drift_NT * batch.own_mask_NT


def with_selection(module: PolicyModule, batch: TrainingBatch) -> TrainingBatch:
    """The batch as the single mini-batch of its rollout, with the tokens that ``select`` marks."""
    batching, module.batching = module.batching, Batching()
    (minibatch,) = module.minibatches(batch)
    module.batching = batching
    return minibatch


class RecordedSteps:
    """Stands for the optimizer and its schedule: keeps the gradient of every step and changes no weight."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0)
        self.gradients: list[torch.Tensor] = []

    def step(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradients.append(torch.cat([grad.flatten().clone() for grad in grads]))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Schedule:
    """A learning rate that stays."""

    def step(self) -> None:
        pass


def recording_updater(module: PolicyModule, batching: Batching = Batching()) -> tuple[Updater, RecordedSteps]:
    """An updater that shares the model with the module, but neither counters nor optimizer, and does not clip."""
    steps = RecordedSteps(module)
    updater = Updater(
        batching,
        max_grad_norm=inf,
        max_skipped=10**6,
        max_tokens=module.sampling.max_tokens,
        state=dataclasses.replace(module.state),
        metrics=MetricAccumulator(),
        rows_together=module.rows_together,
    )
    updater.connect(module.updater.adapter, Path(tempfile.gettempdir()))
    updater.connect_optimizer(steps, Schedule())
    module.zero_grad()
    return updater, steps


def gradient(module: PolicyModule, batch: TrainingBatch, size: int = 0, *, tokens: int = 0) -> torch.Tensor:
    """All of the gradient that an update would step with, in micro-batches of at most so many rows and tokens."""
    updater, steps = recording_updater(module, Batching(micro_batch_size=size, micro_batch_tokens=tokens))
    assert updater.step(with_selection(module, batch), module.terms, module.losses)
    return steps.gradients[0]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() <= 1e-5 * b.norm()
