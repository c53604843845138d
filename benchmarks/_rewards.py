"""Rewards of reward_pool.py, in a file that a process of their own can import."""

from __future__ import annotations

import time

from rllava_pl.rewards import AnswerTagReward, BaseReward
from rllava_pl.types import Rollout, Score


class Tags(AnswerTagReward):
    """As of the package, but in a process of its own."""

    isolation = "process"


class Hanging(BaseReward):
    """Hangs over the texts that ask for it."""

    def score(self, rollout: Rollout) -> Score:
        """1, or never."""
        while rollout.text == "hang":
            time.sleep(1)
        return Score(1.0)
