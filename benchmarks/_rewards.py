"""Rewards of reward_pool.py, in a file that worker processes can import."""

from __future__ import annotations

import time

from rllava_pl.rewards import AnswerTagReward, BaseReward
from rllava_pl.types import Rollout, Score


class Tags(AnswerTagReward):
    """The reward of the package, but in a worker process."""

    isolation = "process"


class Hanging(BaseReward):
    """Hangs when the response is ``hang``."""

    def score(self, rollout: Rollout) -> Score:
        """1, or it never returns."""
        while rollout.text == "hang":
            time.sleep(1)
        return Score(1.0)
