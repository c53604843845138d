"""Supervised fine-tuning, as the corner of RL where every response is given and every advantage is 1."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.models.vlm import VLM
from rllava_pl.modules.supervised import SupervisedModule
from rllava_pl.rewards.base import BaseReward
from rllava_pl.types import Experience, Request, Reward, Rollout


class SFT(SupervisedModule):
    """SFT: loss = -log π(target), mean over the target tokens of the mini-batch on all ranks.

    Needs prompts with a ``target``; no engine and no reward. Rewards, if given, judge the greedy answers of validation
    and test; the negative log-likelihood of the targets is reported as well.

    Args:
        policy: The model to train.
        rewards: For validation and test alone; may be empty.
    """

    def __init__(self, policy: VLM, rewards: list[BaseReward | Reward] | None = None, **kwargs) -> None:
        super().__init__(policy, rewards or [], group_size=1, **kwargs)

    def sample(self, requests: list[Request]) -> list[Rollout]:
        """The targets."""
        return [self.given(request, request.prompt.target) for request in requests]

    def advantages(self, experience: Experience) -> Tensor:
        """1, (N,)."""
        return torch.ones_like(experience.rewards_N)

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """-log π."""
        return losses.reinforce(logp_NT, batch.advantages_NT)
