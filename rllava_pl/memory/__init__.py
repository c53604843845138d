"""How much memory a run will need, before it needs any.

================ ===================================================================================================
``settings``     what the memory of a run depends on
``placement``    where a strategy keeps weights, gradients and optimizer states
``sizes``        sizes of a model from its config, and of an optimizer from one step
``fake_memory``  counts the memory of computations on fake tensors
``fake_policy``  a policy and a batch of fake tensors
``micro_step``   peaks of one forward and backward of that policy
``budget``       bytes of every phase
``plan``         all of it together; the largest micro-batch and KV cache that fit
``advice``       what to change
================ ===================================================================================================
"""

from rllava_pl.memory.advice import Advice, advise
from rllava_pl.memory.budget import MemoryItem, PhaseMemory
from rllava_pl.memory.placement import Placement, placement_of
from rllava_pl.memory.plan import MemoryLimits, MemoryPlan, largest_kv_cache, largest_micro_batch, plan
from rllava_pl.memory.settings import PlannedEngine, PlannedModel, PlanSettings, PromptSize
from rllava_pl.memory.units import parse_bytes

__all__ = [
    "Advice",
    "MemoryItem",
    "MemoryLimits",
    "MemoryPlan",
    "PhaseMemory",
    "Placement",
    "PlanSettings",
    "PlannedEngine",
    "PlannedModel",
    "PromptSize",
    "advise",
    "largest_kv_cache",
    "largest_micro_batch",
    "parse_bytes",
    "placement_of",
    "plan",
]
