"""Rewards: what a rollout is worth, and why.

A reward is any class with a ``weight`` and ``__call__(rollouts) -> list[Score]``; subclass ``BaseReward`` to write only
``score(rollout)``. ``judge`` adds them up and never turns a fault into a number.
"""

from rllava_pl.rewards.answer import AnswerTagReward
from rllava_pl.rewards.base import BaseReward, Judgement, RewardError, judge
from rllava_pl.rewards.penalties import RepetitionPenalty

__all__ = ["AnswerTagReward", "BaseReward", "Judgement", "RepetitionPenalty", "RewardError", "judge"]
