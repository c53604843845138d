"""Rewards: what a rollout is worth, and why.

A reward is any class with a ``weight`` and ``__call__(rollouts) -> list[Score]``; subclass ``BaseReward`` to write only
``score(rollout)``. ``compute_rewards`` adds them up and never turns a fault into a number; a ``RewardRunner`` does the
same with rewards in worker processes that can be killed.

=================================== ===================================================================
``base``                            the base class
``answer``, ``math``, ``penalties`` rewards
``text``                            parsers of what a policy wrote
``formulas``                        whether two answers to a mathematics question are the same
``scoring``                         one reward: options, and faults that become unscored samples by cause
``output``                          several rewards: the weighted sum
``runner``                          several rewards, each in the process where it belongs
``isolation``                       worker processes
=================================== ===================================================================
"""

from rllava_pl.rewards.answer import AnswerTagReward
from rllava_pl.rewards.base import BaseReward, RewardError
from rllava_pl.rewards.math import MathReward
from rllava_pl.rewards.output import RewardOutput, compute_rewards
from rllava_pl.rewards.penalties import RepetitionPenalty
from rllava_pl.rewards.runner import RewardRunner
from rllava_pl.rewards.scoring import Scoring, check_unscored

__all__ = [
    "AnswerTagReward",
    "BaseReward",
    "MathReward",
    "RepetitionPenalty",
    "RewardError",
    "RewardOutput",
    "RewardRunner",
    "Scoring",
    "check_unscored",
    "compute_rewards",
]
