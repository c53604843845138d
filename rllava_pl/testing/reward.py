"""A reward that fails on purpose."""

from __future__ import annotations

import math
import os
import threading
from typing import Literal, cast, get_args

from rllava_pl.rewards.base import BaseReward
from rllava_pl.testing.schedule import Schedule
from rllava_pl.types import Rollout, Score

RewardFault = Literal["none", "nan", "inf", "wrong_type", "raises", "hangs", "exits", "eats_memory"]
IN_PROCESS = get_args(RewardFault)[:-3]
"""Faults that cost one sample even without a worker process."""


class FaultyReward(BaseReward):
    """Scores 0, and fails for the samples that the schedule selects.

    ``none``: returns None; ``nan``, ``inf``: not finite; ``wrong_type``: a string; ``raises``: an exception; ``hangs``:
    never returns; ``exits``: ends its process; ``eats_memory``: until none is left. The last three need a worker
    process, in which rewards run unless ``scoring.isolation`` says otherwise.

    Args:
        faults: Kinds of faults, all equally likely.
        rate: Fraction of the samples that it does not score.
        seed: Of the schedule, which depends on prompt, weight version and tokens of the sample.
    """

    def __init__(self, faults: list[RewardFault], rate: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        self.schedule = Schedule(faults, rate, seed, known=get_args(RewardFault))

    def fault(self, rollout: Rollout) -> str:
        """The fault of this sample; empty for most."""
        return self.schedule.at(rollout.prompt.uid, *rollout.weight_versions, *rollout.response_ids.tolist())

    def score(self, rollout: Rollout) -> Score:
        """0, or a fault."""
        match self.fault(rollout):
            case "":
                return Score(0.0)
            case "nan":
                return Score(math.nan)
            case "inf":
                return Score(math.inf)
            case "wrong_type":
                return Score(cast(float, "1.0"))
            case "raises":
                raise ArithmeticError("the reward failed, as scheduled")
            case "hangs":
                threading.Event().wait()
            case "exits":
                os._exit(1)
            case "eats_memory":
                eaten = []
                while True:
                    eaten.append(bytearray(2**24))
        return cast(Score, None)
