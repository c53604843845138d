"""Faults on purpose: what a run does when an engine or a reward fails can be tried before it happens.

============ ==========================================================================================
``schedule`` which call meets which fault, a pure function of a seed and the call
``engine``   an engine that fails, around any other, and the callback that puts it into a run
``reward``   a reward that fails, beside the others
============ ==========================================================================================
"""

from rllava_pl.testing.engine import FaultyEngine, FaultyRollout
from rllava_pl.testing.reward import FaultyReward
from rllava_pl.testing.schedule import Schedule

__all__ = ["FaultyEngine", "FaultyReward", "FaultyRollout", "Schedule"]
