"""One pass of the loop taken apart, for tests of what an update does."""

from __future__ import annotations

from pathlib import Path

import torch

from rllava_pl.functional.seeds import seed_from
from rllava_pl.modules import RLModule
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Experience, Prompt, PromptBatch, Rollout, Sampling, Score
from tests import runs


class Drawn(BaseReward):
    """0, 1/3, 2/3 or 1, a function of prompt and response: every group has something to teach."""

    components = ("accuracy",)

    def score(self, rollout: Rollout) -> Score:
        value = seed_from(rollout.prompt.uid, *rollout.response_ids.tolist()) % 4 / 3
        return Score(value, {"accuracy": value})


def prompts(algorithm: type[RLModule], number: int = 6) -> list[Prompt]:
    data = runs.data(demonstrations=runs.share_of_targets(algorithm))
    data.setup("fit")
    return [data.train_prompts[i] for i in range(number)]


def fitted(root: Path, algorithm: type[RLModule], **options: object) -> RLModule:
    """A module after one rollout, whose policy is no longer its reference and writes responses of many lengths."""
    module = runs.module(algorithm, sampling=Sampling(max_tokens=8, temperature=3.0), max_rollouts=1, **options)
    module.rewards = [Drawn()]
    runs.trainer(root).fit(module, runs.data(demonstrations=runs.share_of_targets(algorithm)))
    if module.needs_values:  # one update of a head that began at 0 leaves nearly no values
        torch.nn.init.normal_(module.value_head.weight, generator=torch.Generator().manual_seed(0))
    return module


def one_pass(module: RLModule, batch: list[Prompt]) -> Experience:
    """Experience ready for an update, as if the policy had moved away from its samples."""
    experience = module.evaluate(module.judge(module.rollout(PromptBatch(batch))))
    if experience.old_logp_NT is not None:
        experience = experience.replace(old_logp_NT=experience.old_logp_NT + drift(experience))
    module.rollout_version -= 1
    return module.credit(experience)


def drift(experience: Experience) -> torch.Tensor:
    """Up to ±0.3 a token, a function of what the row says and not of where it stands; 0 where nothing was sampled."""
    phase_N = torch.tensor([seed_from(rollout.prompt.uid) % 100 for rollout in experience.rollouts])
    steps_T = torch.arange(experience.mask_NT.shape[1])
    drift_NT = 0.3 * torch.sin(phase_N[:, None] + 3 * steps_T + experience.response_ids_NT)
    return drift_NT * experience.own_mask_NT


def gradient(module: RLModule, minibatch: Experience, micro_batch_size: int = 0) -> torch.Tensor:
    """All of the gradient that ``update`` would step with."""
    module.micro_batch_size, module.step = micro_batch_size, lambda *_: True
    module.zero_grad()
    module.update(minibatch)
    del module.step
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() <= 1e-5 * b.norm()
