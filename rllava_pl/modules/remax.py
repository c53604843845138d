"""ReMax."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.loop.batch import interleave
from rllava_pl.loop.options import KL
from rllava_pl.modules.base import RLModule
from rllava_pl.types import PromptBatch, RewardedBatch, Rollout


class ReMax(RLModule):
    """ReMax (arXiv 2310.10505): the policy's own greedy answer is the baseline.

    A_i = r_i - r_greedy. The greedy answer of a prompt is one more row of its group: it is scored, and pays penalties
    and KL, like the others, but is not trained. Clipped surrogate, mean over tokens, one update a rollout.

    Args:
        kl: KL divergence, subtracted from the reward.
    """

    extra_rows = 1

    def __init__(self, *args, kl: KL = KL(reward_coef=0.001), **kwargs) -> None:
        super().__init__(*args, kl=kl, **kwargs)

    def sample(self, prompts: PromptBatch) -> list[Rollout]:
        """``group_size`` samples and then the greedy answer of each prompt."""
        requests = self.requests(prompts, samples=self.group_size, stream="train")
        sampled = self.engine.generate(requests, self.sampling)
        once = [dataclasses.replace(request, seeds=request.seeds[:1]) for request in requests]
        greedy = self.engine.generate(once, dataclasses.replace(self.sampling, temperature=0.0))
        baselines = [dataclasses.replace(rollout, trained=False) for rollout in greedy]
        return interleave(sampled, baselines, self.group_size)

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Reward minus that of the greedy answer, (N,)."""
        rewards_PG = batch.by_prompt(batch.rewards_N)
        greedy_PG = rewards_PG[:, -1:].expand_as(rewards_PG)
        return advantages.remax(rewards_PG.flatten(), greedy_PG.flatten())
