"""How much memory a run will take, before it takes any.

=============== ====================================================================================================
``settings``    what the memory of a run depends on
``placement``   where a strategy keeps weights, gradients and states
``sizes``       sizes of a model from its config, of an optimizer from one step
``fake``        counting the memory of computations that are never carried out
``phantom``     a policy and a batch of fake tensors
``micro_step``  peaks of one forward and backward of that policy
``budget``      bytes of every phase: arithmetic alone
``plan``        all of it together; the largest micro-batch and cache
``advice``      what to change
=============== ====================================================================================================
"""

from rllava_pl.memory.advice import Advice, advise
from rllava_pl.memory.budget import Line, Phase
from rllava_pl.memory.placement import Placement, placement_of
from rllava_pl.memory.plan import Limits, Plan, largest_cache, largest_micro_batch, plan
from rllava_pl.memory.settings import Engine, Prompts, Settings, Source
from rllava_pl.memory.units import parse_bytes

__all__ = [
    "Advice",
    "Engine",
    "Limits",
    "Line",
    "Phase",
    "Placement",
    "Plan",
    "Prompts",
    "Settings",
    "Source",
    "advise",
    "largest_cache",
    "largest_micro_batch",
    "parse_bytes",
    "placement_of",
    "plan",
]
