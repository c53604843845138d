"""ReMax."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from rllava_pl.functional import advantages
from rllava_pl.loop.experience import interleaved
from rllava_pl.modules.base import RLModule
from rllava_pl.types import Experience, Request, Rollout


class ReMax(RLModule):
    """ReMax (arXiv 2310.10505): the policy's own greedy answer is the baseline.

    A_i = r_i - r_greedy. The greedy answer of a prompt is one more row of its group: it is judged, and pays penalties
    and KL, like the others, but is not trained. Clipped surrogate, mean over tokens, one update a rollout.

    Args:
        kl_reward_coef: Weight of the KL divergence in the reward.
    """

    extra_members = 1

    def __init__(self, *args, kl_reward_coef: float = 0.001, **kwargs) -> None:
        super().__init__(*args, kl_reward_coef=kl_reward_coef, **kwargs)

    @property
    def trained_members(self) -> int:
        """The greedy answer is not trained."""
        return self.group_size

    def sample(self, requests: list[Request]) -> list[Rollout]:
        """``group_size`` samples and then the greedy answer of each prompt."""
        sampled = super().sample(requests)
        alone = [dataclasses.replace(r, group=~r.group, seeds=r.seeds[:1]) for r in requests]
        greedy = self.engine.generate(alone, dataclasses.replace(self.sampling, temperature=0.0))
        return interleaved(sampled, greedy, self.group_size)

    def credit(self, experience: Experience) -> Experience:
        """Advantages of the samples; the greedy answers have done their part."""
        prompts = range(len(experience.inputs))
        return super().credit(experience).select(prompts, range(self.group_size))

    def advantages(self, experience: Experience) -> Tensor:
        """Reward minus that of the greedy answer, (N,)."""
        rewards_PG = experience.rewards_N.unflatten(0, (-1, self.group_size + 1))
        greedy_PG = rewards_PG[:, -1:].expand_as(rewards_PG)
        return advantages.remax(rewards_PG.flatten(), greedy_PG.flatten())
