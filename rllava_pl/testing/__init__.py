"""Injected faults: try what a run does when an engine or a reward fails.

============ ==========================================================================================
``schedule`` which call has which fault, a pure function of a seed and the call
``engine``   wraps an engine that then fails now and then, and the callback for it
``reward``   a reward that fails now and then
============ ==========================================================================================
"""

from rllava_pl.testing.engine import FaultyEngine, FaultyRollout
from rllava_pl.testing.reward import FaultyReward
from rllava_pl.testing.schedule import Schedule

__all__ = ["FaultyEngine", "FaultyReward", "FaultyRollout", "Schedule"]
