"""Rewards: what a rollout is worth, and why.

A reward is any class with a ``weight`` and ``__call__(rollouts) -> list[Score]``; subclass ``BaseReward`` to write only
``score(rollout)``. ``judge`` adds them up and never turns a fault into a number; a ``Panel`` does so with rewards that
run in processes of their own, which can be killed.

=============== =======================================================================================
``base``        the base class
``answer`` ...  rewards
``text``        parsers of what a policy wrote
``formulas``    whether two answers of a mathematics question are the same
``scoring``     one reward: faults become unscored samples, by cause
``judgement``   several rewards: the weighted sum
``panel``       where each reward runs, and the options for it
``pool``        deadlines, lost work, replacements
``workers``     processes, as the trainer sees them
``nursery``     the process that workers are copies of, and the workers
``recipe``      how a reward is built again elsewhere
``wire``        rollouts and scores as bytes
=============== =======================================================================================
"""

from rllava_pl.rewards.answer import AnswerTagReward
from rllava_pl.rewards.base import BaseReward, RewardError
from rllava_pl.rewards.math import MathReward
from rllava_pl.rewards.output import Judgement, judge
from rllava_pl.rewards.penalties import RepetitionPenalty
from rllava_pl.rewards.runner import Judging, Panel

__all__ = [
    "AnswerTagReward",
    "BaseReward",
    "Judgement",
    "Judging",
    "MathReward",
    "Panel",
    "RepetitionPenalty",
    "RewardError",
    "judge",
]
